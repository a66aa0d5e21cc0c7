"""The events of a run: whole lines only, and of a round that ran twice the last word."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from common.errors import CheckpointError
from server.record import RoundEvent, RunFolder, SiteRound


def site_round(round_number: int, site: int, status: str = "ok") -> SiteRound:
    return SiteRound(round_number, site, status, 100, 200, [{"steps": 3}] if status == "ok" else [])


def round_event(round_number: int, answered: int = 2) -> RoundEvent:
    return RoundEvent(round_number, "all", 2, 2, answered, True, 0.5, None, 10, 1.25, None)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def test_events_are_read_back_in_order(folder: RunFolder) -> None:
    assert list(folder.read_events()) == []
    events = [round_event(0), site_round(1, 2), site_round(1, 1, "deadline"), round_event(1)]
    for event in events:
        folder.append(event)
    assert list(folder.read_events()) == events
    assert folder.rounds() == [events[0], events[3]]
    assert folder.site_rounds() == [events[2], events[1]]


def test_of_a_round_that_ran_twice_the_last_counts(folder: RunFolder) -> None:
    for event in (site_round(1, 1, "deadline"), site_round(1, 2), site_round(1, 1), round_event(1, 1)):
        folder.append(event)
    folder.append(round_event(1, 2))
    assert folder.site_rounds() == [site_round(1, 1), site_round(1, 2)]
    assert folder.rounds() == [round_event(1, 2)]


def test_a_torn_line_is_left_out_and_cut_off(folder: RunFolder) -> None:
    folder.append(site_round(1, 1))
    folder.append(site_round(1, 2))
    whole = folder.events.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        folder.events.write_bytes(whole[:cut])
        assert list(folder.read_events()) == [site_round(1, 1)]
    folder.repair()
    folder.append(round_event(1))
    assert list(folder.read_events()) == [site_round(1, 1), round_event(1)]


def test_repair_changes_nothing_that_is_whole(folder: RunFolder) -> None:
    folder.repair()
    assert not folder.events.exists()
    folder.append(site_round(1, 1))
    before = folder.events.read_bytes()
    folder.repair()
    assert folder.events.read_bytes() == before


def test_a_damaged_line_is_one_clear_error(folder: RunFolder) -> None:
    folder.events.write_bytes(b"not an event\n")
    with pytest.raises(CheckpointError):
        list(folder.read_events())


def test_metrics_are_a_view_of_the_events(folder: RunFolder) -> None:
    for event in (round_event(1), round_event(0), site_round(1, 1), round_event(1, 1)):
        folder.append(event)
    for _ in range(2):  # written anew each time
        folder.write_metrics()
        with folder.metrics.open(newline="") as file:
            rows = list(csv.DictReader(file))
    assert [(row["round"], row["answered"], row["accuracy"], row["loss"]) for row in rows] == [
        ("0", "2", "0.5", ""),
        ("1", "1", "0.5", ""),
    ]


def test_a_folder_that_is_no_run_says_so(folder: RunFolder) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.toml"):
        folder.load_config()
