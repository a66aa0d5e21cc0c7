"""Speed and size of secure aggregation, in CPU seconds of this process.

    python tests/benchmarks/secagg.py [--json] [--quick]

`--json` prints one object a row: work, ours, peer, unit, ratio (ours / peer; null without a peer).
`--quick` scales the sizes down by ten to see that it runs; its numbers mean nothing.

The real state machines over encoded messages: a client's time has decoding the request and encoding the
reply in it, a server's the opposite. The peer is Flower's SecAgg+: its primitives, called as its own
workflow and modifier call them (flwr 1.41), on the same work in the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from common.secagg import keys, masks
from common.secagg.encoding import Codec, Tensor
from common.secagg.keys import Secret
from common.secagg.masks import CHUNK_BYTES, ring_memory
from common.secagg.messages import (
    AdvertiseReply,
    AdvertiseRequest,
    ConsistReply,
    ConsistRequest,
    MaskReply,
    MaskRequest,
    ShareReply,
    ShareRequest,
    UnmaskReply,
    UnmaskRequest,
)
from common.secagg.policy import Policy
from tests.secagg_world import CONTEXT, World

Row = dict[str, Any]


def row(work: str, ours: float, unit: str, peer: float | None = None) -> Row:
    ratio = None if peer is None else ours / peer
    return {"work": work, "ours": ours, "peer": peer, "unit": unit, "ratio": ratio}


@dataclass
class Clock:
    """CPU seconds by name."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start


@dataclass
class Result:
    """client: of the one site that is timed. upload: its bytes in all five replies."""

    client: float
    server: float
    upload: int
    exact: bool
    degree: int
    parts: dict[str, float]


def session(n: int, params: int, *, dropped: float, bits: int = 32, min_cohort: int, c_max: int) -> Result:
    """One session of n sites in which a share of the sites drops out between SHARE and MASK.

    All sites run; one honest survivor's and the server's time is taken. Its vector is encoded in the
    time, the others' are random ring vectors. Sites that drop are the costly kind: their pair masks have
    to be rebuilt.
    """
    codec = Codec(bits, max(n, min_cohort), 1, (Tensor(params, 1.0),))
    world = World(n, policy=Policy(codec, bytes(32), min_cohort, c_max))
    server, clock, upload = world.server(), Clock(), 0
    update = np.random.default_rng(1).normal(0, 0.2, params).astype(np.float32)
    timed, gone = 1, set(world.ids[n - int(n * dropped) :])

    def ask(site: int, call: Callable[[], bytes]) -> bytes:
        nonlocal upload
        if site != timed:
            return call()
        keys.verify.cache_clear()  # a site of its own has checked nothing yet
        with clock.of("client"):
            reply = call()
        upload += len(reply)
        return reply

    def take(call: Callable[[], object]) -> None:
        with clock.of("server"):
            call()

    with clock.of("server"):
        request = server.advertise_request().encode()
    for site in world.ids:
        client = world.clients[site]
        reply = ask(site, lambda c=client: c.advertise(AdvertiseRequest.decode(request), CONTEXT).encode())
        take(lambda s=site, r=reply: server.take_advertisement(s, AdvertiseReply.decode(r)))

    with clock.of("server"):
        request = server.close_advertise().encode()
    for site in world.ids:
        client = world.clients[site]
        reply = ask(site, lambda c=client: c.share(ShareRequest.decode(request)).encode())
        take(lambda s=site, r=reply: server.take_shares(s, ShareReply.decode(r)))

    with clock.of("server"):
        requests = {site: request.encode() for site, request in server.close_share().items()}
    for site in world.ids:
        if site in gone:
            continue
        client = world.clients[site]

        def masked(client: Any = client, site: int = site) -> bytes:
            if site == timed:
                world.vectors[site] = codec.encode(update, 1, os.urandom)
            mine = MaskRequest.decode(requests[site])
            return client.mask(mine, world.update(site)).encode()

        reply = ask(site, masked)
        take(lambda s=site, r=reply: server.take_masked(s, MaskReply.decode(r)))

    with clock.of("server"):
        request = server.close_mask().encode()
    for site in server.asked:
        client = world.clients[site]
        reply = ask(site, lambda c=client: c.consist(ConsistRequest.decode(request)).encode())
        take(lambda s=site, r=reply: server.take_signature(s, ConsistReply.decode(r)))

    with clock.of("server"):
        request = server.close_consist().encode()
    for site in server.asked:
        client = world.clients[site]
        reply = ask(site, lambda c=client: c.unmask(UnmaskRequest.decode(request)).encode())
        take(lambda s=site, r=reply: server.take_unmask(s, UnmaskReply.decode(r)))
    with clock.of("server"):
        result = server.close_unmask()

    plain = np.zeros_like(result.total)
    for site in result.survivors:
        plain += world.vectors[site]
    exact = bool(np.array_equal(plain, result.total)) and set(result.survivors) == set(world.ids) - gone
    seconds = clock.seconds
    return Result(seconds["client"], seconds["server"], upload, exact, server._graph.degree, seconds)


# Flower's SecAgg+


def flower_server(n: int, params: int, dropped: int, threshold: int) -> float:
    """The server's work in Flower's workflow: sum the masked vectors, rebuild, take the masks off.

    As in `SecAggPlusWorkflow.collect_masked_vectors_stage` and `unmask_stage`. Vectors, shares and key
    pairs are made before the clock starts.
    """
    from flwr.common import bytes_to_ndarray, ndarray_to_bytes
    from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
    from flwr.common.secure_aggregation.ndarrays_arithmetic import (
        parameters_addition,
        parameters_mod,
        parameters_subtraction,
    )
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
    from flwr.supercore.primitives.asymmetric import (
        bytes_to_private_key,
        generate_key_pairs,
        private_key_to_bytes,
    )

    mod_range, left = 1 << 32, n - dropped
    pairs = [generate_key_pairs() for _ in range(n)]
    # Every survivor sends its share, and the workflow combines all that came
    seeds = {i: create_shares(os.urandom(32), threshold, n)[:left] for i in range(left)}
    secret_keys = {
        i: create_shares(private_key_to_bytes(pairs[i][0]), threshold, n)[:left] for i in range(left, n)
    }
    rng = np.random.default_rng(1)
    replies = [
        ndarray_to_bytes(rng.integers(0, mod_range, params, dtype=np.int64)) for _ in range(n - dropped)
    ]
    shape = [(params,)]
    gc.collect()
    start = time.process_time()
    total = [bytes_to_ndarray(replies[0])]
    for reply in replies[1:]:
        total = parameters_addition(total, [bytes_to_ndarray(reply)])
    total = parameters_mod(total, mod_range)
    for shares in seeds.values():
        total = parameters_subtraction(total, pseudo_rand_gen(combine_shares(shares), mod_range, shape))
    for i, shares in secret_keys.items():
        private = bytes_to_private_key(combine_shares(shares))
        for j in range(n):
            if j != i:
                key = generate_shared_key(private, pairs[j][1])
                mask = pseudo_rand_gen(key, mod_range, shape)
                total = (parameters_addition if i > j else parameters_subtraction)(total, mask)
    parameters_mod(total, mod_range)
    return time.process_time() - start


def flower_client(n: int, params: int, threshold: int) -> float:
    """One site's work in Flower's modifier: agree, share, encrypt, quantize, mask."""
    from flwr.common.secure_aggregation.crypto.shamir import create_shares
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt, generate_shared_key
    from flwr.common.secure_aggregation.ndarrays_arithmetic import (
        parameters_addition,
        parameters_mod,
        parameters_subtraction,
    )
    from flwr.common.secure_aggregation.quantization import quantize
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
    from flwr.supercore.primitives.asymmetric import generate_key_pairs, private_key_to_bytes

    mod_range = 1 << 32
    peers = [generate_key_pairs()[1] for _ in range(n - 1)]
    update = [np.random.default_rng(1).normal(0, 0.2, params).astype(np.float32)]
    gc.collect()
    start = time.process_time()
    (mask_key, _), (share_key, _) = generate_key_pairs(), generate_key_pairs()
    b_shares = create_shares(seed := os.urandom(32), threshold, n)
    key_shares = create_shares(private_key_to_bytes(mask_key), threshold, n)
    for peer, b_share, key_share in zip(peers, b_shares, key_shares, strict=False):
        encrypt(generate_shared_key(share_key, peer), b_share + key_share)
    vector = quantize(update, 1.0, 1 << 22)
    vector = parameters_addition(vector, pseudo_rand_gen(seed, mod_range, [(params,)]))
    for place, peer in enumerate(peers):
        mask = pseudo_rand_gen(generate_shared_key(mask_key, peer), mod_range, [(params,)])
        vector = (parameters_addition if place % 2 else parameters_subtraction)(vector, mask)
    parameters_mod(vector, mod_range)
    return time.process_time() - start


# Rows


def best(call: Callable[[], float], times: int = 5) -> float:
    """The least of several: what the work takes, not what else ran."""
    return min(call() for _ in range(times))


def masking(words: int, count: int) -> Row:
    """Masks added to a vector, against the cipher writing the same keystream over one buffer."""
    vector = np.zeros(words, dtype="<u4")
    seeds = [(Secret(os.urandom(32)), masks.ADD) for _ in range(count)]
    zeros, buffer = bytes(CHUNK_BYTES), np.empty(CHUNK_BYTES // 4, dtype="<u4")
    stream = ring_memory(buffer)

    def ours() -> float:
        start = time.process_time()
        masks.apply_masks(vector, seeds)
        return time.process_time() - start

    def cipher_alone() -> float:
        start = time.process_time()
        for seed, _ in seeds:
            encryptor = Cipher(algorithms.AES256(seed.reveal()), modes.CTR(bytes(16))).encryptor()
            left = vector.nbytes
            while left > 0:
                encryptor.update_into(zeros[:left] if left < CHUNK_BYTES else zeros, stream)
                left -= CHUNK_BYTES
        return time.process_time() - start

    return row(
        f"masking, {count} masks of {words:,} words, against the keystream",
        best(ours),
        "s",
        best(cipher_alone),
    )


def server_memory(params: int) -> Row:
    """Peak memory of a process with 24 sites against one with 8: vectors that are kept would show."""
    peaks = []
    for n in (8, 24):
        command = [sys.executable, __file__, "--peak", str(n), str(params)]
        peaks.append(float(subprocess.run(command, capture_output=True, check=True, text=True).stdout))
    what = f"server memory, peak with 24 sites against 8, {params:,} parameters"
    return row(what, peaks[1], "MB", peaks[0])


def peak(n: int, params: int) -> float:
    """MB that this process has held at most, after a session in which all sites upload one vector."""
    policy = Policy(Codec(32, 64, 1, (Tensor(params, 1.0),)), bytes(32), 4, 1)
    shared = np.ones(policy.words, dtype="<u4")
    World.vector = lambda self: shared  # type: ignore[method-assign]
    world = World(n, policy=policy)
    server = world.server()
    for step in (world.advertise, world.share, world.mask, world.consist):
        step(server)
    world.unmask(server)
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def rows(quick: bool) -> Iterator[Row]:
    scale = 10 if quick else 1
    million, thousand, hundred, fifty = 1_000_000 // scale, 1000 // scale, 100 // scale, 50 // scale

    yield masking(million, 99)

    runs = [session(hundred, million, dropped=0.1, min_cohort=4, c_max=1) for _ in range(3)]
    client, server = (min(getattr(run, name) for run in runs) for name in ("client", "server"))
    what = f"{hundred} sites x {million:,}, 10% dropouts"
    yield row(
        f"client, {what}, all five exchanges", client, "s", flower_client(hundred, million, 67 // scale + 1)
    )
    yield row(f"server, {what}", server, "s")
    yield row(f"exact, {what}", float(all(run.exact for run in runs)), "1 = yes")

    float32 = 4 * million
    yield row(f"upload at 32 bits, {what}", runs[0].upload, "bytes", float32)
    yield row("upload beyond the vector at 32 bits", runs[0].upload - float32, "bytes")
    narrow = session(hundred, million, dropped=0.1, bits=16, min_cohort=4, c_max=1)
    yield row(f"upload at 16 bits, {what}", narrow.upload, "bytes", float32)
    yield row("upload beyond the vector at 16 bits", narrow.upload - float32 // 2, "bytes")

    ours = min(session(fifty, million, dropped=0.1, min_cohort=4, c_max=1).server for _ in range(3))
    peer = flower_server(fifty, million, fifty // 10, 34 // scale + 1)
    yield row(f"server, {fifty} sites x {million:,}, 10% dropouts, against Flower's SecAgg+", ours, "s", peer)

    big = session(thousand, 50_000 // scale, dropped=0.1, min_cohort=64 // scale + 1, c_max=21 // scale)
    what = f"{thousand} sites x {50_000 // scale:,}, k-regular"
    yield row(f"server, {what}", big.server, "s")
    yield row(f"degree, {what}", big.degree, "neighbours")
    yield row(f"exact, {what}", float(big.exact), "1 = yes")

    yield server_memory(million)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peak", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak(*arguments.peak))
        return 0
    for entry in rows(arguments.quick):
        if arguments.json:
            print(json.dumps(entry), flush=True)
        else:
            peer = (
                "" if entry["peer"] is None else f"   peer {entry['peer']:,.4g}   ratio {entry['ratio']:.4f}"
            )
            print(f"{entry['work']:<75} {entry['ours']:>12,.4g} {entry['unit']}{peer}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
