"""What sites may have been charged for a round, as the server records it: never less than they were."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from common.errors import StatusCode
from common.plan import RoundPlan
from server.record import ASKED, RunFolder, SiteRound

# Answers that say that nothing was charged; see the order of checks in client/app.py. "refused-repeat" is
# none: the round was charged before, perhaps to a server that died before it could record that.
FREE = frozenset(
    {
        StatusCode.REFUSED_BUDGET.value,
        StatusCode.REFUSED_POLICY.value,
        StatusCode.REFUSED_PRIVACY.value,
        StatusCode.REFUSED_CONFIG.value,
        StatusCode.REFUSED_PROTOCOL.value,
        StatusCode.REFUSED_ROSTER.value,
    }
)


class Trained(Protocol):
    """refused: site → why it is not ready. bytes_up, bytes_down: of each site in this round."""

    @property
    def refused(self) -> Mapping[int, str]: ...
    @property
    def bytes_up(self) -> Mapping[int, int]: ...
    @property
    def bytes_down(self) -> Mapping[int, int]: ...


def owed(folder: RunFolder, number: int) -> frozenset[int]:
    """Who may have been charged for round `number` by a server that died in it: a refusal now is not free."""
    return frozenset(e.site for e in folder.site_rounds() if e.round == number and e.events)


def record_asked(folder: RunFolder, number: int, plan: RoundPlan, asked: Iterable[int]) -> None:
    """Before anything is sent: a site charges itself once it is asked, even if this server never hears of it.
    `record_fates` says how it went; where the server dies before, and does not ask it again, this stays."""
    events = [event.to_json() for event in plan.events]
    for site in asked:
        folder.append(SiteRound(number, site, ASKED, 0, 0, events))


def record_fates(
    folder: RunFolder,
    number: int,
    plan: RoundPlan,
    trained: Trained,
    fates: Mapping[int, str],
    owed: frozenset[int],
) -> None:
    """One line a site. It charges itself before it trains: what is not a refusal may have cost this much."""
    events = [event.to_json() for event in plan.events]
    for site, status in sorted({**trained.refused, **fates}.items()):
        free = site in trained.refused and status in FREE and site not in owed
        up, down = trained.bytes_up.get(site, 0), trained.bytes_down.get(site, 0)
        folder.append(SiteRound(number, site, status, up, down, [] if free else events))
