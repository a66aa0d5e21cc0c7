"""What a site keeps on disk for secure aggregation, sealed under its local key.

    state     the journal of `client.secagg_state`, replaced whole at every save
    witness   how often the state was saved, in another place than the state
    waiting   the encoded update between training and its upload

A site that went back to an earlier state could answer a round twice, or upload one update twice. Whoever
restores a backup of the site's folder brings an old state back, but not the witness, which is kept outside
of it: the two differ, and the site refuses. The order of writing is state, then witness, so that a crash in
between leaves a state that is ahead, which is fine.

Erasing is what a file system does: the old file is gone by name, and without the local key it is noise.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from client.secagg_state import Journal
from common.errors import CheckpointError, ConfigError
from common.files import sync_folder, write_atomically
from common.identity import make_folder
from common.secagg import keys, transcript
from common.secagg.binary import Reader, Writer
from common.secagg.errors import MessageError, RollbackError
from common.secagg.keys import RandomBytes, Secret
from common.secagg.masks import Ring, ring_dtype, ring_memory
from common.secagg.transcript import HASH_BYTES

LABEL_STATE = b"state at rest"
LABEL_WAITING = b"update at rest"
LABEL_WITNESS = b"witness"
STATE_MAGIC = b"CFSS\x01"
WAITING_MAGIC = b"CFWU\x01"

SLOT_BYTES = 24
"""A serial as u64, then the first 16 bytes of its hash with run and site."""
BLOCK_BYTES = 4096
"""Each slot is in a block of its own: a write that a power cut tears spoils that slot alone."""
MAX_NUMBER = 2**64 - 1
WAITING_HEADER_BYTES = 4 + 8 + 2 * HASH_BYTES + 4  # a multiple of 8, so that the vector is aligned
START_AGAIN = "This site takes no part until a new run id is agreed on."
UNTIL_THEN = "or agree on a new run id: until then this site takes no part."


class DamagedStateError(RollbackError):
    """The stored state cannot be opened: damaged, another site's or run's, or under another key."""


class MissingWitnessError(RollbackError):
    """There is a state, but nothing outside of its folder says how new it must be."""


class DamagedWitnessError(RollbackError):
    """The witness says nothing that could be trusted."""


class StoreInUseError(CheckpointError):
    """Another process works with this site's store, or this one has not locked it."""


class WaitingUpdateError(CheckpointError):
    """The update that waits for its upload cannot be used."""


# State and witness


class FileStore:
    """The `Store` of one site in one run: a sealed file, and a witness elsewhere.

    Args:
        path: the file of the state, in the site's folder. One for each run.
        witness: a file outside that folder, on a path that backups of the folder do not restore.
        key: the site's local key.
        site, run: whose state it is. They are bound into the seal.
        random_bytes: `os.urandom`, for nonces.

    Raises:
        ConfigError: the witness is in the folder of the state.
    """

    def __init__(
        self, path: Path, witness: Path, *, key: Secret, site: int, run: bytes, random_bytes: RandomBytes
    ) -> None:
        if witness.resolve().is_relative_to(path.parent.resolve()):
            raise ConfigError(
                f"the witness must lie outside of {path.parent}, found {witness}: a backup of that folder "
                "would bring it back together with the state, and nobody would notice"
            )
        self.path = path
        self.witness_path = witness
        self._key = key
        self._owner = (run, transcript.id_bytes(site))
        self._random_bytes = random_bytes
        self._locked = False

    def __repr__(self) -> str:
        return f"FileStore({str(self.path)!r})"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Inside: no other process, and nobody else in this one, works with this state. Needed to save.

        Raises:
            StoreInUseError: somebody does.
        """
        make_folder(self.path.parent)
        with (self.path.parent / f".{self.path.name}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise StoreInUseError(
                    f"{self.path} is in use by another process of this site: stop it, or wait for it"
                ) from None
            _remove_leftovers(self.path)
            self._locked = True
            try:
                yield
            finally:
                self._locked = False

    @property
    def witness(self) -> int:
        """The highest serial on record outside of the folder, for `SecAggClient(witness=...)`.

        Raises:
            MissingWitnessError, DamagedWitnessError; DamagedStateError where the state is needed to tell.
        """
        slots = self._read_slots()
        if slots is not None:
            return _newest(self.witness_path, slots)
        state = self._read_state()
        if state is not None and state[0] > 0:
            raise MissingWitnessError(
                f"{self.path} was saved {state[0]} times, but its witness {self.witness_path} is missing: "
                f"whether a newer state was lost cannot be told. Restore the witness, {UNTIL_THEN}"
            )
        return 0

    def load(self) -> bytes | None:
        """What was saved last, or None if nothing ever was.

        Raises:
            DamagedStateError, MissingWitnessError, DamagedWitnessError.
            RollbackError: the state is older than the witness, or gone.
        """
        witness, state = self.witness, self._read_state()
        serial, data = state or (0, None)
        if serial < witness:
            found = "is missing" if state is None else f"is of save {serial}"
            raise RollbackError(
                f"this site's state was saved {witness} times, but {self.path} {found}: it was restored from "
                f"a backup, or lost. The site could now upload an update twice. {START_AGAIN}"
            )
        return data

    def save(self, data: bytes) -> None:
        """Replace what was saved, durably, and then move the witness on.

        data: `Journal.encode`, with a higher serial than any that was saved.

        Raises:
            RollbackError: it has not; nothing is written. StoreInUseError: the store is not locked.
        """
        serial = Journal.decode(data).serial
        if not self._locked:
            raise StoreInUseError(f"{self.path} must be locked while it is written: use FileStore.lock()")
        # 1. Forward only.
        witness = self.witness
        if serial <= witness and witness > 0:
            raise RollbackError(f"{self.path}: save {serial} cannot follow save {witness}. {START_AGAIN}")
        # 2. There is a witness before there is a state, so that a state without one is always suspicious.
        if not self.witness_path.exists():
            make_folder(self.witness_path.parent)
            slot = self._slot(0).ljust(BLOCK_BYTES, b"\0")
            write_atomically(self.witness_path, slot + slot)
        # 3. The state, 4. the witness.
        sealed = keys.seal_at_rest(self._key, data, self._aad(serial), self._random_bytes)
        write_atomically(self.path, STATE_MAGIC + serial.to_bytes(8, "little") + sealed)
        self._write_slot(serial)

    def _read_state(self) -> tuple[int, bytes] | None:
        """(serial, journal). The serial is in the clear, and authenticated."""
        try:
            stored = self.path.read_bytes()
        except FileNotFoundError:
            return None
        start = len(STATE_MAGIC) + 8
        serial = int.from_bytes(stored[len(STATE_MAGIC) : start], "little")
        data = None
        if stored.startswith(STATE_MAGIC):
            data = keys.open_at_rest(self._key, stored[start:], self._aad(serial))
        if data is None:
            raise DamagedStateError(
                f"{self.path} cannot be opened: it is damaged, of another site or run, or under another "
                f"local.key. Restore the key that it was written with, or this very file, {UNTIL_THEN}"
            )
        return serial, data

    def _aad(self, serial: int) -> bytes:
        return transcript.digest(LABEL_STATE, *self._owner, serial.to_bytes(8, "little"))

    def _slot(self, serial: int) -> bytes:
        number = serial.to_bytes(8, "little")
        return number + transcript.digest(LABEL_WITNESS, *self._owner, number)[: SLOT_BYTES - 8]

    def _read_slots(self) -> tuple[int | None, int | None] | None:
        """The serial in each slot, None for one that is torn; None if there is no witness."""
        try:
            file = self.witness_path.open("rb", buffering=0)
        except FileNotFoundError:
            return None
        with file:
            found = [os.pread(file.fileno(), SLOT_BYTES, place) for place in (0, BLOCK_BYTES)]
        serials = [int.from_bytes(slot[:8], "little") for slot in found]
        first, second = (
            serial if slot == self._slot(serial) else None
            for slot, serial in zip(found, serials, strict=True)
        )
        return first, second

    def _write_slot(self, serial: int) -> None:
        """Over the older slot, in place: the newer one stays whole whatever happens meanwhile."""
        first, second = self._read_slots() or (0, 0)
        older = first is None or (second is not None and first <= second)
        with self.witness_path.open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), self._slot(serial), 0 if older else BLOCK_BYTES)
            os.fsync(file.fileno())


def _newest(path: Path, slots: tuple[int | None, int | None]) -> int:
    """A torn slot is a write that was cut off. The state was saved before, so it counts as one more."""
    match slots:
        case (int(first), int(second)):
            return max(first, second)
        case (int(whole), None) | (None, int(whole)):
            return whole + 1
        case _:
            raise DamagedWitnessError(
                f"{path} is damaged or belongs to another site or run: how new this site's state must be "
                f"cannot be told. Restore the witness, {UNTIL_THEN}"
            )


def _remove_leftovers(path: Path) -> None:
    """What a process that was killed while writing has left. Only inside the lock."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink(missing_ok=True)


# The update that waits


@dataclass(frozen=True, eq=False)
class WaitingUpdate:
    """An encoded update between training and MASK.

    number: see `client.secagg_state.Update`. context: hash of what it was trained on. policy_hash: the
    policy that it was encoded for. vector: shape (words,), little-endian u4 or u2.

    Raises:
        WaitingUpdateError: a field has another form.
    """

    round: int
    number: int
    context: bytes
    policy_hash: bytes
    vector: Ring

    def __post_init__(self) -> None:
        if not 0 <= self.round < 2**32 or not 1 <= self.number <= MAX_NUMBER:
            raise WaitingUpdateError(f"round {self.round} or number {self.number} is out of range")
        if len(self.context) != HASH_BYTES or len(self.policy_hash) != HASH_BYTES:
            raise WaitingUpdateError("the context and the policy must be hashes of 32 bytes")
        if self.vector.ndim != 1 or self.vector.dtype not in (ring_dtype(32), ring_dtype(16)):
            raise WaitingUpdateError(
                "the vector must be one-dimensional, of little-endian u4 or u2, found "
                f"{self.vector.dtype} of shape {self.vector.shape}"
            )

    def __repr__(self) -> str:
        return f"WaitingUpdate(round={self.round}, number={self.number}, {len(self.vector)} words)"


def save_waiting(path: Path, key: Secret, waiting: WaitingUpdate, random_bytes: RandomBytes) -> None:
    """Seal the update and write it, durably, over any that waited before. Hold the store's lock."""
    vector = np.ascontiguousarray(waiting.vector)
    writer = Writer().u32(waiting.round).u64(waiting.number).fixed(waiting.context)
    writer.fixed(waiting.policy_hash).u32(8 * vector.itemsize).view(ring_memory(vector))
    sealed = keys.seal_at_rest(key, writer.done(), _waiting_aad(), random_bytes)
    make_folder(path.parent)
    _remove_leftovers(path)
    write_atomically(path, WAITING_MAGIC + sealed)


def load_waiting(path: Path, key: Secret) -> WaitingUpdate | None:
    """The update that waits, its vector read-only, or None if none does.

    Raises:
        WaitingUpdateError: it is damaged, or sealed under another key.
    """
    try:
        stored = path.read_bytes()
    except FileNotFoundError:
        return None
    data = None
    if stored.startswith(WAITING_MAGIC):
        data = keys.open_at_rest(key, stored[len(WAITING_MAGIC) :], _waiting_aad())
    try:
        if data is None:
            raise MessageError("it cannot be opened with this site's local key")
        reader = Reader(data)
        round_number, number = reader.u32(), reader.u64()
        context, policy_hash = reader.fixed(HASH_BYTES), reader.fixed(HASH_BYTES)
        bits = reader.u32()
        rest = reader.view(len(data) - WAITING_HEADER_BYTES)
        vector: Ring = np.frombuffer(rest, dtype=ring_dtype(bits))  # type: ignore[assignment]
        return WaitingUpdate(round_number, number, context, policy_hash, vector)
    except (MessageError, WaitingUpdateError, ValueError) as error:
        raise WaitingUpdateError(
            f"{path}, the update that waits for its upload, is damaged ({error}): remove the file and train "
            "again"
        ) from None


def drop_waiting(path: Path) -> None:
    """Remove the update that waits, durably; nothing happens if none does."""
    try:
        path.unlink()
    except FileNotFoundError:
        return
    sync_folder(path.parent)


def _waiting_aad() -> bytes:
    return transcript.digest(LABEL_WAITING)
