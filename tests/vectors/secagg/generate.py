# ruff: noqa: E501  (tables of cases)
"""Writes the known answers of this folder. They are frozen: run it only to add a file.

    python tests/vectors/secagg/generate.py [--wycheproof FOLDER]

A file that exists is compared, never written, so a changed answer is somebody's decision. FOLDER holds
Wycheproof's x25519_test.json, ed25519_test.json, hkdf_sha256_test.json and aes_gcm_test.json (Apache
License 2.0); what applies to our use is kept: AES-256 with 96-bit nonces and 128-bit tags.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[2]))

import numpy as np  # noqa: E402

from common.secagg import derivation, framing, graph, keys, masks, messages, shamir, transcript  # noqa: E402
from common.secagg.graph import GraphRule  # noqa: E402
from common.secagg.keys import Secret  # noqa: E402
from common.secagg.vectors import codec_of, floats, replay  # noqa: E402
from tests.secagg_world import Stream  # noqa: E402

Document = dict[str, Any]
Case = dict[str, Any]
P = keys.FIELD_PRIME
OWN = "this project, frozen"


def document(algorithm: str, source: str, cases: list[Case]) -> Document:
    return {"version": 1, "algorithm": algorithm, "source": source, "cases": cases}


# Copied from the documents named


def rfc() -> dict[str, Document]:
    nine = "09" + "00" * 31
    alice = "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"
    bob_public = "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    x25519 = [
        (
            "5.2, first",
            "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
            "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
            1,
            "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
        ),
        ("5.2, once", nine, nine, 1, "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"),
        (
            "5.2, 1000 times",
            nine,
            nine,
            1000,
            "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51",
        ),
        ("6.1, K", alice, bob_public, 1, "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"),
        ("6.1, Alice", alice, nine, 1, "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"),
    ]
    return {
        "rfc7748.json": document(
            "x25519",
            "RFC 7748, sections 5.2 and 6.1",
            [dict(zip(("comment", "scalar", "u", "times", "shared"), row, strict=True)) for row in x25519],
        ),
        "rfc8032.json": document(
            "ed25519",
            "RFC 8032, section 7.1, test 1",
            [
                {
                    "seed": "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
                    "public": "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
                    "message": "",
                    "signature": "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
                    "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
                }
            ],
        ),
        "rfc5869.json": document(
            "hkdf-sha256",
            "RFC 5869, appendix A.1",
            [
                {
                    "ikm": "0b" * 22,
                    "salt": bytes(range(13)).hex(),
                    "info": bytes(range(0xF0, 0xFA)).hex(),
                    "length": 42,
                    "okm": "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
                }
            ],
        ),
        "sp800_38a_f55.json": document(
            "aes-256-ctr",
            "NIST SP 800-38A, appendix F.5.5",
            [
                {
                    "key": "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4",
                    "counter": "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff",
                    "plaintext": "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
                    "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710",
                    "ciphertext": "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
                    "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6",
                }
            ],
        ),
        "gcm.json": document(
            "aes-256-gcm",
            "McGrew and Viega, The Galois/Counter Mode of Operation, test cases 13 to 16",
            [
                {
                    "comment": "13",
                    "key": "00" * 32,
                    "nonce": "00" * 12,
                    "aad": "",
                    "plaintext": "",
                    "ciphertext": "",
                    "tag": "530f8afbc74536b9a963b4f1c4cb738b",
                },
                {
                    "comment": "14",
                    "key": "00" * 32,
                    "nonce": "00" * 12,
                    "aad": "",
                    "plaintext": "00" * 16,
                    "ciphertext": "cea7403d4d606b6e074ec5d3baf39d18",
                    "tag": "d0d1c8a799996bf0265b98b5d48ab919",
                },
                {
                    "comment": "16",
                    "key": "feffe9928665731c6d6a8f9467308308" * 2,
                    "nonce": "cafebabefacedbaddecaf888",
                    "aad": "feedfacedeadbeeffeedfacedeadbeefabaddad2",
                    "plaintext": "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
                    "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39",
                    "ciphertext": "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
                    "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662",
                    "tag": "76fc6ece0f4e1768cddf8853bb2d551b",
                },
            ],
        ),
    }


def wycheproof(folder: Path) -> dict[str, Document]:
    def groups(name: str) -> list[Case]:
        return json.loads((folder / name).read_text())["testGroups"]

    def split(cases: list[Case], stem: str, algorithm: str) -> dict[str, Document]:
        source = f"C2SP/wycheproof testvectors_v1/{stem}_test.json, Apache License 2.0"
        good = [case for case in cases if not case.get("refused") and "error" not in case]
        bad = [case for case in cases if case not in good]
        files = {f"wycheproof_{stem}.json": good, f"bad_wycheproof_{stem}.json": bad}
        return {name: document(algorithm, source, chosen) for name, chosen in files.items() if chosen}

    def comment(test: Case) -> Case:
        return {"comment": f"{test['tcId']} {test['comment']}".strip()}

    x25519 = []
    for test in groups("x25519_test.json")[0]["tests"]:
        zero = test["shared"] == "00" * 32  # we refuse what RFC 7748 lets an implementation accept
        x25519.append(
            comment(test)
            | {"scalar": test["private"], "u": test["public"], "shared": test["shared"]}
            | ({"error": "ValueError"} if zero else {})
        )
    ed25519 = [
        comment(test)
        | {"public": group["publicKey"]["pk"], "message": test["msg"], "signature": test["sig"]}
        | ({"refused": True} if test["result"] == "invalid" else {})
        for group in groups("ed25519_test.json")
        for test in group["tests"]
    ]
    hkdf = [
        comment(test)
        | {
            "ikm": test["ikm"],
            "salt": test["salt"],
            "info": test["info"],
            "length": test["size"],
            "okm": test["okm"],
        }
        | ({"error": "ValueError"} if test["result"] == "invalid" else {})
        for group in groups("hkdf_sha256_test.json")
        for test in group["tests"]
    ]
    gcm = [
        comment(test)
        | {"key": test["key"], "nonce": test["iv"], "aad": test["aad"], "plaintext": test["msg"]}
        | {"ciphertext": test["ct"], "tag": test["tag"]}
        | ({"refused": True} if test["result"] == "invalid" else {})
        for group in groups("aes_gcm_test.json")
        if (group["keySize"], group["ivSize"], group["tagSize"]) == (256, 96, 128)
        for test in group["tests"]
    ]
    return (
        split(x25519, "x25519", "x25519")
        | split(ed25519, "ed25519", "ed25519")
        | split(hkdf, "hkdf_sha256", "hkdf-sha256")
        | split(gcm, "aes_gcm", "aes-256-gcm")
    )


# Ours


def points() -> dict[str, Document]:
    order_8 = [
        0x00B8495F16056286FDB1329CEB8D09DA6AC49FF1FAE35616AEB8413B7C7AEBE0,
        0x57119FD0DD4E22D8868E1C58C45C44045BEF839C55B1D0B1248C50A3BC959C5F,
    ]
    low = [0, 1, P - 1, P, P + 1, *order_8]
    encodings = [(u + top) % 2**256 for u in low for top in (0, 2**255)]
    bad = [
        {"u": u.to_bytes(32, "little").hex(), "canonical": u < P, "low_order": True, "error": "ValueError"}
        for u in encodings
    ]
    good = [9, 2, P - 2, P + 9 - P]
    strange = [P + 9, 2**255 + 9, P + 2]
    fine = [
        {"u": u.to_bytes(32, "little").hex(), "canonical": u < P, "low_order": False}
        for u in dict.fromkeys(good + strange)
    ]
    source = "RFC 7748, sections 6.1 and 7; every encoding of the points of low order"
    return {
        "points.json": document("x25519-point", source, fine),
        "bad_points.json": document("x25519-point", source, bad),
    }


def sealing() -> dict[str, Document]:
    random = Stream(1)
    key, aad, plaintext = Secret(random(32)), random(72), random(64)
    sealed = keys.seal_once(key, Secret(plaintext), aad)
    good = {"key": key.reveal().hex(), "aad": aad.hex(), "plaintext": plaintext.hex(), "sealed": sealed.hex()}

    def flip(data: str, place: int) -> str:
        raw = bytearray.fromhex(data)
        raw[place] ^= 1
        return raw.hex()

    bad = [
        good | {"comment": "first byte", "sealed": flip(good["sealed"], 0)},
        good | {"comment": "tag", "sealed": flip(good["sealed"], -1)},
        good | {"comment": "truncated", "sealed": good["sealed"][:-2]},
        good | {"comment": "tag only", "sealed": good["sealed"][-32:]},
        good | {"comment": "empty", "sealed": ""},
        good | {"comment": "extended", "sealed": good["sealed"] + "00"},
        good | {"comment": "other session, sender or receiver", "aad": flip(good["aad"], 68)},
        good | {"comment": "other key", "key": flip(good["key"], 5)},
    ]
    return {
        "seal_once.json": document("seal-once", OWN, [good]),
        "bad_seal_once.json": document("seal-once", OWN, [case | {"refused": True} for case in bad]),
    }


def mask_files() -> dict[str, Document]:
    random, cases = Stream(2), []
    for bits, words, signs in (
        (32, 40, [1]),
        (16, 40, [1]),
        (32, 200_000, [1, -1, -1]),
        (16, 300_001, [-1, 1]),
    ):
        seeds = [(random(32).hex(), sign) for sign in signs]
        vector = np.zeros(words, dtype=masks.ring_dtype(bits))
        masks.apply_masks(vector, [(Secret(bytes.fromhex(seed)), sign) for seed, sign in seeds])
        cases.append(
            {
                "ring_bits": bits,
                "words": words,
                "masks": seeds,
                "first": vector[:8].tolist(),
                "last": vector[-8:].tolist(),
                "digest": transcript.digest(b"vector", vector.tobytes()).hex(),
            }
        )
    bad = [
        {"ring_bits": 24, "words": 4, "masks": [["00" * 32, 1]], "error": "ValueError", "comment": "ring"},
        {"ring_bits": 32, "words": 4, "masks": [["00" * 32, 0]], "error": "ValueError", "comment": "sign"},
        {"ring_bits": 32, "words": 4, "masks": [["00" * 32, 2]], "error": "ValueError", "comment": "sign"},
        {"ring_bits": 32, "words": 4, "masks": [["00" * 31, 1]], "error": "ValueError", "comment": "seed"},
    ]
    return {"mask.json": document("mask", OWN, cases), "bad_mask.json": document("mask", OWN, bad)}


def shamir_files() -> dict[str, Document]:
    random, splits = Stream(3), []
    for threshold, holders in (
        (1, [1]),
        (3, [1, 2, 3, 4, 5]),
        (4, [7, 2**32 - 1, 3, 10, 99, 1000]),
        (7, list(range(1, 11))),
    ):
        secret, used = shamir.random_element(random), random(32 * (threshold - 1))
        shares = shamir.split(secret, threshold, holders, replay(used.hex()))
        splits.append(
            {
                "secret": shamir.element_bytes(secret).hex(),
                "threshold": threshold,
                "holders": holders,
                "random": used.hex(),
                "shares": [shamir.element_bytes(share).hex() for share in shares],
            }
        )
    good = splits[1]
    bad_splits = [
        good
        | {"comment": "holder 0 would hold the secret", "holders": [0, 2, 3, 4, 5], "error": "ValueError"},
        good | {"comment": "holder twice", "holders": [1, 1, 3, 4, 5], "error": "ValueError"},
        good | {"comment": "holders equal modulo P", "holders": [1, P + 1, 3, 4, 5], "error": "ValueError"},
        good | {"comment": "threshold above holders", "threshold": 6, "error": "ValueError"},
        good | {"comment": "threshold 0", "threshold": 0, "error": "ValueError"},
        good
        | {"comment": "secret not below P", "secret": P.to_bytes(32, "little").hex(), "error": "ValueError"},
        good | {"comment": "secret of 31 bytes", "secret": "00" * 31, "error": "ValueError"},
    ]
    base = splits[3]

    def wrong(*places: int, certain: bool = True) -> Case:
        shares = list(base["shares"])
        for place in places:
            shares[place] = shamir.element_bytes(shamir.random_element(random)).hex()
        givers = [base["holders"][place] for place in places]
        return base | {"shares": shares, "wrong": givers, "certain": certain, "random": random(96).hex()}

    rebuilds = [
        wrong() | {"comment": "all right"},
        wrong(2) | {"comment": "one wrong: decoded"},
        wrong(9) | {"comment": "one wrong among those not needed"},
        wrong(0, 5, certain=False) | {"comment": "two wrong of 10 with t = 7: found by leaving out suspects"},
        wrong(1, 2, 8, certain=False) | {"comment": "three wrong, all that is spare"},
    ]
    refused = wrong(0, 1, 2, 3) | {"comment": "four wrong: only six are right", "refused": True}
    few = wrong() | {"comment": "six shares", "error": "ValueError"}
    few |= {"holders": few["holders"][:6], "shares": few["shares"][:6]}
    twice = wrong() | {"comment": "one giver twice", "holders": [1, 1, *range(3, 11)], "error": "ValueError"}
    return {
        "shamir_split.json": document("shamir-split", OWN, splits),
        "bad_shamir_split.json": document("shamir-split", OWN, bad_splits),
        "shamir_rebuild.json": document("shamir-rebuild", OWN, rebuilds),
        "bad_shamir_rebuild.json": document("shamir-rebuild", OWN, [refused, few, twice]),
    }


def encoding_files() -> dict[str, Document]:
    def pack(*values: float) -> str:
        return struct.pack(f"<{len(values)}d", *values).hex()

    plain: Case = {
        "ring_bits": 32,
        "n_max": 100,
        "w_max": 1,
        "tensors": [[4, 1.0]],
        "counts": [],
        "noise_bound": 0,
    }
    plain |= {"update": pack(0.0, 0.5, -1.0, 7.0), "weight": 1, "reported": []}
    rich: Case = {
        "ring_bits": 16,
        "n_max": 100,
        "w_max": 5000,
        "tensors": [[2, 0.5], [3, 2.0]],
        "noise_bound": 20,
    }
    rich |= {"counts": [["correct", 10**6], ["loss", 300]], "update": pack(0.25, -0.5, 2.0, -3.0, 0.125)}
    rich |= {"weight": 4321, "reported": [["correct", 123456], ["loss", -7]]}
    silent = rich | {"weight": 0, "reported": [["correct", 0], ["loss", 0]]}
    cases, sums = [], []
    for place, case in enumerate((plain, rich, silent)):
        seed = Stream(40 + place)(32 * len(case["tensors"])).hex()
        codec = codec_of(case)
        vector = codec.encode(floats(case["update"]), case["weight"], replay(seed), dict(case["reported"]))
        cases.append(case | {"random": seed, "vector": vector.tolist()})
        if case["weight"]:
            three = vector * np.asarray(3, dtype=vector.dtype)
            decoded = codec.decode_sum(three, 3)
            fields = {
                "vector": three.tolist(),
                "sites": 3,
                "mean": decoded.mean.astype("<f8").tobytes().hex(),
            }
            fields |= {"weight": decoded.weight, "reported": list(map(list, decoded.counts.items()))}
            sums.append({k: v for k, v in case.items() if k != "update"} | fields)
    base = cases[0]
    bad = [
        base | {"comment": "NaN", "update": pack(0.0, float("nan"), 0.0, 0.0), "error": "NonFiniteError"},
        base
        | {"comment": "infinity", "update": pack(0.0, 0.0, 0.0, float("inf")), "error": "NonFiniteError"},
        base
        | {"comment": "-infinity", "update": pack(float("-inf"), 0.0, 0.0, 0.0), "error": "NonFiniteError"},
        base | {"comment": "too short", "update": pack(0.0, 0.0, 0.0), "error": "EncodingError"},
        base | {"comment": "too long", "update": pack(0.0, 0.0, 0.0, 0.0, 0.0), "error": "EncodingError"},
        base | {"comment": "weight above w_max", "weight": 2, "error": "EncodingError"},
        base | {"comment": "negative weight", "weight": -1, "error": "EncodingError"},
        base | {"comment": "unknown count", "reported": [["loss", 1]], "error": "EncodingError"},
        base | {"comment": "ring of 24 bits", "ring_bits": 24, "error": "PolicyError"},
        base | {"comment": "clip 0", "tensors": [[4, 0.0]], "error": "PolicyError"},
        base | {"comment": "clip infinite", "tensors": [[4, float("inf")]], "error": "PolicyError"},
        base | {"comment": "no tensors", "tensors": [], "error": "PolicyError"},
        base | {"comment": "no headroom", "ring_bits": 16, "n_max": 20_000, "error": "PolicyError"},
        base | {"comment": "noise eats the ring", "noise_bound": 2**31, "error": "PolicyError"},
        cases[1] | {"comment": "count missing", "reported": [["loss", 1]], "error": "EncodingError"},
        cases[1]
        | {
            "comment": "count above limit",
            "reported": [["correct", 1], ["loss", 301]],
            "error": "EncodingError",
        },
    ]
    total = sums[0]
    bad_sums = [
        total | {"comment": "a word missing", "vector": total["vector"][:-1], "error": "EncodingError"},
        total | {"comment": "no sites", "sites": 0, "error": "EncodingError"},
        total | {"comment": "more sites than n_max", "sites": 101, "error": "EncodingError"},
        total
        | {
            "comment": "more weight than sites",
            "vector": [*total["vector"][:-1], 4],
            "error": "EncodingError",
        },
        total
        | {
            "comment": "negative weight",
            "vector": [*total["vector"][:-1], 2**32 - 1],
            "error": "EncodingError",
        },
        total
        | {"comment": "no weight at all", "vector": [*total["vector"][:-1], 0], "error": "EncodingError"},
    ]
    return {
        "encode.json": document("encode", OWN, cases),
        "bad_encode.json": document("encode", OWN, bad),
        "decode_sum.json": document("decode-sum", OWN, sums),
        "bad_decode_sum.json": document("decode-sum", OWN, bad_sums),
    }


def graph_files() -> dict[str, Document]:
    degrees = []
    for n, min_cohort, c_max, dropout in (
        (257, 30, 9, "1/10"),
        (300, 200, 66, "1/10"),
        (1000, 64, 21, "1/10"),
        (1000, 64, 21, "1/3"),
        (1000, 200, 66, "1/10"),
        (10000, 100, 33, "1/3"),
    ):
        found = graph.regular_parameters(n, min_cohort, c_max, GraphRule(dropout=Fraction(dropout)))
        case = {"n": n, "min_cohort": min_cohort, "c_max": c_max, "dropout": dropout}
        case |= {"parameters": found, "t": graph.threshold(n, Fraction(1, 3))}
        degrees.append(case)
    rings = []
    for members, secrecy, abort in (
        ([1, 2, 3, 4], 80, 20),
        (list(range(1, 41)), 20, 10),
        (list(range(5, 300, 5)), 20, 10),
    ):
        h1 = transcript.digest(b"test", bytes([len(members)]))
        rule = GraphRule(complete_up_to=4, secrecy_bits=secrecy, abort_bits=abort)
        t = graph.threshold(len(members), Fraction(1, 3))
        made = graph.build_graph(members, h1, t=t, min_cohort=4, c_max=1, rule=rule)
        rings.append(
            {
                "members": members,
                "h1": h1.hex(),
                "min_cohort": 4,
                "c_max": 1,
                "secrecy_bits": secrecy,
                "abort_bits": abort,
                "ring": made.ring,
                "parameters": [made.degree, made.share_threshold],
                "neighbours_of_first": made.neighbours(members[0]),
            }
        )
    return {
        "graph_degree.json": document("graph-degree", OWN, degrees),
        "graph_ring.json": document("graph-ring", OWN, rings),
    }


def transcript_files() -> dict[str, Document]:
    random = Stream(5)
    roster = {site: random(32) for site in (1, 2, 9, 2**32 - 1)}
    case: Case = {"roster": [[site, key.hex()] for site, key in roster.items()], "run": b"run-7".hex()}
    case |= {"round": 3, "attempt": 1, "policy": random(32).hex(), "cohort": [1, 2, 9], "one": 9, "other": 2}
    case |= {"adapter": random(40).hex(), "config": b"lr=0.1".hex()}
    s, b = (Secret(shamir.element_bytes(shamir.random_element(random))) for _ in range(2))
    case |= {
        "s": s.reveal().hex(),
        "b": b.reveal().hex(),
        "advertisements": [random(164).hex() for _ in range(3)],
    }
    sid = transcript.session_id(
        run=b"run-7",
        round_number=3,
        attempt=1,
        roster=transcript.roster_hash(roster),
        policy=bytes.fromhex(case["policy"]),
        cohort=case["cohort"],
        context=transcript.context_hash(bytes.fromhex(case["adapter"]), b"lr=0.1"),
    )
    h1 = transcript.u1_hash(sid, [bytes.fromhex(entry) for entry in case["advertisements"]])
    key, peer = derivation.mask_key(s, sid), derivation.mask_key(b, sid).public
    answers = {
        "sid": sid,
        "h1": h1,
        "commitment": transcript.commitment(sid, 9, b),
        "advertised": transcript.advertisement_digest(sid, 9, bytes(32), bytes([1] * 32), bytes([2] * 32)),
        "ring_position": transcript.ring_position(h1, 9),
        "consist": transcript.consist_digest(sid, h1, [1, 2, 9], [2, 9], 9),
        "share_aad": transcript.share_aad(sid, h1, 9, 2),
        "mask_key": key.public,
        "self_seed": derivation.self_seed(b, sid).reveal(),
        "pair_seed": derivation.pair_seed(key, peer, sid, h1, 9, 2).reveal(),
        "share_key": derivation.share_key(s, sid, h1, 9, 2).reveal(),
    }
    good = case | {name: value.hex() for name, value in answers.items()}
    bad = [
        good | {"comment": "id 0", "cohort": [0, 2, 9], "error": "ValueError"},
        good | {"comment": "id of 33 bits", "cohort": [1, 2, 2**32], "error": "ValueError"},
        good | {"comment": "another attempt", "attempt": 2, "error": "VectorError"},
        good | {"comment": "another model", "adapter": good["adapter"][:-2] + "00", "error": "VectorError"},
        good
        | {
            "comment": "a byte moved between fields",
            "adapter": good["adapter"] + "6c",
            "config": b"r=0.1".hex(),
        },
    ]
    bad[-1]["error"] = "VectorError"
    return {
        "session.json": document("session", OWN, [good]),
        "bad_session.json": document("session", OWN, bad),
    }


def message_files() -> dict[str, Document]:
    random = Stream(6)
    sid = random(32)

    def table(size: int) -> tuple[tuple[int, bytes], ...]:
        return tuple((site, random(size)) for site in (1, 2, 2**32 - 1))

    entry = messages.Advertisement(2, random(32), random(32), random(32), random(64))
    examples = [
        messages.AdvertiseRequest(b"run-7", 3, 1, (1, 2, 9), random(32), random(32), random(32)),
        messages.AdvertiseReply(sid, entry),
        messages.ShareRequest(sid, (entry, entry)),
        messages.ShareReply(sid, 2, table(messages.SEALED_BYTES)),
        messages.MaskRequest(sid, (1, 2, 9), table(messages.SEALED_BYTES)),
        messages.MaskReply(sid, 2, np.arange(5, dtype="<u2")),
        messages.ConsistRequest(sid, (1, 2, 9)),
        messages.ConsistReply(sid, 2, random(64)),
        messages.UnmaskRequest(sid, table(64)),
        messages.UnmaskReply(sid, 2, table(32), table(32)[:1]),
    ]
    good = [{"comment": type(m).__name__, "kind": m.kind, "encoded": m.encode().hex()} for m in examples]

    def sealed(body: bytes) -> str:
        return (body + zlib.crc32(body).to_bytes(4, "little")).hex()

    bad: list[Case] = []
    for case in good:
        raw = bytes.fromhex(case["encoded"])
        body, head = raw[:-4], framing.HEADER_BYTES
        changes = {
            "empty": "",
            "magic only": raw[:4].hex(),
            "a bit flipped": (raw[:9] + bytes([raw[9] ^ 1]) + raw[10:]).hex(),
            "wrong magic": sealed(b"CFSB" + body[4:]),
            "version 2": sealed(body[:4] + b"\2" + body[5:]),
            "kind of the next message": sealed(body[:5] + bytes([(body[5] + 1) % 10]) + body[6:]),
            "last byte missing": sealed(body[:-1]),
            "a byte left over": sealed(body + b"\0"),
            "no body": sealed(body[:head]),
        }
        bad += [
            case | {"comment": f"{case['comment']}: {what}", "encoded": data, "error": "MessageError"}
            for what, data in changes.items()
        ]
    special = {
        "run of length 0": (0, sealed(raw_body(good[0])[:6] + bytes(4) + raw_body(good[0])[15:])),
        "run of 65 bytes": (
            0,
            sealed(raw_body(good[0])[:6] + (65).to_bytes(4, "little") + bytes(65) + raw_body(good[0])[15:]),
        ),
        "id 0": (6, sealed(raw_body(good[6])[:42] + bytes(4) + raw_body(good[6])[46:])),
        "count of 2^32 - 1": (6, sealed(raw_body(good[6])[:38] + b"\xff" * 4 + raw_body(good[6])[42:])),
        "site 0": (7, sealed(raw_body(good[7])[:38] + bytes(4) + raw_body(good[7])[42:])),
        "ring of 24 bits": (5, sealed(raw_body(good[5])[:42] + bytes([24]) + raw_body(good[5])[43:])),
        "ring bits doubled, odd length": (
            5,
            sealed(raw_body(good[5])[:42] + bytes([32]) + raw_body(good[5])[43:]),
        ),
        "no words": (5, sealed(raw_body(good[5])[:43] + bytes(4))),
    }
    bad += [
        {"comment": what, "kind": kind, "encoded": data, "error": "MessageError"}
        for what, (kind, data) in special.items()
    ]
    return {"message.json": document("message", OWN, good), "bad_message.json": document("message", OWN, bad)}


def raw_body(case: Case) -> bytes:
    return bytes.fromhex(case["encoded"])[:-4]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wycheproof", type=Path)
    arguments = parser.parse_args()
    files = rfc() | points() | sealing() | mask_files() | shamir_files() | encoding_files()
    files |= graph_files() | transcript_files() | message_files()
    if arguments.wycheproof:
        files |= wycheproof(arguments.wycheproof)
    changed = 0
    for name, content in files.items():
        text = json.dumps(content, indent=1) + "\n"
        path = HERE / name
        if not path.exists():
            path.write_text(text)
            print(f"written  {name}: {len(content['cases'])} cases")
        elif path.read_text() != text:
            changed += 1
            print(f"DIFFERS  {name}: frozen, not written")
    return 1 if changed else 0


if __name__ == "__main__":
    raise SystemExit(main())
