"""From sites that are ready to the sum of their updates: five exchanges, back to back.

server/secagg.py says what is asked and checks what comes; this module only sends it and keeps the record.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.serverapp import Grid

from common.config import RunConfig
from common.errors import RoundError
from common.secagg.encoding import DecodedSum
from common.secagg.errors import CannotRebuildError, EncodingError, Exchange, TooFewSitesError
from common.secagg.framing import Framed
from common.secagg.messages import (
    AdvertiseReply,
    ConsistReply,
    MaskReply,
    ShareReply,
    UnmaskReply,
    encoded_limit,
)
from common.secagg.policy import Policy, Roster
from server import cohort
from server.receipts import Receipts
from server.record import Attempt, RunFolder, SessionEnd
from server.secagg import SecAggServer, SecureSum


@dataclass
class Gathered:
    """What came of it.

    sum: `None` where every session fell short; nothing is revealed then. fates: of each site that was
    ready, "ok", or in which exchange it was lost and why.
    """

    sum: DecodedSum | None = None
    fates: dict[int, str] = field(default_factory=dict)
    bytes_up: Counter[int] = field(default_factory=Counter)
    bytes_down: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True)
class Gatherer:
    """Sends what server/secagg.py asks, and hands it what comes."""

    grid: Grid
    nodes: Mapping[int, int]  # site → node
    config: RunConfig
    run_id: str
    roster: Roster
    folder: RunFolder
    receipts: Receipts | None
    stage: Callable[[Exchange], None]  # told of each exchange, for people

    def gather(self, policy: Policy, ready: Sequence[int], round_number: int, context: bytes) -> Gathered:
        """The sum over `ready`, or over those of them that stay.

        A session that falls short before any masked vector was sent is tried again, under a new number, with
        those who have answered last: their updates are still unused. After that the round is over.
        """
        result = Gathered(fates=dict.fromkeys(ready, "advertise:too-few"))
        members = sorted(ready)
        for _ in range(self.config.aggregation.attempts):
            if len(members) < policy.min_cohort:
                break
            number = self.folder.next_attempt(round_number)
            self.folder.append(Attempt(round_number, number, members))
            server = SecAggServer(
                policy=policy,
                roster=self.roster,
                run=self.run_id.encode(),
                round_number=round_number,
                attempt=number,
                cohort=members,
                context=context,
                random_bytes=os.urandom,
                threads=self.config.run.threads or 1,
            )
            failure: RoundError | EncodingError | None = None
            survivors: tuple[int, ...] = ()
            try:
                secure = self._session(server, result)
                survivors = secure.survivors
                found = policy.codec.decode_sum(secure.total, len(survivors))
                if found.weight != policy.codec.w_max * len(survivors):  # each has encoded the one weight
                    raise EncodingError(
                        f"the sum of weights must be {policy.codec.w_max * len(survivors)}, found "
                        f"{found.weight}: a site did not follow the encoding. Discard the round."
                    )
                result.sum = found
                result.fates.update(dict.fromkeys(survivors, "ok"))
            except (TooFewSitesError, CannotRebuildError, EncodingError) as error:
                failure = error
            blames = [[b.site, b.exchange.name.lower(), b.fault.name.lower(), b.about] for b in server.blames]
            ending = SessionEnd(round_number, number, _outcome(failure), list(survivors), blames)
            self.folder.append(ending)
            if not isinstance(failure, TooFewSitesError) or failure.exchange > Exchange.SHARE:
                break
            blamed = {blame.site for blame in server.blames}
            members = [site for site in members if site in server.replied - blamed]
        return result

    def _session(self, server: SecAggServer, result: Gathered) -> SecureSum:
        opening = server.advertise_request()
        self._exchange(server, result, dict.fromkeys(server.asked, opening), server.take_advertisement)
        keys = server.close_advertise()
        self._exchange(server, result, dict.fromkeys(server.asked, keys), server.take_shares)
        sealed = server.close_share()
        self._exchange(server, result, sealed, server.take_masked)
        survivors = server.close_mask()
        self._exchange(server, result, dict.fromkeys(server.asked, survivors), server.take_signature)
        signatures = server.close_consist()
        self._exchange(server, result, dict.fromkeys(server.asked, signatures), server.take_unmask)
        return server.close_unmask()

    def _exchange(
        self,
        server: SecAggServer,
        result: Gathered,
        requests: Mapping[int, Framed],
        take: Callable[[int, Any], bool],
    ) -> None:
        """One exchange: each reply goes into the state machine as it comes, and is dropped."""
        exchange = Exchange(server.stage)
        self.stage(exchange)
        policy, kind = server.policy, _REPLIES[exchange]
        answers = cohort.exchange(
            self.grid,
            {self.nodes[site]: request for site, request in requests.items()},
            f"query.{exchange.name.lower()}",
            str(server.request.round),
            self.config.aggregation.deadline_seconds,
            list(requests),
            longest=encoded_limit(kind, policy.n_max, policy.words, policy.ring_bits),
            receipts=self.receipts,
        )
        for answer in answers:
            result.bytes_down[answer.site] += answer.bytes_down
            reason = "too-few"  # what is said if the session ends here; the next exchange says more
            if isinstance(answer, cohort.Failure):
                reason = answer.reason
                if reason == cohort.MALFORMED:
                    server.report(answer.site)
            else:
                result.bytes_up[answer.site] += answer.bytes_up
                if not isinstance(answer.message, kind):
                    reason = cohort.MALFORMED
                    server.report(answer.site)
                elif not take(answer.site, answer.message):
                    reason = cohort.MALFORMED
            result.fates[answer.site] = f"{exchange.name.lower()}:{reason}"


def _outcome(failure: RoundError | EncodingError | None) -> str:
    match failure:
        case None:
            return "sum"
        case TooFewSitesError():
            return f"{failure.exchange.name.lower()}: {failure.found} sites left, {failure.needed} needed"
        case CannotRebuildError():
            return f"unmask: the secret of site {failure.owner} cannot be rebuilt"
        case _:
            return "the sum cannot be decoded: a site did not follow the encoding"


_REPLIES: dict[Exchange, type[Framed]] = {
    Exchange.ADVERTISE: AdvertiseReply,
    Exchange.SHARE: ShareReply,
    Exchange.MASK: MaskReply,
    Exchange.CONSIST: ConsistReply,
    Exchange.UNMASK: UnmaskReply,
}
