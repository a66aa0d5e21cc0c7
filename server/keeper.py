"""What is and what should be: the nodes that SuperLink knows, and the one job that runs.

Called every few seconds by `confide server run`. Everything it goes by is on disk, so it may be killed and
started anew at any time; commands such as `enroll` and `submit` only write files and need no server.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from common.bundle import read_bundle
from common.errors import ConfideError
from server.federation import FederationFolder, load_federation
from server.jobs import JobFolder, Wanted, all_jobs
from server.superlink import SuperLink, SuperLinkAwayError

FIRST_WAIT, LONGEST_WAIT = 2.0, 60.0  # seconds before a job that ended by itself is started again
_log = logging.getLogger("confide.keeper")


class Keeper:
    """`look` brings SuperLink's state nearer to what the federation's folder wants. It raises nothing."""

    def __init__(
        self, folder: FederationFolder, superlink: SuperLink, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder = folder
        self._superlink = superlink
        self._clock = clock
        self._digests: dict[str, str] = {}  # job → hash of its bundle
        self._damaged: set[str] = set()
        self._at_work = 0  # the run whose ServerApp was seen at work last
        self._waits: dict[str, float] = {}
        self._due: dict[str, float] = {}
        self._rounds: dict[str, int] = {}  # job → the round that its last start had come from

    def look(self) -> None:
        try:
            self._nodes()
            self._jobs()
        except SuperLinkAwayError as error:
            _log.info("%s", error)
        except Exception:
            _log.exception("the keeper goes on, but could not do its work")

    def _nodes(self) -> None:
        members = load_federation(self._folder).keys
        wanted = {public for public, site in self._folder.nodes().items() if site in members}
        known = {node.public: node.id for node in self._superlink.nodes()}
        for public in sorted(wanted - known.keys()):
            self._superlink.register(public)
            _log.info("node of site %d registered", self._folder.nodes()[public])
        for public in known.keys() - wanted:
            self._superlink.unregister(known[public])
            _log.info("node %d unregistered: its site is no member", known[public])

    def _jobs(self) -> None:
        jobs = [job for job in all_jobs(self._folder) if self._is_whole(job)]
        unfinished = self._superlink.unfinished()
        by_hash = {self._digest(job): job for job in jobs}
        running = None
        for run, digest in unfinished.items():
            job = by_hash.get(digest)
            if job is None or not _should_run(job) or running is not None or self._has_died(run, job):
                _log.info("run %d stopped", run)
                self._superlink.stop(run)
            else:
                running = job
        if running is not None:
            return
        job = next((job for job in jobs if _should_run(job)), None)
        if job is None or self._clock() < self._due.get(job.id, 0.0):
            return
        self._back_off(job)
        run = self._superlink.start(job.bundle.read_bytes())
        _log.info("job %s started as run %d", job.id, run)

    def _has_died(self, run: int, job: JobFolder) -> bool:
        """Whether the run's ServerApp was at work and is no more. SuperLink notices that itself, by
        heartbeats that fail to come, but only after minutes."""
        if job.is_worked_on():
            self._at_work = run
            return False
        return self._at_work == run

    def _is_whole(self, job: JobFolder) -> bool:
        """A damaged job must not stop the others; it waits until somebody has mended it."""
        try:
            self._digest(job)
            job.wants()
        except (ConfideError, OSError) as error:
            if job.id not in self._damaged:
                _log.error("job %s is left out: %s", job.id, error)
            self._damaged.add(job.id)
            return False
        self._damaged.discard(job.id)
        return True

    def _back_off(self, job: JobFolder) -> None:
        """A job that ends again without a round more is given longer and longer."""
        done = max((event.round for event in job.rounds()), default=-1)
        moved = done != self._rounds.get(job.id)
        self._rounds[job.id] = done
        wait = FIRST_WAIT if moved else min(2 * self._waits.get(job.id, FIRST_WAIT), LONGEST_WAIT)
        self._waits[job.id] = wait
        self._due[job.id] = self._clock() + wait

    def _digest(self, job: JobFolder) -> str:
        if job.id not in self._digests:
            self._digests[job.id] = read_bundle(job.bundle.read_bytes()).digest
        return self._digests[job.id]


def _should_run(job: JobFolder) -> bool:
    return job.wants() is Wanted.RUNNING and not job.is_done() and not job.ended.exists()
