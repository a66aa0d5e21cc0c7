"""Who is asked, and what becomes of answers that are late, missing, wrong or in another's name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from common import wire
from common.config import RunConfig, parse_config
from common.errors import RoundError, StatusCode
from server import cohort
from server.cohort import Failure, Reply
from simulations.engines import InlineGrid

Behaviour = Callable[[Message], Message | None]


class Clock:
    """Time that passes only when someone looks at it, so that deadlines take no time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


class FakeGrid(InlineGrid):
    """Every node answers by a function of its own; `None` never answers, a `Late` one after some polls."""

    def __init__(self, nodes: dict[int, Behaviour], *, bulk: bool = True) -> None:
        super().__init__(None, len(nodes))  # type: ignore[arg-type]
        self.nodes = nodes
        self.bulk = bulk
        self.sent: list[Message] = []
        self._due: list[tuple[int, Message]] = []
        self._polls = 0

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for number, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = f"m{len(self.sent)}-{number}"
            ids.append(message.metadata.message_id)
            self.sent.append(message)
            behaviour = self.nodes[message.metadata.dst_node_id]
            reply = behaviour(message)
            if reply is not None:
                self._due.append((self._polls + getattr(behaviour, "late", 0), reply))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self._polls += 1
        ready = [m for due, m in self._due if due < self._polls]
        ready = ready if self.bulk else ready[:1]
        self._due = [(due, m) for due, m in self._due if not any(m is r for r in ready)]
        return ready


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cohort, "_POLL_SECONDS", 0)


def says(answer: wire.Message, late: int = 0) -> Behaviour:
    def reply(message: Message) -> Message:
        return Message(wire.encode(answer), reply_to=message)

    reply.late = late  # type: ignore[attr-defined]
    return reply


def sends(content: RecordDict) -> Behaviour:
    return lambda message: Message(content, reply_to=message)


def fails(code: int) -> Behaviour:
    """As Flower does it: the error comes from node 1, whichever node failed."""

    def reply(message: Message) -> Message:
        answer = Message(Error(code, "the text of an exception"), reply_to=message)
        answer.metadata.__dict__["_src_node_id"] = 1
        return answer

    return reply


def silent(_: Message) -> None:
    return None


def update(site: int) -> wire.PlainUpdate:
    return wire.PlainUpdate(site, 1, "x", np.ones(3, dtype=np.float32))


DOWN = wire.payload_bytes(wire.encode(wire.Hello(0)))


def ask(grid: FakeGrid, deadline: float = 5.0) -> dict[int, Reply | Failure]:
    nodes = list(grid.nodes)
    answers = cohort.exchange(
        grid, dict.fromkeys(nodes, wire.Hello(0)), "query.hello", "1", deadline, nodes, Clock()
    )
    found: dict[int, Reply | Failure] = {}
    for answer in answers:
        assert answer.site not in found, "one answer for each site"
        found[answer.site] = answer
    return found


@pytest.mark.parametrize("bulk", [True, False])
def test_every_site_gets_exactly_one_outcome(bulk: bool) -> None:
    junk = RecordDict({"confide": ConfigRecord({"kind": "update"})})
    found = ask(
        FakeGrid(
            {
                11: says(update(1)),
                12: says(wire.Refusal(2, StatusCode.REFUSED_BUDGET)),
                13: fails(5),
                14: sends(junk),
                15: silent,
                16: says(update(6), late=3),
                17: says(update(7), late=1000),
            },
            bulk=bulk,
        )
    )
    assert list(found.values()) == [found[n] for n in found]
    assert {n: a.reason for n, a in found.items() if isinstance(a, Failure)} == {
        12: "refused-budget",
        13: "transport-5",
        14: "malformed",
        15: "deadline",
        17: "deadline",
    }
    replies = {n: a for n, a in found.items() if isinstance(a, Reply)}
    assert sorted(replies) == [11, 16]
    assert replies[11].bytes_up == wire.payload_bytes(wire.encode(update(1)))


def test_errors_are_mapped_by_the_message_that_they_answer() -> None:
    """All errors claim to come from node 1; node 1 itself answered well."""
    found = ask(FakeGrid({1: says(update(1)), 2: fails(3), 3: fails(4)}))
    assert isinstance(found[1], Reply)
    assert found[2] == Failure(2, "transport-3", DOWN) and found[3] == Failure(3, "transport-4", DOWN)


def test_an_answer_to_another_question_or_a_second_one_is_not_counted() -> None:
    stale = Message(wire.encode(update(1)), 1, "train")
    stale.metadata.__dict__["_message_id"] = "from the round before"
    grid = FakeGrid({1: says(update(1)), 2: silent})
    answer_twice = grid.nodes[1]
    grid.nodes[2] = lambda m: Message(wire.encode(update(2)), reply_to=stale)
    grid._due.append((0, Message(wire.encode(update(9)), reply_to=stale)))
    found = ask(grid)
    assert isinstance(found[1], Reply) and found[2] == Failure(2, "deadline", DOWN)
    again = answer_twice(grid.sent[0])
    assert again is not None
    grid._due.append((0, again))
    assert isinstance(ask(grid)[1], Reply)


def test_messages_that_could_not_be_sent_are_failures() -> None:
    class Lossy(FakeGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            return [m if n > 1 else "" for n, m in enumerate(super().push_messages(messages))]

    grid = Lossy({1: silent, 2: silent, 3: says(update(3))})
    assert sorted(ask(grid)) == [1, 2, 3]


def test_requests_carry_deadline_and_group() -> None:
    grid = FakeGrid({4: says(update(1))})
    ask(grid, deadline=77.0)
    (message,) = grid.sent
    assert (message.metadata.ttl, message.metadata.group_id) == (77.0, "1")
    assert message.metadata.message_type == "query.hello"


def test_one_encoding_serves_all_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    encode = wire.encode
    monkeypatch.setattr(wire, "encode", lambda m: (calls.append(m), encode(m))[1])
    ask(FakeGrid(dict.fromkeys(range(1, 9), silent)))
    assert len(calls) == 1


def test_roll_call_finds_sites_by_what_they_say() -> None:
    grid = FakeGrid(
        {
            30: says(wire.Hello(2)),
            10: says(wire.Hello(7)),
            20: silent,
            40: fails(1),
            50: says(wire.Refusal(0, StatusCode.FAILED_DATA)),
            60: says(update(5)),
        }
    )
    assert cohort.roll_call(grid, 3.0, Clock()) == {2: 30, 7: 10}


def test_two_nodes_of_one_name_are_refused() -> None:
    grid = FakeGrid({1: says(wire.Hello(4)), 2: says(wire.Hello(4))})
    with pytest.raises(RoundError, match="site 4"):
        cohort.roll_call(grid, 3.0, Clock())


def test_a_node_in_another_s_name_takes_no_part() -> None:
    """Deployed, a node is known by the key with which it was enrolled, whatever it says."""
    grid = FakeGrid(
        {
            30: says(wire.Hello(2)),
            10: says(wire.Hello(2)),  # it was enrolled as site 7
            20: silent,
            40: fails(1),
            50: says(wire.Refusal(0, StatusCode.REFUSED_POLICY)),
            60: says(update(5)),
            70: says(wire.Hello(9)),  # enrolled as nobody: not asked
        }
    )
    absent: dict[int, str] = {}
    names = {30: 2, 10: 7, 20: 3, 40: 4, 50: 5, 60: 6}
    found = cohort.roll_call(grid, 3.0, Clock(), names=names, absent=absent.__setitem__)
    assert found == {2: 30}
    assert absent == {
        7: cohort.IMPOSTOR,
        3: "deadline",
        4: "transport-1",
        5: "refused-policy",
        6: cohort.MALFORMED,
    }
    assert {message.metadata.dst_node_id for message in grid.sent} == names.keys()


class TestSampling:
    SITES = (9, 3, 5, 1, 7, 2, 8, 4, 6, 10)

    def config(
        self, fraction: float = 1.0, least: int = 2, seed: int = 0, count: int = len(SITES)
    ) -> RunConfig:
        keys: dict[str, Any] = {
            "run": {"seed": seed},
            "sites": {"count": count},
            "model": {"name": "x"},
            "data": {"sample": "x"},
            "server": {"fraction": fraction},
            "aggregation": {"min_cohort": least},
        }
        return parse_config(keys, source="a test")

    def drawn(self, round_number: int, **changes: Any) -> list[int]:
        return cohort.sample(self.SITES, self.config(**changes), round_number)

    def test_all_by_default_in_order(self) -> None:
        assert self.drawn(1) == sorted(self.SITES)

    @pytest.mark.parametrize(
        ("fraction", "least", "count"), [(0.5, 2, 5), (0.01, 2, 2), (0.2, 7, 7), (1, 10, 10)]
    )
    def test_counts(self, fraction: float, least: int, count: int) -> None:
        drawn = self.drawn(1, fraction=fraction, least=least)
        assert len(drawn) == len(set(drawn)) == count and set(drawn) <= set(self.SITES)
        assert drawn == sorted(drawn)

    def test_a_resumed_run_asks_the_same_sites_and_each_round_others(self) -> None:
        rounds = [self.drawn(n, fraction=0.4) for n in range(1, 40)]
        assert rounds == [self.drawn(n, fraction=0.4) for n in range(1, 40)]
        assert len({tuple(r) for r in rounds}) > 30
        assert rounds != [self.drawn(n, seed=1, fraction=0.4) for n in range(1, 40)]
        counts = np.bincount([site for r in rounds for site in r], minlength=11)[1:]
        assert counts.min() > 5  # nobody is left out

    def test_the_order_of_the_roll_call_does_not_matter(self) -> None:
        config = self.config(fraction=0.4)
        assert cohort.sample(sorted(self.SITES), config, 3) == cohort.sample(self.SITES, config, 3)

    def test_never_more_than_the_job_was_made_for(self) -> None:
        """A site may be enrolled after a job was submitted; the policies that sites signed know no more."""
        rounds = [self.drawn(n, count=9) for n in range(1, 40)]
        assert {len(drawn) for drawn in rounds} == {9}
        assert {site for drawn in rounds for site in drawn} == set(self.SITES)
        assert len(self.drawn(1, fraction=0.8, count=5)) == 4

    def test_too_few_live_sites(self) -> None:
        with pytest.raises(RoundError, match="only 10 sites are live"):
            self.drawn(1, least=11)
