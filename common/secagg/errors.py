"""Every way secure aggregation can refuse, one class for each check, and how a peer is blamed.

A client's check carries the number that `docs/protocol.md` gives it: "2.5" is the fifth check of
exchange 2. Whatever fails, the session is over and its secrets are erased, so the advice is the
same for most: start again with a new attempt number and a new update.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import ClassVar

from common.errors import ConfigError, ProtocolError, RoundError


class Exchange(IntEnum):
    """The five exchanges, in order."""

    ADVERTISE = 0
    SHARE = 1
    MASK = 2
    CONSIST = 3
    UNMASK = 4


class CheckError(ProtocolError):
    """A numbered check of a client failed. The session is aborted and its secrets are erased.

    `found` describes public values only (ids, counts, lengths), never a key, a share or an update.
    """

    rule: ClassVar[str] = "the message must follow the protocol"
    advice: ClassVar[str] = "Start a new attempt with a new update."

    def __init__(self, check: str, found: str) -> None:
        self.check = check
        self.found = found
        super().__init__(f"secure aggregation, check {check}: {self.rule}, found {found}. {self.advice}")


# Any exchange


class OutOfOrderError(CheckError):
    """An exchange was asked for that is not the next one, or was asked for twice."""

    rule = "each exchange happens once, in order"


class WrongSessionError(CheckError):
    """A message carries another session's id: a replay, or two servers."""

    rule = "the message must name the session that is open"


class UnsortedIdsError(CheckError):
    """An id list is not strictly ascending, so it repeats an id or hides one."""

    rule = "ids must be strictly ascending"


class NotListedError(CheckError):
    """A list that must contain this site does not."""

    rule = "the list must contain this site"


# Exchange 0, ADVERTISE


class WrongRunError(CheckError):
    """The request names a run that this site has not joined."""

    rule = "the run must be the one this site has joined"
    advice = "Compare the run id in the site's configuration with the server's."


class NotAboveMarkError(CheckError):
    """(round, attempt) is not above the highest one this site has answered: a replay."""

    rule = "(round, attempt) must be above this site's high-water mark"


class NotInRosterError(CheckError):
    """U0 names a site without a pinned key."""

    rule = "every id of U0 must be in the pinned roster"
    advice = "If a site has joined the federation, install the new signed roster at this site."


class CohortOutOfRangeError(CheckError):
    """|U0| is below min_cohort or above n_max."""

    rule = "min_cohort <= |U0| <= n_max"
    advice = "Ask more sites, or fewer; a smaller cohort would not hide one site in the sum."


class RosterMismatchError(CheckError):
    """The server works with another roster than the one pinned here."""

    rule = "the server's roster must be the pinned one"
    advice = "Install the same signed roster on both sides."


class PolicyMismatchError(CheckError):
    """The server works with another aggregation policy than the one pinned here."""

    rule = "the server's policy must be the pinned one"
    advice = "Compare the aggregation policy of the site and the server."


class ContextMismatchError(CheckError):
    """The server names another global adapter or training configuration than this site trained on."""

    rule = "the context must be the one this site trained on"
    advice = "The server may have sent different models to different sites; look at its record."


# Exchange 1, SHARE


class NotSubsetError(CheckError):
    """An id list names a site that an earlier list had not."""

    rule = "the list must be a subset of the one before"


class TooFewMembersError(CheckError):
    """Too few sites are left for this site to go on."""

    rule = "enough sites must be left"
    advice = "Nothing was revealed. Start a new attempt with a new update and more sites."


class MalformedPointError(CheckError):
    """A public key is not the canonical encoding of a point."""

    rule = "public keys must be canonical"


class LowOrderPointError(CheckError):
    """A public key has low order: every secret agreed with it would be known to all."""

    rule = "public keys must not be points of low order"


class DuplicateKeyError(CheckError):
    """Two advertisements, or the two halves of one, share a key."""

    rule = "all advertised keys must be distinct"


class BadAdvertisementSignatureError(CheckError):
    """An advertisement is not signed by the key that the roster has for its id."""

    rule = "every advertisement must be signed by its roster key over this session"


class OwnAdvertisementChangedError(CheckError):
    """The server changed what this site had advertised."""

    rule = "this site's own advertisement must come back unchanged"


# Exchange 2, MASK


class WrongCiphertextSetError(CheckError):
    """The ciphertexts do not come from exactly this site's neighbours in U2."""

    rule = "one ciphertext from each neighbour in U2 and no other"


class TooFewSharesError(CheckError):
    """Too few sealed shares could be opened for this site to be of help in unmasking."""

    rule = "at least the threshold of shares must be valid"


class UpdateConsumedError(CheckError):
    """This update was uploaded before: two sums with it, subtracted, could single out another site."""

    rule = "an update is uploaded once"


class WrongVectorError(CheckError):
    """The encoded update has another length or ring than the policy."""

    rule = "the update must be encoded for the pinned policy"


# Exchange 4, UNMASK


class BadSignerSetError(CheckError):
    """The signers are not distinct members of U3."""

    rule = "signers must be distinct members of U3"


class TooFewSignaturesError(CheckError):
    """Fewer than t sites have signed this survivor set."""

    rule = "at least t members of U3 must have signed the same sets"


class BadConsistSignatureError(CheckError):
    """A signature does not stand for the sets that this site has signed: the server told two stories."""

    rule = "every signature must stand for the same session, U1, U2 and U3"


# State


class RollbackError(ProtocolError):
    """The stored state is older than one that this site is known to have written, or not its own."""


# Encoding and messages


class MessageError(ProtocolError):
    """Bytes are not the encoding of the message that was expected."""


class EncodingError(ProtocolError):
    """An update cannot be put into the ring."""


class NonFiniteError(EncodingError):
    """An update holds NaN or an infinity."""


class PolicyError(ConfigError):
    """A policy contradicts itself or would not protect anyone."""


# Server


class ServerOutOfOrderError(ProtocolError):
    """The server's own code called the exchanges in the wrong order."""


class TooFewSitesError(RoundError):
    """A round ended below its threshold. Nothing was revealed."""

    def __init__(self, exchange: Exchange, found: int, needed: int) -> None:
        self.exchange, self.found, self.needed = exchange, found, needed
        super().__init__(
            f"secure aggregation: {found} sites left after {exchange.name}, {needed} needed. "
            "Nothing was revealed and no sum exists; go on with a new attempt."
        )


class CannotRebuildError(RoundError):
    """The shares of one site's secret do not lead to it, so no exact sum exists."""

    def __init__(self, owner: int, why: str) -> None:
        self.owner = owner
        super().__init__(
            f"secure aggregation: the secret of site {owner} cannot be rebuilt ({why}). "
            "The round is aborted; see the blame list, and go on with a new attempt without the sites named."
        )


class Fault(Enum):
    """What a site is blamed for."""

    MALFORMED = "malformed"  # bytes that are not the message asked for
    UNEXPECTED_SENDER = "unexpected-sender"  # not a member of the exchange
    WRONG_SESSION = "wrong-session"  # names another session or another site
    REPEATED = "repeated"  # a second reply to one request; the first counts
    BAD_SIGNATURE = "bad-signature"
    BAD_POINT = "bad-point"  # not canonical, or of low order
    DUPLICATE_KEY = "duplicate-key"  # the key was advertised before
    WRONG_RECIPIENTS = "wrong-recipients"  # sealed shares for others than its neighbours
    UNOPENED_SHARE = "unopened-share"  # a sealed share that its receiver could not open
    WRONG_SIZE = "wrong-size"  # a masked vector of another length or ring
    UNASKED_SHARE = "unasked-share"  # a share of the other kind, or of a stranger
    MISSING_SHARE = "missing-share"
    WRONG_SHARE = "wrong-share"  # a share off the owner's polynomial: its giver or its owner lies
    SUSPECT_SHARE = "suspect-share"  # as before, but too many lie to be sure whose is wrong
    BAD_DEALING = "bad-dealing"  # the shares agree, but not with what their owner had committed to


@dataclass(frozen=True)
class Blame:
    """One fault: `site` did it in `exchange`; `about` is the owner of the share, where there is one."""

    site: int
    exchange: Exchange
    fault: Fault
    about: int | None = None
