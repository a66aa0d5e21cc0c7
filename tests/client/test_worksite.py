"""A deployed site from its folder: approval by hash, its own records and budget, and what it refuses."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from client.approval import affordable, approve, review
from client.executor import Worksites
from client.identity import SiteFolder, create_site, load_identity
from client.join import join
from client.ledger import Ledger
from client.policy import STRICT, SitePolicy
from client.settings import SiteSettings
from client.site import Site
from common.bundle import make_bundle, read_bundle
from common.config import RunConfig, parse_config
from common.errors import ConfigError, DataError, PolicyRefusedError, PrivacyError
from common.identity import fingerprint, load_card
from common.kit import make_kit
from common.plan import make_plan, resolve
from common.roster import Member, sign_roster
from common.secagg.keys import IdentityKey
from tests.conftest import LABELS, tiny_config

JOB = "0123456789abcdef"


@dataclass
class Place:
    """A site that has joined, with a budget that just holds the job, and the job's bundle."""

    folder: SiteFolder
    config: RunConfig
    bundle: bytes

    @property
    def digest(self) -> str:
        return read_bundle(self.bundle).digest

    def ledger(self) -> Ledger:
        identity = load_identity(self.folder.identity, None)
        return Ledger(self.folder.ledger, identity, 1, witness=self.folder.witness)

    def approve(self, widen: bool = True) -> None:
        with self.ledger() as ledger:
            found = review(self.folder, self.bundle, ledger)
            approve(self.folder, self.bundle, ledger, found.wider if widen else found.policy)

    def open(self) -> Site:
        self.sites = Worksites(self.folder, None)
        return self.sites.site(self.bundle, self.digest)


@pytest.fixture
def place(tmp_path: Path, bert_folder: Path, data_file: Path) -> Callable[..., Place]:
    def build(records: Path = data_file, open_scope: bool = True, **sections: dict[str, Any]) -> Place:
        given = {"privacy": {"noise_multiplier": 4.0}, "task": {"labels": list(LABELS)}} | sections
        config = resolve(
            tiny_config(bert_folder, data_file, **given), smallest_site=140, labels=LABELS, threads=1
        )
        folder, authority = SiteFolder(tmp_path / "north"), IdentityKey.generate(os.urandom)
        create_site(folder, "north", os.urandom, None, deployed=True)
        members = [Member(1, "north", load_card(folder.card).public)]
        members += [Member(i, f"s{i}", IdentityKey.generate(os.urandom).public) for i in (2, 3)]
        kit = make_kit(sign_roster("study", 1, members, (), authority), "a:1", b"ca", "", "", authority)
        (tmp_path / "kit.tar").write_bytes(kit.tar())
        join(folder, tmp_path / "kit.tar", fingerprint(authority.public))
        folder.settings.write_text(
            f'[data]\nsource = "records"\ntrain = "{records}"\n[machine]\nthreads = 1\n'
        )
        made = Place(folder, config, make_bundle(JOB, config))
        if open_scope:
            plan = make_plan(config)
            with made.ledger() as ledger:
                ledger.open_scope(
                    "records", target_epsilon=plan.target_epsilon, delta=plan.delta, planned=plan.events
                )
        return made

    return build


def test_a_site_opens_an_approved_job(place: Callable[..., Place]) -> None:
    this = place()
    this.approve()
    site = this.open()
    assert (site.run_id, site.bundle, site.scope) == (JOB, this.digest, "records")
    assert site.repeatable_noise is False
    assert site.noise_key(b"c") != site.noise_key(b"c")
    assert len(site.shard) == 160
    assert site.ledger is not None and site.pinned is not None
    assert this.sites.site(this.bundle, this.digest).model is site.model  # warm
    this.sites.close()


def test_nothing_is_opened_before_approval(place: Callable[..., Place]) -> None:
    this = place()
    with pytest.raises(PolicyRefusedError, match="nobody at this site has approved"):
        this.open()


def test_the_approval_is_signed_into_the_ledger(place: Callable[..., Place]) -> None:
    this = place()
    this.approve()
    from client.ledger_view import look

    recorded = look(this.folder).policy
    assert recorded is not None
    assert recorded[1].text == this.folder.policy.read_text()
    assert this.digest in recorded[1].text


def test_a_review_shows_cost_model_and_what_the_policy_refuses(place: Callable[..., Place]) -> None:
    this = place(privacy={"noise_multiplier": 4.0, "sample_rate": 0.2})
    with this.ledger() as ledger:
        found = review(this.folder, this.bundle, ledger)
    assert found.epsilon == make_plan(this.config).epsilon_rdp
    assert found.affordable == 2
    assert any("training.sample_rate allows at most 0.1" in text for text in found.broken)
    assert found.policy.training == STRICT.training
    assert found.wider.training.sample_rate == 0.2
    assert found.wider.run.rounds == STRICT.run.rounds  # what is wide enough stays
    assert not this.folder.policy.read_text().count(found.model)


def test_a_budget_that_does_not_hold_the_job_is_said_before(place: Callable[..., Place]) -> None:
    this = place(open_scope=False)
    plan = make_plan(this.config)
    with this.ledger() as ledger:
        ledger.open_scope("records", target_epsilon=0.25, delta=plan.delta, planned=plan.events)
        found = review(this.folder, this.bundle, ledger)
        assert found.affordable == affordable(plan, ledger.balance("records")) < len(plan.rounds)


def test_records_without_a_budget_are_refused(place: Callable[..., Place]) -> None:
    this = place(open_scope=False)
    with this.ledger() as ledger, pytest.raises(ConfigError, match="confide client scope"):
        review(this.folder, this.bundle, ledger)


def test_columns_that_do_not_fit_the_task_are_refused_before_approval(place: Callable[..., Place]) -> None:
    this = place()
    text = this.folder.settings.read_text()
    this.folder.settings.write_text(text.replace("[machine]", 'label = ""\n[machine]'))
    with this.ledger() as ledger, pytest.raises(ConfigError, match=r"data\.label: .* this site's settings"):
        review(this.folder, this.bundle, ledger)


def test_a_site_s_columns_must_fit_the_job_s_dialogues() -> None:
    """A template went before the column of the dialogues, which was not looked at."""
    sections = {"model": {"name": "m"}, "task": {"kind": "causal-lm", "chat": True}}
    job = parse_config({**sections, "data": {"train": "job.jsonl", "text": "turns"}}, source="a test")

    def applied(**own: str) -> RunConfig:
        data = {"source": "records", "train": "own.jsonl", **own}
        return SiteSettings.model_validate({"data": data}).applied_to(job)

    with pytest.raises(ConfigError, match=r"data\.template: .* this site's settings"):
        applied(template="{a}")
    assert applied(text="messages").data.text == "messages"
    assert applied(prompt="asked", text="answer").data.prompt == "asked"
    assert applied(prompt="").data.prompt is None
    data = {"train": "job.jsonl", "prompt": "turns", "template": "{a} {b}"}
    job = parse_config({**sections, "data": data}, source="a test")
    assert applied(prompt="asked").data.template == "{a} {b}"
    assert applied(text="answer").data.template is None
    assert applied(text="messages", prompt="").data.text == "messages"
    assert applied(template="", prompt="").data.template is None


def test_too_few_records_and_too_large_a_delta_are_refused(
    place: Callable[..., Place], tmp_path: Path
) -> None:
    few = tmp_path / "few.csv"
    few.write_text("text,label\n" + "".join(f"w{i} w1 w2,good\n" for i in range(30)))
    this = place(records=few)
    this.approve()
    with pytest.raises(DataError, match="30 usable records"):
        this.open()
    many = tmp_path / "many.csv"
    many.write_text("text,label\n" + "".join(f"n{i} w{i % 40} w2,good\n" for i in range(1200)))
    this.folder.settings.write_text(f'[data]\nsource = "records"\ntrain = "{many}"\n')
    with pytest.raises(PrivacyError, match="one over this site's records"):
        this.open()


def test_another_source_under_the_same_records_in_memory_is_refused(place: Callable[..., Place]) -> None:
    """The name of the data source decides which budget pays."""
    this = place()
    this.approve()
    this.open()
    this.folder.settings.write_text(this.folder.settings.read_text().replace('"records"', '"others"', 1))
    with pytest.raises(DataError, match="restart the client"):
        this.sites.site(this.bundle, this.digest)
    this.sites.close()


def test_an_approval_that_is_taken_back_counts_at_once(place: Callable[..., Place]) -> None:
    this = place()
    this.approve()
    this.open()
    this.folder.policy.write_text(SitePolicy().to_toml())
    with pytest.raises(PolicyRefusedError):
        this.sites.site(this.bundle, this.digest)
    this.sites.close()


def test_what_a_crash_left_reserved_is_given_back(place: Callable[..., Place]) -> None:
    from common.ledger import Charge
    from common.ledger_replay import State

    this = place()
    this.approve()
    plan = make_plan(this.config)
    with this.ledger() as ledger:
        left = ledger.reserve(Charge("records", JOB, 1, "00" * 32, "m", "p", plan.rounds[0].events))
    site = this.open()
    assert site.ledger is not None
    assert site.ledger.reservation(left.id).state is State.CANCELLED
    this.sites.close()
