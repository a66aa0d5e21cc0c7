"""Who is asked, and what comes back by when."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from common import wire
from common.aggregation import cohort_size
from common.config import RunConfig
from common.errors import ConfideError, ProtocolError, RoundError
from common.ledger_head import SignedHead
from server.receipts import Receipts

# Flower hands over replies in bulk where it polls; between polls the server rests this long.
_POLL_SECONDS = 0.05
MALFORMED = "malformed"
LEDGER = "ledger-went-back"
IMPOSTOR = "another-site"  # it named a site that was not enrolled with its node's key


@dataclass(frozen=True)
class Failure:
    """A site that did not answer as asked: `reason` is a fixed code or what the transport said."""

    site: int
    reason: str
    bytes_down: int


@dataclass(frozen=True)
class Reply:
    site: int
    message: wire.Message
    bytes_up: int
    bytes_down: int
    head: SignedHead | None


def roll_call(
    grid: Grid,
    deadline: float,
    clock: Callable[[], float] = time.monotonic,
    receipts: Receipts | None = None,
    names: Mapping[int, int] | None = None,
    absent: Callable[[int, str], None] = lambda site, reason: None,
    roster: bytes = b"",
) -> dict[int, int]:
    """Site id → node id of every live site. Flower's node ids change between runs; a site's id does not.

    names: node id → the site that was enrolled with that node's key. Then no other node is asked, and none
    answers in another's name; `absent` hears of each that takes no part, and why.
    roster: hash of the server's, so that a site with another one says so before it trains.

    Raises:
        RoundError: without names, two nodes say that they are the same site.
    """
    nodes = sorted(grid.get_node_ids() if names is None else names)
    found: dict[int, int] = {}
    question = wire.Hello(0, roster)
    for answer in exchange(grid, dict.fromkeys(nodes, question), "query.hello", "0", deadline, nodes, clock):
        node = answer.site
        if isinstance(answer, Failure) or not isinstance(answer.message, wire.Hello):
            if names is not None:
                absent(names[node], answer.reason if isinstance(answer, Failure) else MALFORMED)
            continue
        site = answer.message.site
        if names is not None and site != names[node]:
            absent(names[node], IMPOSTOR)
            continue
        if receipts is not None and not receipts.accept(site, answer.head):
            absent(site, LEDGER)
            continue
        if site in found:
            raise RoundError(f"two nodes say that they are site {site}: give each site its own id")
        found[site] = node
    return dict(sorted(found.items()))


def sample(sites: Sequence[int], config: RunConfig, round_number: int) -> list[int]:
    """`server.fraction` of the sites, at least `min_cohort`, drawn anew each round from the public seed.

    Never more than the job was made for: a site that was enrolled later takes its turn with the others.

    The draw depends on seed and round only, so a resumed run asks the same sites. It is no secret, and
    privacy is not amplified by it.

    Raises:
        RoundError: fewer live sites than `min_cohort`.
    """
    least = config.aggregation.min_cohort or 1
    if len(sites) < least:
        raise RoundError(
            f"only {len(sites)} sites are live, fewer than aggregation.min_cohort = {least}: wait for more"
        )
    most = cohort_size(config, config.sites.count)  # the n_max of the sites' policies
    count = min(cohort_size(config, len(sites)), most)
    if count == len(sites):
        return sorted(sites)
    rng = np.random.default_rng([config.run.seed, round_number, 0xC0407])
    return sorted(int(s) for s in rng.choice(np.asarray(sorted(sites)), size=count, replace=False))


def exchange(
    grid: Grid,
    requests: Mapping[int, wire.Message],
    message_type: str,
    group: str,
    deadline: float,
    sites: Sequence[int],
    clock: Callable[[], float] = time.monotonic,
    longest: int = wire.MAX_BYTES,
    receipts: Receipts | None = None,
) -> Iterator[Reply | Failure]:
    """Ask each node of `requests` (node id → message) and yield what comes back, as it comes.

    `sites[i]` is the site behind the i-th node. After `deadline` seconds, nodes that did not answer are
    yielded as failures. Replies are matched by the id of the message that they answer: an error's sender is
    not the node that failed. A secure-aggregation reply may have `longest` bytes.
    `receipts` keeps the head of each site's ledger, and refuses a site whose ledger went back.
    """
    # One encoding for all nodes that are sent the same message.
    records: dict[int, tuple[RecordDict, int]] = {}
    messages, down = [], {}
    for (node, request), site in zip(requests.items(), sites, strict=True):
        if id(request) not in records:
            encoded = wire.encode(request)
            records[id(request)] = encoded, wire.payload_bytes(encoded)
        content, down[site] = records[id(request)]
        messages.append(Message(content, node, message_type, ttl=deadline, group_id=group))
    pushed: list[str] = list(grid.push_messages(messages))
    pushed += [""] * (len(messages) - len(pushed))  # Flower leaves out, or names "", what it could not send
    waiting = {s: site for s, site in zip(pushed, sites, strict=True) if s}
    for sent, site in zip(pushed, sites, strict=True):
        if not sent:
            yield Failure(site, "not-sent", 0)
    end = clock() + deadline
    while waiting:
        arrived = list(grid.pull_messages(list(waiting)))
        for message in arrived:
            answered = message.metadata.reply_to_message_id
            if answered in waiting:
                site = waiting.pop(answered)
                yield _read(site, message, down[site], longest, receipts)
        if not waiting or arrived:
            continue  # while replies keep coming, the deadline waits: inline, sites answer one by one
        if clock() >= end:
            break
        time.sleep(_POLL_SECONDS)
    for site in waiting.values():
        yield Failure(site, "deadline", down[site])


def _read(site: int, message: Message, down: int, longest: int, receipts: Receipts | None) -> Reply | Failure:
    if message.has_error():
        return Failure(site, f"transport-{message.error.code}", down)
    try:
        decoded, head = wire.decode_reply(message.content, longest)
    except ProtocolError:
        return Failure(site, MALFORMED, down)
    except ConfideError as error:
        return Failure(site, type(error).__name__, down)
    if receipts is not None and not receipts.accept(site, head, refusal=isinstance(decoded, wire.Refusal)):
        return Failure(site, LEDGER, down)
    if isinstance(decoded, wire.Refusal):
        return Failure(site, decoded.code.value, down)
    return Reply(site, decoded, wire.payload_bytes(message.content), down, head)
