"""The keeper brings SuperLink nearer to what is on disk, whatever was killed in between."""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import itertools
import json
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from client.identity import SiteFolder, create_node_key, create_site, rekey_site
from common.bundle import read_bundle
from common.errors import CheckpointError, ConfigError
from common.identity import load_card, read_private
from server.federation import (
    EnrollmentError,
    FederationFolder,
    create_federation,
    enroll_site,
    renew_node,
    revoke_site,
)
from server.jobs import JobFolder, Standing, Wanted, all_jobs, create_job, find_job, prepare_job, write_fields
from server.keeper import FIRST_WAIT, Keeper
from server.record import RoundEvent
from server.serving import create_serving
from server.superlink import NodeInfo, SuperLinkAwayError
from tests.common.test_bundle import config

CONFIG = """
[task]
labels = ["no", "yes"]
[model]
name = "a-model"
[data]
test = "public.csv"
[privacy]
nominal_records = 100
delta = 1e-3
noise_multiplier = 4.0
[aggregation]
min_cohort = 3
"""


@dataclass
class FakeSuperLink:
    """SuperLink's memory, and whether it answers."""

    known: dict[bytes, int] = field(default_factory=dict)
    runs: dict[int, str] = field(default_factory=dict)
    away: bool = False
    started: list[str] = field(default_factory=list)
    next: int = 1

    def _ask(self) -> None:
        if self.away:
            raise SuperLinkAwayError("away")

    def nodes(self) -> list[NodeInfo]:
        self._ask()
        return [NodeInfo(node, public, "online", "") for public, node in self.known.items()]

    def register(self, public: bytes) -> None:
        self._ask()
        assert public not in self.known
        self.next += 1
        self.known[public] = self.next

    def unregister(self, node: int) -> None:
        self._ask()
        self.known = {public: n for public, n in self.known.items() if n != node}

    def unfinished(self) -> dict[int, str]:
        self._ask()
        return dict(self.runs)

    def start(self, bundle: bytes) -> int:
        self._ask()
        self.next += 1
        self.runs[self.next] = hashlib.sha256(bundle).hexdigest()
        self.started.append(read_bundle(bundle).job)
        return self.next

    def stop(self, run: int) -> None:
        self._ask()
        del self.runs[run]


@dataclass
class World:
    folder: FederationFolder
    link: FakeSuperLink
    config: Path
    now: float = 1000.0

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """As if `confide server run` were killed and started again."""
        self.keeper = Keeper(self.folder, self.link, lambda: self.now)  # type: ignore[arg-type]

    def submit(self) -> JobFolder:
        return create_job(self.folder, self.config, [], os.urandom, 1, lambda _: None)

    def look(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.keeper.look()


@pytest.fixture
def world(tmp_path: Path) -> World:
    folder = FederationFolder(tmp_path / "federation")
    create_federation(folder, "Heart study", os.urandom)
    now = datetime.datetime.now(datetime.UTC)
    create_serving(folder, "Heart study", ["localhost"], 9092, os.urandom, now)
    for name in ("north", "south", "west"):
        place = SiteFolder(tmp_path / name)
        create_site(place, name, os.urandom, None, deployed=True)
        enroll_site(folder, load_card(place.card))
    path = tmp_path / "job.toml"
    path.write_text(CONFIG)
    return World(folder, FakeSuperLink(), path)


# Nodes


def test_every_member_s_node_is_registered_once(world: World) -> None:
    world.look()
    world.look()
    assert set(world.link.known) == set(world.folder.nodes())
    assert len(world.link.known) == 3


def test_a_superlink_that_has_forgotten_is_told_again(world: World) -> None:
    world.look()
    world.link.known.clear()
    world.look()
    assert len(world.link.known) == 3


def test_a_revoked_site_s_node_is_unregistered(world: World) -> None:
    world.look()
    gone = world.folder.node(2).read_bytes()
    revoke_site(world.folder, 2)
    world.look()
    assert gone not in world.link.known
    assert len(world.link.known) == 2


def test_a_node_that_nobody_enrolled_is_unregistered(world: World) -> None:
    world.link.known[b"a stranger's key"] = 99
    world.look()
    assert b"a stranger's key" not in world.link.known


def test_one_node_key_is_not_enrolled_for_two_sites(world: World, tmp_path: Path) -> None:
    from client.identity import load_identity
    from common.identity import make_card

    twin = SiteFolder(tmp_path / "twin")
    create_site(twin, "twin", os.urandom, None, deployed=True)
    stolen = load_card(tmp_path / "north" / "site.pub").node
    card = make_card("twin", load_identity(twin.identity, None), stolen)
    with pytest.raises(EnrollmentError, match="that of site 1 already"):
        enroll_site(world.folder, card)


def test_a_site_s_new_node_takes_the_old_one_s_place_and_nothing_else_changes(
    world: World, tmp_path: Path
) -> None:
    world.look()
    before = world.folder.roster.read_bytes()
    old = world.folder.node(1).read_bytes()
    card = rekey_site(SiteFolder(tmp_path / "north"), os.urandom, None)
    found = renew_node(world.folder, card)
    assert found is not None and (found.id, found.name) == (1, "north")
    world.look()
    assert old not in world.link.known and world.folder.node(1).read_bytes() in world.link.known
    assert len(world.link.known) == 3
    assert world.folder.roster.read_bytes() == before
    assert renew_node(world.folder, card) is None  # it is known already
    assert read_private(tmp_path / "north" / "node.key", 4096).startswith(b"-----BEGIN OPENSSH PRIVATE KEY")


def test_a_new_card_renews_only_its_own_site(world: World, tmp_path: Path) -> None:
    from client.identity import load_identity
    from common.identity import make_card

    north = SiteFolder(tmp_path / "north")
    south = load_card(tmp_path / "south" / "site.pub")
    with pytest.raises(EnrollmentError, match="that of site 2 already"):
        renew_node(world.folder, make_card("north", load_identity(north.identity, None), south.node))
    _, node = create_node_key()
    with pytest.raises(EnrollmentError, match="keeps its name"):
        renew_node(world.folder, make_card("another", load_identity(north.identity, None), node))
    stranger = SiteFolder(tmp_path / "stranger")
    create_site(stranger, "stranger", os.urandom, None, deployed=True)
    assert renew_node(world.folder, load_card(stranger.card)) is None  # it is enrolled instead
    revoke_site(world.folder, 1)
    assert renew_node(world.folder, rekey_site(north, os.urandom, None)) is None  # it does not come back


# Jobs


def test_a_job_is_started_once(world: World) -> None:
    job = world.submit()
    for _ in range(5):
        world.look(100)
    assert world.link.started == [job.id]


def test_jobs_run_one_after_the_other(world: World) -> None:
    first, second = world.submit(), world.submit()
    os.utime(first.bundle, (1, 1))
    world.look()
    assert world.link.started == [first.id]
    world.link.runs.clear()
    write_fields(first.summary, {})
    world.look(100)
    assert world.link.started == [first.id, second.id]


def test_a_run_that_was_lost_is_started_again_under_the_same_bundle(world: World) -> None:
    job = world.submit()
    world.look()
    digest = set(world.link.runs.values())
    world.link.runs.clear()
    world.restart()
    world.look()
    assert world.link.started == [job.id, job.id]
    assert set(world.link.runs.values()) == digest


def test_a_job_that_ends_at_once_is_tried_more_and_more_rarely(world: World) -> None:
    world.submit()
    starts: list[float] = []
    for _ in range(600):
        before = len(world.link.started)
        world.look(1)
        if len(world.link.started) > before:
            starts.append(world.now)
        world.link.runs.clear()
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert gaps[0] >= FIRST_WAIT
    assert gaps == sorted(gaps)
    assert max(gaps) >= 60


def test_a_job_that_gets_on_is_started_again_at_once(world: World) -> None:
    job = world.submit()
    for number in range(5):
        world.look(10)
        job.append(RoundEvent(number, "all", 3, 3, 3, True, None, None, 0, 0.0, None))
        world.link.runs.clear()
    assert len(world.link.started) == 5


def test_what_the_operator_stops_is_stopped_and_goes_on_when_resumed(world: World) -> None:
    job = world.submit()
    world.look()
    job.want(Wanted.STOPPED)
    world.look(100)
    assert not world.link.runs
    assert job.standing(False) is Standing.STOPPED
    job.want(Wanted.RUNNING)
    world.look(100)
    assert world.link.started == [job.id, job.id]


def test_what_has_ended_by_itself_is_not_started_again(world: World) -> None:
    job = world.submit()
    world.look()
    world.link.runs.clear()
    write_fields(job.ended, {"error": "no sums"})
    world.look(1000)
    assert world.link.started == [job.id]
    assert job.standing(False) is Standing.ENDED


def test_a_run_that_no_job_knows_is_stopped(world: World) -> None:
    world.link.runs[5] = "0" * 64
    world.look()
    assert world.link.runs == {}


def test_a_serverapp_that_has_died_is_not_waited_for(world: World) -> None:
    """Flower notices by missing heartbeats, after minutes: meanwhile every site would wait."""
    job = world.submit()
    world.look()
    assert world.link.started == [job.id]
    world.look(60)
    assert world.link.started == [job.id]  # it may still be loading: nothing is known of it
    with job.locked():
        world.look(600)
        assert len(world.link.runs) == 1
    world.look()  # killed: its lock is free
    assert world.link.started == [job.id, job.id]
    world.look(60)
    assert world.link.started == [job.id, job.id]  # the new one is given its time as well
    with job.locked():
        world.restart()  # a keeper that is started anew knows nothing of it
        world.look()
    world.look()
    assert world.link.started == [job.id, job.id, job.id]
    assert len(world.link.runs) == 1


def test_who_looks_whether_a_job_is_worked_on_stops_nobody(world: World) -> None:
    job = world.submit()
    assert not job.is_worked_on()
    with job.locked():
        assert job.is_worked_on()
        with pytest.raises(CheckpointError, match="another process"), job.locked(patience=0.3):
            pass
    with (job.path / ".lock").open("r") as looking:
        fcntl.flock(looking, fcntl.LOCK_EX)
        timer = threading.Timer(0.3, lambda: fcntl.flock(looking, fcntl.LOCK_UN))
        timer.start()
        with job.locked(patience=5):
            assert job.is_worked_on()
        timer.join()


def test_two_runs_of_one_job_become_one(world: World) -> None:
    """A start whose answer was lost: SuperLink has the run, and the keeper does not know of it."""
    job = world.submit()
    digest = hashlib.sha256(job.bundle.read_bytes()).hexdigest()
    world.link.runs = {5: digest, 6: digest}
    world.look()
    assert len(world.link.runs) == 1
    assert world.link.started == []


def test_a_superlink_that_is_away_and_a_damaged_job_stop_nothing(world: World) -> None:
    world.link.away = True
    world.look()
    world.link.away = False
    damaged, missing, empty = world.submit(), world.submit(), world.submit()
    damaged.wanted.write_text("{")
    missing.bundle.unlink()
    empty.bundle.write_bytes(b"")
    whole = world.submit()
    world.look(100)
    assert len(world.link.known) == 3
    assert world.link.started == [whole.id]
    assert {job.id for job in all_jobs(world.folder)} == {damaged.id, missing.id, empty.id, whole.id}
    damaged.want(Wanted.RUNNING)  # mended
    world.link.runs.clear()
    write_fields(whole.ended, {"error": "over"})
    world.look(100)
    assert world.link.started == [whole.id, damaged.id]


# Making one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"test": "x.csv", "train": "y.csv"}}, "site.toml"),
        ({"data": {"sample": "rotten-tomatoes", "test": None}}, "site.toml"),
        ({"data": {"test": None}}, "data.test must name"),
        ({"task": {"labels": []}}, "task.labels must name"),
        ({"privacy": {"nominal_records": None}}, "nominal_records must be set"),
    ],
    ids=["train", "sample", "no test", "no labels", "no nominal records"],
)
def test_what_the_server_cannot_know_must_be_said(change: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare_job(config(**change), 3, 1)


def test_too_few_members_make_no_job(world: World) -> None:
    revoke_site(world.folder, 3)
    with pytest.raises(ConfigError, match="at least 3 sites"):
        world.submit()
    assert all_jobs(world.folder) == []


def test_a_job_that_cannot_run_leaves_nothing(world: World) -> None:
    def fails(_: object) -> None:
        raise ConfigError("no model")

    with pytest.raises(ConfigError, match="no model"):
        create_job(world.folder, world.config, [], os.urandom, 1, fails)
    assert not world.folder.jobs.exists()


def test_a_job_is_found_by_the_beginning_of_its_id(world: World) -> None:
    first, second = world.submit(), world.submit()
    assert find_job(world.folder, first.id).id == first.id
    assert find_job(world.folder, second.id[:8]).id == second.id
    os.utime(first.bundle, (1, 1))
    assert find_job(world.folder, None).id == second.id
    with pytest.raises(ConfigError, match="expected one job"):
        find_job(world.folder, "zz")


def test_a_job_s_configuration_keeps_the_server_s_paths_and_its_bundle_does_not(world: World) -> None:
    job = world.submit()
    assert job.load_config().data.test is not None
    assert read_bundle(job.bundle.read_bytes()).config.data.test is None
    assert json.loads(job.wanted.read_text()) == {"state": "running"}
