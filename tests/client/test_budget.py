"""The spend of a site: on disk before anything is computed, whatever dies, whenever."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.budget import Budget, Charge
from common.errors import BudgetError, PrivacyError
from common.privacy import SampledGaussianEvent, calibrate_noise_multiplier, epsilon_rdp

DELTA = 1e-5
EVENT = SampledGaussianEvent(0.1, 1.0, 5, 0.5, 10)


def charge(round_number: int, attempt: int = 1, event: SampledGaussianEvent = EVENT) -> Charge:
    return Charge(round_number, f"{round_number:04x}{attempt:04x}" * 8, (event,))


def open_budget(path: Path, target: float = 100.0) -> Budget:
    return Budget(path, target_epsilon=target, delta=DELTA)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "site" / "spend.jsonl"


def test_a_charge_is_on_disk_when_reserve_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(path.read_bytes() if path.exists() else b"")

    monkeypatch.setattr(os, "fsync", watched)
    budget = open_budget(path)
    budget.reserve(charge(1), repeatable=False)
    budget.reserve(charge(2), repeatable=False)
    assert path.read_bytes() in synced
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [line["round"] for line in lines] == [1, 2]
    assert [SampledGaussianEvent.from_json(event) for line in lines for event in line["events"]] == [
        EVENT
    ] * 2


def test_the_first_charge_survives_a_power_cut(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new name is on disk only once its folder is."""
    folders: list[bool] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        folders.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    open_budget(path).reserve(charge(1), repeatable=False)
    assert any(folders)


def test_a_charge_that_cannot_be_written_is_no_charge_and_no_permission(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = open_budget(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError):
            budget.reserve(charge(1), repeatable=True)
    budget.reserve(charge(2), repeatable=True)
    assert len(open_budget(path).events) >= len(budget.events) == 1


def test_a_write_cut_short_does_not_spoil_the_next(path: Path) -> None:
    """As on a full disk: ten bytes of a line fit, then no more; later there is room again."""
    budget = open_budget(path)
    budget.reserve(charge(1), repeatable=False)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
    try:
        with pytest.raises(OSError):
            budget.reserve(charge(2), repeatable=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    budget.reserve(charge(2), repeatable=False)
    assert len(open_budget(path).events) == 2


def test_a_torn_tail_is_cut_off_wherever_it_tore(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # hundreds of them take seconds
    budget = open_budget(path)
    for number in (1, 2, 3):
        budget.reserve(charge(number), repeatable=False)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        reopened = open_budget(path)
        acknowledged = whole[:cut].count(b"\n")
        assert len(reopened.events) == acknowledged, cut
        reopened.reserve(charge(9), repeatable=False)
        assert len(open_budget(path).events) == acknowledged + 1, cut


LINE = {"round": 1, "context": "00", "events": [EVENT.to_json()]}
BAD_LINES: dict[str, bytes] = {
    "bad_empty": b"",
    "bad_not_json": b"round 1",
    "bad_not_text": b"\xff\xfe",
    "bad_list": json.dumps([LINE]).encode(),
    "bad_no_event": json.dumps({k: v for k, v in LINE.items() if k != "events"}).encode(),
    "bad_extra_field": json.dumps({**LINE, "note": 1}).encode(),
    "bad_missing_field": json.dumps({k: v for k, v in LINE.items() if k != "context"}).encode(),
    "bad_noise": json.dumps({**LINE, "events": [{**EVENT.to_json(), "noise_multiplier": 0}]}).encode(),
    "bad_event_kind": json.dumps({**LINE, "events": [{**EVENT.to_json(), "mechanism": "none"}]}).encode(),
    "bad_event_null": json.dumps({**LINE, "events": None}).encode(),
}


@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("name", BAD_LINES)
def test_a_line_that_is_no_charge_is_refused(path: Path, name: str, where: str) -> None:
    good = json.dumps(LINE).encode()
    lines = [BAD_LINES[name], good] if where == "first" else [good, BAD_LINES[name]]
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(PrivacyError):
        open_budget(path)
    assert path.read_bytes() == b"\n".join(lines) + b"\n"  # nothing is thrown away


@pytest.mark.parametrize("line", [b"5", b'"text"', b"null"])
def test_a_line_that_is_no_object_is_refused(path: Path, line: bytes) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(line + b"\n")
    with pytest.raises(PrivacyError):
        open_budget(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_damage_never_reads_as_less_than_a_line_less(path: Path, data: st.DataObject) -> None:
    """One byte changed in a file of three charges: refused, or still three events."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = (json.dumps(LINE).encode() + b"\n") * 3
    position = data.draw(st.integers(0, len(whole) - 2))  # the very last newline is a torn tail
    byte = data.draw(st.integers(0, 255))
    path.write_bytes(whole[:position] + bytes([byte]) + whole[position + 1 :])
    with contextlib.suppress(PrivacyError):
        assert len(open_budget(path).events) == 3


def test_repeating_a_repeatable_charge_is_free(path: Path) -> None:
    budget = open_budget(path)
    budget.reserve(charge(1), repeatable=True)
    before = path.read_bytes()
    budget.reserve(charge(1), repeatable=True)
    open_budget(path).reserve(charge(1), repeatable=True)  # also after a crash
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "other",
    [
        charge(2),
        charge(1, attempt=2),
        Charge(1, "another context", (EVENT,)),
        Charge(1, charge(1).context, (SampledGaussianEvent(0.1, 2.0, 5, 0.5, 10),)),
        Charge(1, charge(1).context, (EVENT, EVENT)),
    ],
    ids=["round", "attempt", "context", "event", "events"],
)
def test_anything_else_is_a_charge_of_its_own(path: Path, other: Charge) -> None:
    budget = open_budget(path)
    budget.reserve(charge(1), repeatable=True)
    budget.reserve(other, repeatable=True)
    assert budget.events == open_budget(path).events == [EVENT, *other.events]


def test_fresh_noise_is_charged_each_time(path: Path) -> None:
    budget = open_budget(path)
    for number in (1, 2, 3):
        budget.reserve(charge(1), repeatable=False)
        assert budget.epsilon_rdp == pytest.approx(epsilon_rdp([EVENT] * number, DELTA))
    assert open_budget(path).epsilon_rdp == budget.epsilon_rdp


def test_a_planned_run_fits_to_the_last_round_and_no_further(path: Path) -> None:
    rounds, target = 10, 2.0
    sigma = calibrate_noise_multiplier(target_epsilon=target, delta=DELTA, sample_rate=0.1, steps=rounds * 5)
    event = SampledGaussianEvent(0.1, sigma, 5, 0.5, 10)
    budget = open_budget(path, target)
    for number in range(1, rounds + 1):
        if number == 4:
            budget = open_budget(path, target)  # what was spent is not forgotten
        budget.reserve(charge(number, event=event), repeatable=False)
    assert target * 0.98 < budget.epsilon_rdp <= target
    assert budget.epsilon_pld <= budget.epsilon_rdp
    before = path.read_bytes()
    for again in (budget, open_budget(path, target)):
        with pytest.raises(BudgetError, match="nothing was computed"):
            again.reserve(charge(rounds + 1, event=event), repeatable=False)
        # A repeated charge releases nothing new, so a spent budget does not stop it.
        again.reserve(charge(rounds, event=event), repeatable=True)
    assert path.read_bytes() == before
