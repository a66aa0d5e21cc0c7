"""The sealed store: what dies when, what is damaged how, and a folder that went back in time."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.secagg_state import Closed, Ending, Journal, Shared
from client.store import (
    BLOCK_BYTES,
    SLOT_BYTES,
    DamagedStateError,
    DamagedWitnessError,
    FileStore,
    MissingWitnessError,
    StoreInUseError,
    WaitingUpdate,
    WaitingUpdateError,
    drop_waiting,
    load_waiting,
    save_waiting,
)
from common.errors import ConfideError, ConfigError
from common.secagg import keys
from common.secagg.errors import Exchange, RollbackError, UpdateConsumedError
from common.secagg.keys import Secret
from tests.secagg_world import RUN, Stream, World

ROOT = Path(__file__).resolve().parents[2]
KEY = Secret(bytes(range(32)))
SECRET = b"\xa5" * 32


def open_store(folder: Path, site: int = 1, run: bytes = RUN, key: Secret = KEY) -> FileStore:
    return FileStore(
        folder / "site" / "secagg.state",
        folder / "witness" / "1",
        key=key,
        site=site,
        run=run,
        random_bytes=os.urandom,
    )


def journal(serial: int) -> bytes:
    session = Shared(
        bytes(32), bytes(32), (1, 2), {2: Secret(SECRET)}, {2: Secret(SECRET)}, Secret(SECRET), Secret(SECRET)
    )
    return Journal(RUN, 1, serial, (serial, 0), serial, session).encode()


def save(store: FileStore, *serials: int) -> None:
    with store.lock():
        for serial in serials:
            store.save(journal(serial))


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what is written, not of when: hundreds of syncs take seconds."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


# What is saved


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert store.load() is None
    assert store.witness == 0
    assert not store.path.parent.exists()  # looking leaves nothing behind
    for serial in (1, 2, 3):
        save(store, serial)
        assert store.load() == open_store(tmp_path).load() == journal(serial)
        assert store.witness == open_store(tmp_path).witness == serial
    assert stat.S_IMODE(store.path.parent.stat().st_mode) == 0o700
    assert store.witness_path.stat().st_size == 2 * BLOCK_BYTES


def test_nothing_secret_is_readable_or_shown(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert SECRET[:8] not in path.read_bytes()
    assert SECRET.hex()[:8] not in repr(store) + str(store)
    assert KEY.reveal().hex()[:8] not in repr(store) + str(vars(store))


def test_each_save_is_sealed_anew(tmp_path: Path, no_sync: None) -> None:
    """The same journal never gives the same bytes, so who compares backups learns nothing."""
    sealed = set()
    for place in range(20):
        store = open_store(tmp_path / str(place))
        save(store, 1)
        sealed.add(store.path.read_bytes())
    assert len(sealed) == 20


def test_a_save_is_durable_before_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this order: state file, its folder, witness. At first, folders and the witness's file before."""
    store = open_store(tmp_path)
    synced: list[str] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(Path(f"/proc/self/fd/{descriptor}").resolve().name.strip("."))

    monkeypatch.setattr(os, "fsync", watched)
    process = os.getpid()
    state = [f"secagg.state.{process}.tmp", "site", "1"]
    save(store, 1)
    above = tmp_path.name  # has the names of the two new folders
    assert synced == [above, above, f"1.{process}.tmp", "witness", *state]
    synced.clear()
    save(store, 2)
    assert synced == state


def test_a_store_only_moves_forward(tmp_path: Path, no_sync: None) -> None:
    """Two processes that both went on from save 4 cannot both write save 5."""
    store = open_store(tmp_path)
    save(store, 1, 2, 3, 4, 5)
    before = store.path.read_bytes()
    for serial in (5, 4, 0):
        with pytest.raises(RollbackError, match=f"save {serial} cannot follow save 5"):
            save(open_store(tmp_path), serial)
    assert store.path.read_bytes() == before
    save(store, 6)


def test_what_is_no_journal_is_not_written(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(RollbackError, match="damaged"), store.lock():
        store.save(journal(1)[:-1])
    assert not store.path.exists()


# One at a time


def test_a_store_must_be_locked_to_be_written(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(StoreInUseError, match="lock"):
        store.save(journal(1))
    with store.lock():
        pass
    with pytest.raises(StoreInUseError):
        store.save(journal(1))
    assert store.load() is None


def test_one_process_at_a_time(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    lock = tmp_path / "site" / ".secagg.state.lock"
    script = (
        f"import fcntl, sys; f = open({str(lock)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    with store.lock():
        pass
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StoreInUseError, match="in use"), store.lock():
            pass
        other.kill()  # whoever dies lets go
    save(store, 1)


def test_one_thread_at_a_time(tmp_path: Path) -> None:
    found: list[BaseException] = []

    def other() -> None:
        try:
            with open_store(tmp_path).lock():
                pass
        except StoreInUseError as error:
            found.append(error)

    with open_store(tmp_path).lock():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(found) == 1


# Damage


@pytest.mark.parametrize("what", ["key", "site", "run"])
def test_the_state_of_another_is_refused(what: str, tmp_path: Path, no_sync: None) -> None:
    save(open_store(tmp_path), 1)
    others = {
        "key": open_store(tmp_path, key=Secret(bytes(32))),
        "site": open_store(tmp_path, site=2),
        "run": open_store(tmp_path, run=b"run-8"),
    }
    other = others[what]
    if what != "key":  # the witness says so first; without it, the seal does
        with pytest.raises(DamagedWitnessError):
            other.load()
        other.witness_path.unlink()
    with pytest.raises(DamagedStateError, match=r"local\.key") as caught:
        other.load()
    assert KEY.reveal().hex() not in "".join(traceback.format_exception(caught.value))


def test_state_and_waiting_update_are_not_one_another(tmp_path: Path, no_sync: None) -> None:
    """The same key seals both; their purpose is bound in."""
    store = open_store(tmp_path)
    save(store, 1)
    waiting = tmp_path / "site" / "waiting.update"
    save_waiting(waiting, KEY, update(), os.urandom)
    state, vector = store.path.read_bytes(), waiting.read_bytes()
    store.path.write_bytes(state[:13] + vector[5:])
    with pytest.raises(DamagedStateError):
        store.load()
    waiting.write_bytes(vector[:5] + state[13:])
    with pytest.raises(WaitingUpdateError):
        load_waiting(waiting, KEY)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_changed_state_is_refused(tmp_path: Path, no_sync: None, data: st.DataObject) -> None:
    store = open_store(tmp_path)
    if not store.path.exists():
        save(store, 1)
        shutil.copy(store.path, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != whole[place]))
    store.path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
    with pytest.raises(DamagedStateError, match="cannot be opened"):
        store.load()


def test_a_cut_state_is_refused(tmp_path: Path, no_sync: None) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    whole = store.path.read_bytes()
    for length in (*range(60), len(whole) - 1):
        store.path.write_bytes(whole[:length])
        with pytest.raises(DamagedStateError):
            store.load()
    store.path.write_bytes(whole + b"\0")
    with pytest.raises(DamagedStateError):
        store.load()


def test_a_witness_in_the_site_s_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "site")
    for witness in (tmp_path / "site" / "w", tmp_path / "site" / "deep" / "w", tmp_path / "link" / "w"):
        with pytest.raises(ConfigError, match="outside"):
            FileStore(tmp_path / "site" / "s", witness, key=KEY, site=1, run=RUN, random_bytes=os.urandom)


def test_a_missing_witness_beside_a_state_is_refused(tmp_path: Path, no_sync: None) -> None:
    store = open_store(tmp_path)
    save(store, 1, 2)
    store.witness_path.unlink()
    asked: list[Callable[[], object]] = [store.load, lambda: store.witness, lambda: save(store, 3)]
    for ask in asked:
        with pytest.raises(MissingWitnessError, match="saved 2 times"):
            ask()
    assert not store.witness_path.exists()


def test_a_state_of_no_saves_needs_no_witness(tmp_path: Path, no_sync: None) -> None:
    store = open_store(tmp_path)
    save(store, 0)
    store.witness_path.unlink()
    assert store.load() == journal(0)
    save(store, 1)
    assert store.witness == 1


def slots(store: FileStore) -> list[bytes]:
    data = store.witness_path.read_bytes()
    return [data[place : place + SLOT_BYTES] for place in (0, BLOCK_BYTES)]


def write_slot(store: FileStore, number: int, data: bytes) -> None:
    with store.witness_path.open("r+b") as file:
        file.seek(number * BLOCK_BYTES)
        file.write(data)


def test_a_torn_witness_counts_as_the_write_that_was_cut_off(tmp_path: Path, no_sync: None) -> None:
    """Wherever it tore, and also where it tore into zeros; and the store goes on."""
    for serial in (1, 2, 3):
        folder = tmp_path / str(serial)
        store = open_store(folder)
        save(store, *range(1, serial))
        before = slots(store) if serial > 1 else [b"", b""]
        save(store, serial)
        after = slots(store)
        torn = next(number for number in (0, 1) if before[number] != after[number])
        for cut in (*range(1, SLOT_BYTES), None):
            start = store.witness_path.read_bytes()
            damage = b"\0" * BLOCK_BYTES if cut is None else after[torn][:cut] + b"\xee" * (SLOT_BYTES - cut)
            write_slot(store, torn, damage)
            assert store.witness == serial, cut
            assert store.load() == journal(serial)
            store.witness_path.write_bytes(start)
        write_slot(store, torn, b"\xee" * SLOT_BYTES)
        save(store, serial + 1)
        assert store.witness == serial + 1
        assert slots(store)[1 - torn] == after[1 - torn]  # what was whole was not written over


def test_a_witness_that_says_nothing_is_refused(tmp_path: Path, no_sync: None) -> None:
    store = open_store(tmp_path)
    save(store, 1, 2)
    whole = store.witness_path.read_bytes()
    swapped = bytes(2 * BLOCK_BYTES)
    for damage in (b"", b"\0", swapped, whole[:7], b"\xff" * 2 * BLOCK_BYTES):
        store.witness_path.write_bytes(damage)
        with pytest.raises(DamagedWitnessError, match="Restore the witness"):
            store.load()
        with pytest.raises(DamagedWitnessError):
            save(store, 3)


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path, no_sync: None) -> None:
    """A half-written state may hold secrets that the site has erased."""
    store = open_store(tmp_path)
    save(store, 1)
    left = store.path.with_name(".secagg.state.99999.tmp")
    left.write_bytes(store.path.read_bytes())
    with store.lock():
        assert not left.exists()
    waiting = tmp_path / "site" / "waiting.update"
    left = waiting.with_name(".waiting.update.99999.tmp")
    left.write_bytes(b"left")
    save_waiting(waiting, KEY, update(), os.urandom)
    assert not left.exists()


# Crashes


class Crash(BaseException):
    """The process ends here."""


@contextlib.contextmanager
def crashing(monkeypatch: pytest.MonkeyPatch, step: int) -> Iterator[list[int]]:
    """Die just before the `step`-th change to the disk."""
    count = [0]

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            count[0] += 1
            if count[0] > step:
                raise Crash
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", counted(os.fsync))
        patch.setattr(os, "pwrite", counted(os.pwrite))
        patch.setattr(Path, "replace", counted(Path.replace))
        patch.setattr(Path, "mkdir", counted(Path.mkdir))
        yield count


def test_a_crash_at_any_step_leaves_a_store_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it the state is the old or the new one, never behind its witness, and the next save works."""
    for serial in (1, 2, 3):
        for step in range(100):
            folder = tmp_path / f"{serial}-{step}"
            save(open_store(folder), *range(1, serial))
            done = False
            with crashing(monkeypatch, step), contextlib.suppress(Crash):
                save(open_store(folder), serial)
                done = True
            store = open_store(folder)
            data = store.load()
            found = 0 if data is None else Journal.decode(data).serial
            assert found == serial if done else found in (serial - 1, serial), (serial, step)
            assert store.witness <= found
            save(store, found + 1)
            assert open_store(folder).load() == journal(found + 1)
            if done:
                break
        else:
            pytest.fail("a save never came to its end")


SAVER = """
import os, sys
from pathlib import Path
from tests.client.test_store import journal, open_store
store = open_store(Path(sys.argv[1]))
serial = store.witness
with store.lock():
    data = store.load()
    while True:
        serial += 1
        store.save(journal(serial))
        os.write(1, serial.to_bytes(8, "little"))
"""


def test_kill_9_in_the_middle_of_saves(tmp_path: Path) -> None:
    """What a process has acknowledged is there after it was killed; the state is never behind its witness."""
    moments = random.Random(5)
    acknowledged, kills = 0, 6
    # One process is forked for each kill, so that importing is paid for once.
    launcher = (
        "import os, sys\n"
        "import tests.client.test_store\n"
        f"code = {SAVER!r}\n"
        "for line in sys.stdin:\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        exec(code)\n"
        "    print(child, file=sys.stderr, flush=True)\n"
        "    os.waitpid(child, 0)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", launcher, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        os.set_blocking(process.stdout.fileno(), False)
        for _ in range(kills):
            process.stdin.write(b"go\n")
            process.stdin.flush()
            child = int(process.stderr.readline())
            said, until = b"", time.monotonic() + 30
            while len(said) < 8 * 3 and time.monotonic() < until:
                said += process.stdout.read() or b""
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
            time.sleep(0.05)
            said += process.stdout.read() or b""
            last = int.from_bytes(said[len(said) // 8 * 8 - 8 : len(said) // 8 * 8], "little")
            assert last > acknowledged
            store = open_store(tmp_path)
            data = store.load()
            assert data is not None
            found = Journal.decode(data).serial
            assert last <= found <= last + 1
            assert store.witness <= found
            acknowledged = last
        process.stdin.close()
    save(open_store(tmp_path), found + 1)


# Back in time, with the real client


class Federation:
    """Six sites whose stores are files; site 1's folder can be put back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.world = World(6)
        self.local_keys = {site: Secret(self.world.random(32)) for site in self.world.ids}
        self.restart()

    def store(self, site: int) -> FileStore:
        return FileStore(
            self.folder / str(site) / "secagg.state",
            self.folder / "witnesses" / str(site),
            key=self.local_keys[site],
            site=site,
            run=RUN,
            random_bytes=self.world.random,
        )

    def restart(self, *sites: int) -> None:
        for site in sites or self.world.ids:
            store = self.store(site)
            self.world.stores[site] = store  # type: ignore[assignment]
            self.world.clients[site] = self.world.client(site, witness=store.witness)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for store in self.world.stores.values():
                stack.enter_context(store.lock())  # type: ignore[attr-defined]
            yield

    def run(self, round_number: int) -> None:
        with self.locked():
            self.world.run(self.world.server(round_number))
        self.world.number += 1

    def back_up(self, name: str = "backup") -> None:
        shutil.copytree(self.folder / "1", self.folder / name)

    def restore(self, name: str = "backup") -> None:
        shutil.rmtree(self.folder / "1")
        shutil.copytree(self.folder / name, self.folder / "1")


def test_a_federation_runs_on_files_and_restarts(tmp_path: Path, no_sync: None) -> None:
    federation = Federation(tmp_path)
    for round_number in (1, 2):
        federation.run(round_number)
        federation.restart()
    client = federation.world.clients[1]
    assert client.state == Closed(Ending.DONE)
    assert (client.serial, client.mark, client.consumed) == (10, (2, 0), 2)
    assert federation.store(1).witness == 10


def test_a_restart_between_any_two_exchanges(tmp_path: Path, no_sync: None) -> None:
    federation = Federation(tmp_path)
    world, server = federation.world, federation.world.server()
    for step in (world.advertise, world.share, world.mask, world.consist):
        with federation.locked():
            step(server)
        federation.restart()
    with federation.locked():
        assert world.unmask(server).total.tolist() == world.plain_sum(world.ids)


def test_a_folder_that_went_back_is_noticed_after_a_restart(tmp_path: Path, no_sync: None) -> None:
    federation = Federation(tmp_path)
    federation.run(1)
    federation.back_up()
    federation.run(2)
    federation.restore()
    federation.restart(1)
    client = federation.world.clients[1]
    with federation.locked():
        for ask in (
            lambda: client.serial,
            client.abort,
            lambda: federation.world.run(federation.world.server(3)),
        ):
            with pytest.raises(RollbackError, match=r"saved 10 times.*save 5.*backup.*new run id"):
                ask()
    assert federation.store(1).path.read_bytes() == (tmp_path / "backup" / "secagg.state").read_bytes()


def test_a_folder_that_went_back_is_noticed_while_running(tmp_path: Path, no_sync: None) -> None:
    federation = Federation(tmp_path)
    federation.run(1)
    federation.back_up()
    federation.run(2)
    federation.restore()
    with pytest.raises(RollbackError):
        federation.world.clients[1].serial  # noqa: B018


def test_the_upload_that_a_rollback_is_for_is_refused(tmp_path: Path, no_sync: None) -> None:
    """MASK, restore, MASK again: the second upload of one update is what would single out a site."""
    federation = Federation(tmp_path)
    world, server = federation.world, federation.world.server()
    with federation.locked():
        world.advertise(server)
        world.share(server)
        federation.back_up()
        requests = server.close_share()
        world.clients[1].mask(requests[1], world.update(1))
    federation.restore()
    federation.restart(1)
    with federation.locked(), pytest.raises(RollbackError):
        world.clients[1].mask(requests[1], world.update(1))
    # Pointing the store to a place without a witness does not help.
    elsewhere = FileStore(
        federation.store(1).path,
        tmp_path / "fresh" / "1",
        key=federation.local_keys[1],
        site=1,
        run=RUN,
        random_bytes=os.urandom,
    )
    with pytest.raises(MissingWitnessError):
        elsewhere.load()


def test_a_lost_state_is_noticed(tmp_path: Path, no_sync: None) -> None:
    federation = Federation(tmp_path)
    federation.run(1)
    shutil.rmtree(tmp_path / "1")
    federation.restart(1)
    with pytest.raises(RollbackError, match="missing"):
        federation.world.clients[1].serial  # noqa: B018


def test_a_crash_between_state_and_witness_is_no_rollback(
    tmp_path: Path, no_sync: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = Federation(tmp_path)
    world = federation.world
    federation.run(1)
    with monkeypatch.context() as patch, federation.locked():
        patch.setattr(FileStore, "_write_slot", lambda *_: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            world.advertise(world.server(2))
    federation.restart()
    assert federation.store(1).witness < world.clients[1].serial
    federation.run(3)
    with federation.locked(), pytest.raises(UpdateConsumedError):
        world.number -= 1
        world.run(world.server(4), silent={Exchange.CONSIST: world.ids})


# The update that waits


def update(words: int = 5, bits: int = 32, seed: int = 1, round_number: int = 3) -> WaitingUpdate:
    stream = Stream(seed)
    dtype = np.dtype("<u4" if bits == 32 else "<u2")
    vector = np.frombuffer(stream(words * dtype.itemsize), dtype=dtype)
    return WaitingUpdate(round_number, 7, stream(32), stream(32), vector)


def same(left: WaitingUpdate | None, right: WaitingUpdate) -> bool:
    return (
        left is not None
        and (left.round, left.number, left.context, left.policy_hash)
        == (right.round, right.number, right.context, right.policy_hash)
        and left.vector.dtype == right.vector.dtype
        and np.array_equal(left.vector, right.vector)
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    round_number=st.integers(0, 2**32 - 1),
    number=st.integers(1, 2**64 - 1),
    context=st.binary(min_size=32, max_size=32),
    bits=st.sampled_from([16, 32]),
    words=st.integers(0, 100),
    seed=st.integers(0, 99),
)
def test_a_waiting_update_comes_back(
    round_number: int,
    number: int,
    context: bytes,
    bits: int,
    words: int,
    seed: int,
    tmp_path: Path,
    no_sync: None,
) -> None:
    vector = update(words, bits, seed).vector
    waiting = WaitingUpdate(round_number, number, context, bytes(32), vector)
    path = tmp_path / "site" / "waiting.update"
    save_waiting(path, KEY, waiting, os.urandom)
    found = load_waiting(path, KEY)
    assert found is not None and same(found, waiting)
    assert found.vector.flags.aligned
    assert not found.vector.flags.writeable


def test_an_update_waits_until_it_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "waiting.update"
    assert load_waiting(path, KEY) is None
    save_waiting(path, KEY, update(), os.urandom)
    save_waiting(path, KEY, update(seed=2), os.urandom)
    assert same(load_waiting(path, KEY), update(seed=2))
    drop_waiting(path)
    assert load_waiting(path, KEY) is None
    drop_waiting(path)


def test_a_dropped_update_stays_dropped_after_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "waiting.update"
    save_waiting(path, KEY, update(), os.urandom)
    synced: list[bool] = []
    monkeypatch.setattr(
        os, "fsync", lambda file: synced.append(stat.S_ISDIR(os.fstat(file).st_mode) and not path.exists())
    )
    drop_waiting(path)
    assert synced == [True]


def test_a_strided_vector_is_saved_as_its_numbers(tmp_path: Path) -> None:
    whole = update(10)
    every_second = WaitingUpdate(1, 1, bytes(32), bytes(32), whole.vector[::2])
    save_waiting(tmp_path / "w", KEY, every_second, os.urandom)
    assert same(load_waiting(tmp_path / "w", KEY), every_second)


def test_a_waiting_update_is_sealed_and_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "waiting.update"
    waiting = update(1000)
    save_waiting(path, KEY, waiting, os.urandom)
    assert waiting.vector.tobytes()[:8] not in path.read_bytes()
    assert waiting.context not in path.read_bytes()
    assert repr(waiting) == "WaitingUpdate(round=3, number=7, 1000 words)"
    with pytest.raises(WaitingUpdateError, match="train again") as caught:
        load_waiting(path, Secret(bytes(32)))
    text = "".join(traceback.format_exception(caught.value))
    assert KEY.reveal().hex() not in text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_damaged_waiting_update_says_to_train_again(
    tmp_path: Path, no_sync: None, data: st.DataObject
) -> None:
    path = tmp_path / "waiting.update"
    save_waiting(path, KEY, update(), Stream(9))
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        path.write_bytes(whole[:place])
    else:
        byte = data.draw(st.integers(0, 255).filter(lambda value: value != whole[place]))
        path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
    with pytest.raises(WaitingUpdateError, match="train again"):
        load_waiting(path, KEY)


GOOD_HEADER = (3).to_bytes(4, "little") + (7).to_bytes(8, "little") + bytes(64)
BAD_BODIES = {
    "no_vector_type": GOOD_HEADER,
    "ring_of_8_bits": GOOD_HEADER + (8).to_bytes(4, "little") + bytes(8),
    "half_a_word": GOOD_HEADER + (32).to_bytes(4, "little") + bytes(7),
    "number_zero": GOOD_HEADER[:4] + bytes(72) + (32).to_bytes(4, "little") + bytes(8),
    "empty": b"",
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_well_sealed_body_that_is_no_update_is_refused(name: str, tmp_path: Path) -> None:
    from client.store import WAITING_MAGIC, _waiting_aad

    path = tmp_path / f"bad_{name}"
    path.write_bytes(WAITING_MAGIC + keys.seal_at_rest(KEY, BAD_BODIES[name], _waiting_aad(), os.urandom))
    with pytest.raises(WaitingUpdateError, match="train again"):
        load_waiting(path, KEY)


@pytest.mark.parametrize(
    "change",
    [
        {"round": -1},
        {"round": 2**32},
        {"number": 0},
        {"number": 2**64},
        {"context": bytes(31)},
        {"policy_hash": bytes(33)},
        {"vector": np.zeros((2, 2), "<u4")},
        {"vector": np.zeros(4, "<i4")},
        {"vector": np.zeros(4, "<u8")},
        {"vector": np.zeros(4, ">u4")},
        {"vector": np.zeros(4, "<f4")},
    ],
    ids=str,
)
def test_a_waiting_update_checks_its_fields(change: dict[str, object]) -> None:
    fields: dict[str, object] = {
        "round": 1,
        "number": 1,
        "context": bytes(32),
        "policy_hash": bytes(32),
        "vector": np.zeros(4, "<u4"),
    }
    with pytest.raises(ConfideError):
        WaitingUpdate(**{**fields, **change})  # type: ignore[arg-type]


def test_a_write_of_a_waiting_update_that_fails_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "waiting.update"
    save_waiting(path, KEY, update(), os.urandom)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space"):
            save_waiting(path, KEY, update(seed=2), os.urandom)
    assert same(load_waiting(path, KEY), update())
    assert [left.name for left in tmp_path.iterdir()] == ["waiting.update"]
