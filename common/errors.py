"""The error types. Each message says what was expected, what was found, where, and what to do."""

from __future__ import annotations

from enum import Enum


class ConfideError(Exception):
    """Base of every error that a person is meant to read.

    `str(error)` is the whole one-screen message; the command line prints it without a traceback
    and exits with `exit_code`.
    """

    exit_code = 1


class ConfigError(ConfideError):
    """A key of the configuration is unknown, of the wrong type, or out of range."""

    exit_code = 2


class DataError(ConfideError):
    """A data file is missing, malformed, or does not fit the task."""

    exit_code = 3


class CellError(DataError):
    """A value in a data file is not `expected`, which is said in the message, too."""

    def __init__(self, message: str, expected: str) -> None:
        super().__init__(message)
        self.expected = expected


class ModelError(ConfideError):
    """A model cannot be loaded, or an adapter does not fit it."""

    exit_code = 4


class PrivacyError(ConfideError):
    """A privacy precondition does not hold. Nothing was trained and nothing was sent."""

    exit_code = 5


class BudgetError(PrivacyError):
    """A charge would exceed what the site has allowed."""


class PolicyRefusedError(PrivacyError):
    """The site's own rules do not allow what was asked. Nothing was computed, charged or sent."""


class RepeatedRoundError(PrivacyError):
    """The site has answered this round of this run before. Nothing was computed, charged or sent."""


class ProtocolError(ConfideError):
    """A message does not follow the protocol: wrong type, wrong length, wrong order, wrong sender."""

    exit_code = 6


class OtherRosterError(ProtocolError):
    """Server and site do not hold the same roster: no sum could be made, so nothing is trained."""


class CheckpointError(ConfideError):
    """A checkpoint is missing, corrupt, or belongs to another run."""

    exit_code = 7


class RoundError(ConfideError):
    """A round ended without enough sites."""

    exit_code = 8


class ChargedError(ConfideError):
    """Something failed after the site had charged itself. A refusal would say that it had not."""


class StatusCode(Enum):
    """What a site tells the server when it does not do what was asked.

    Fixed codes only: the text of an exception could carry data, so it stays in the site's own log.
    """

    REFUSED_BUDGET = "refused-budget"
    REFUSED_POLICY = "refused-policy"
    REFUSED_PRIVACY = "refused-privacy"
    REFUSED_REPEAT = "refused-repeat"
    REFUSED_PROTOCOL = "refused-protocol"
    REFUSED_ROSTER = "refused-roster"
    REFUSED_CONFIG = "refused-config"
    FAILED_DATA = "failed-data"
    FAILED_MODEL = "failed-model"
    FAILED_INTERNAL = "failed-internal"


def status_of(error: BaseException) -> StatusCode:
    """The fixed code that stands for `error` on the wire."""
    match error:
        case BudgetError():
            return StatusCode.REFUSED_BUDGET
        case PolicyRefusedError():
            return StatusCode.REFUSED_POLICY
        case RepeatedRoundError():
            return StatusCode.REFUSED_REPEAT
        case PrivacyError():
            return StatusCode.REFUSED_PRIVACY
        case OtherRosterError():
            return StatusCode.REFUSED_ROSTER
        case ProtocolError():
            return StatusCode.REFUSED_PROTOCOL
        case ConfigError():
            return StatusCode.REFUSED_CONFIG
        case DataError():
            return StatusCode.FAILED_DATA
        case ModelError():
            return StatusCode.FAILED_MODEL
        case _:
            return StatusCode.FAILED_INTERNAL
