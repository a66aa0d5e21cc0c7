"""Checkpoints: whole or not at all, and never believed when damaged."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import CheckpointError
from server.aggregation import OptimizerState
from server.checkpoint import Checkpoint, load_newest, save, write_atomically

CONFIG, LAYOUT = "c" * 64, "a" * 64


def state(round_number: int, size: int = 4) -> Checkpoint:
    rng = np.random.default_rng(round_number)
    return Checkpoint(
        round_number,
        rng.normal(size=size).astype(np.float32),
        OptimizerState(rng.normal(size=size), rng.normal(size=size)),
    )


def put(folder: Path, round_number: int, keep: int = 3) -> Path:
    return save(folder, state(round_number), config_digest=CONFIG, layout_digest=LAYOUT, keep=keep)


def newest(folder: Path, config: str = CONFIG, layout: str = LAYOUT) -> Checkpoint | None:
    return load_newest(folder, config_digest=config, layout_digest=layout)


def same(one: Checkpoint | None, two: Checkpoint) -> bool:
    def parts(c: Checkpoint) -> tuple[Any, ...]:
        arrays = (c.adapter, c.state.momentum, c.state.second)
        return (c.round, *((a.dtype, a.shape, a.tobytes()) for a in arrays))

    return one is not None and parts(one) == parts(two)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    assert newest(tmp_path / "none") is None
    put(tmp_path, 0)
    assert same(newest(tmp_path), state(0))
    put(tmp_path, 12)
    put(tmp_path, 3)
    assert same(newest(tmp_path), state(12))


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    for number in range(7):
        put(tmp_path, number, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "round-000005.safetensors",
        "round-000006.safetensors",
    ]


@pytest.mark.parametrize("mask", [0x01, 0x20, 0x80, 0xFF])
def test_every_byte_is_covered(tmp_path: Path, mask: int) -> None:
    path = put(tmp_path, 1)
    whole = path.read_bytes()
    refused = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= mask
        path.write_bytes(damaged)
        try:
            assert same(newest(tmp_path), state(1)), position
        except CheckpointError:
            refused += 1
    assert refused > 0.9 * len(whole)


def test_the_types_are_covered(tmp_path: Path) -> None:
    """float64 read as int64 is the same bytes and other numbers."""
    path = put(tmp_path, 1)
    path.write_bytes(path.read_bytes().replace(b'"F64"', b'"I64"').replace(b'"F32"', b'"I32"'))
    with pytest.raises(CheckpointError):
        newest(tmp_path)


def test_a_checkpoint_cut_short_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path, 1)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="Remove it"):
            newest(tmp_path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError):
        newest(tmp_path)


def test_another_run_s_checkpoint_is_refused(tmp_path: Path) -> None:
    put(tmp_path, 1)
    with pytest.raises(CheckpointError, match="another configuration"):
        newest(tmp_path, config="d" * 64)
    with pytest.raises(CheckpointError, match="another layout"):
        newest(tmp_path, layout="b" * 64)


def test_a_damaged_newest_is_named_and_the_one_before_takes_its_place(tmp_path: Path) -> None:
    put(tmp_path, 1)
    path = put(tmp_path, 2)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=path.name):
        newest(tmp_path)
    path.unlink()
    assert same(newest(tmp_path), state(1))


def test_other_files_are_not_checkpoints(tmp_path: Path) -> None:
    put(tmp_path, 1)
    for name in ("round-9.safetensors", "round-000009.safetensors.tmp", ".round-000009.safetensors.1.tmp"):
        (tmp_path / name).write_bytes(b"")
    assert same(newest(tmp_path), state(1))


class Crash(BaseException):
    """Not an error that any code could expect."""


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    put(tmp_path, 1)
    path = put(tmp_path, 2)
    before = path.read_bytes()

    def crash(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if moment == "fsync" else (Path, "replace")), crash)
        for number in (2, 3):
            with pytest.raises(Crash):
                put(tmp_path, number)
    assert path.read_bytes() == before
    assert same(newest(tmp_path), state(2))


def test_contents_are_synced_before_they_get_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda d: (done.append("sync"), fsync(d)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (done.append("name"), replace(a, b)))
    write_atomically(tmp_path / "file", b"content")
    assert done == ["sync", "name", "sync"]
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
