"""Every known answer, and that a wrong answer would be noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.secagg.vectors import VectorError, check_document

FOLDER = Path(__file__).parents[2] / "vectors" / "secagg"
FILES = sorted(FOLDER.glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_known_answers(path: Path) -> None:
    document = json.loads(path.read_text())
    assert document["version"] == 1
    assert check_document(document) == len(document["cases"]) > 0


@pytest.mark.parametrize("path", [p for p in FILES if p.stem.startswith("bad_")], ids=lambda path: path.stem)
def test_bad_files_hold_only_refusals(path: Path) -> None:
    for case in json.loads(path.read_text())["cases"]:
        assert case.get("refused") or case["error"] in {
            "ValueError",
            "MessageError",
            "EncodingError",
            "NonFiniteError",
            "PolicyError",
            "VectorError",
        }


# Which field of a case to spoil, so that the checker itself is seen to fail
ANSWERS = {
    "rfc7748": "shared",
    "rfc8032": "signature",
    "rfc5869": "okm",
    "sp800_38a_f55": "ciphertext",
    "gcm": "tag",
    "seal_once": "sealed",
    "mask": "digest",
    "shamir_split": "secret",
    "decode_sum": "mean",
    "session": "h1",
    "message": "encoded",
    "wycheproof_x25519": "shared",
    "wycheproof_ed25519": "signature",
    "wycheproof_aes_gcm": "tag",
    "wycheproof_hkdf_sha256": "okm",
}


@pytest.mark.parametrize("stem", ANSWERS)
def test_a_wrong_answer_is_noticed(stem: str) -> None:
    document = json.loads((FOLDER / f"{stem}.json").read_text())
    case = document["cases"][0]
    raw = bytearray.fromhex(case[ANSWERS[stem]])
    raw[len(raw) // 2] ^= 1
    case[ANSWERS[stem]] = raw.hex()
    with pytest.raises(VectorError):
        check_document(document)


def test_every_good_file_has_a_bad_one_or_an_external_source() -> None:
    external = {"rfc7748", "rfc8032", "rfc5869", "sp800_38a_f55", "gcm", "graph_degree", "graph_ring"}
    good = {path.stem for path in FILES if not path.stem.startswith("bad_")}
    assert {stem for stem in good if f"bad_{stem}" not in {path.stem for path in FILES}} <= external
