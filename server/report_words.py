"""What a report says in sentences: the verdict, the warnings, the privacy claim and its limits."""

from __future__ import annotations

from collections import Counter
from typing import Any

from common.privacy import default_delta, epsilon_rdp
from common.report_style import (
    alarm,
    bullets,
    fixed,
    general,
    many,
    number,
    pairs,
    rounded_up,
    safe,
    tally,
)
from server.report_accounts import Run

_SAME = 1e-6  # ε of summary and events may differ by so much
_COPIES = 100  # beyond so many copies of a record an example says nothing


def header(run: Run) -> str:
    s, config = run.summary, run.config
    facts = (
        f"{safe(s.get('task', config.task.kind.value))} with <code>{safe(config.model.name)}</code> · "
        f"{many(config.sites.count, 'site')} · {many(run.rounds[-1].round, 'round')}"
        f"{f', of which {config.warmup.rounds} warm-up' if config.warmup.rounds else ''} · "
        f"seed {config.run.seed} · engine {safe(s.get('engine', 'unknown'))}"
    )
    return (
        f'<p class="over">Confide run report</p>\n<h1>{safe(config.run.name)}</h1>\n'
        f'<p class="facts">{facts}</p>\n<p class="verdict">{_verdict(s)}</p>\n'
    )


def _verdict(s: dict[str, Any]) -> str:
    """The result in a sentence or three, without an opinion."""
    records = number(s.get("records_evaluated"))
    on = f" on {records:,.0f} public records" if records else " on public records"
    if number(s.get("accuracy_final")) is not None:
        what, before, after = capital(chief(s)), s.get("accuracy_initial"), s["accuracy_final"]
    else:
        what, before, after = "Loss", s.get("loss_initial"), s.get("loss_final")
    said = f"{what}{on}: <strong>{fixed(before)} → {fixed(after)}</strong>."
    if number(s.get("majority_class")) is not None:
        said += f" Always saying the commonest label reaches {fixed(s['majority_class'])}."
    if number(s.get("accuracy_worst_site")) is not None:
        said += (
            f" Worst site: {fixed(s['accuracy_worst_site'])} (site {safe(s.get('worst_site'))}, "
            "on records that it held out)."
        )
    return said


def chief(s: dict[str, Any]) -> str:
    """The name of the task's chief metric, which stands in every round as its accuracy."""
    return safe(s.get("metric") or "accuracy")


def capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def banners(run: Run) -> str:
    """Red: what takes a claim away. Amber: what a reader should weigh."""
    config, s = run.config, run.summary
    red = []
    if config.privacy.insecure_disabled:
        red.append("<strong>NOT PRIVATE:</strong> trained without clipping and without noise, for study.")
    if config.study.noise_seed is not None:
        red.append(
            "<strong>NOT PRIVATE:</strong> the noise is keyed by a public number (study.noise_seed = "
            f"{config.study.noise_seed}), so anybody can subtract it. For study."
        )
    if not run.private and not red:
        red.append(
            f"<strong>NOT PRIVATE:</strong> {safe(s.get('privacy_statement', 'no claim was recorded.'))}"
        )
    if s.get("secure_aggregation") is not True:
        red.append(
            "<strong>Updates travelled in the clear (--insecure-plain-updates): the server saw each site's "
            "update.</strong> "
            + (
                "The privacy claimed below holds against the server too: each site added its noise itself."
                if run.private
                else "Nothing kept what they show of the sites' records from it."
            )
        )
    red += disagreements(run)
    notes = _notes(run)
    amber = f'<div class="care">{bullets(notes)}</div>\n' if notes else ""
    return "".join(alarm(text) for text in red) + amber


def disagreements(run: Run) -> list[str]:
    """Where the events do not bear out the summary, or a site went over its budget."""
    low = max(a.epsilon[-1] for a in run.accounts)
    high = max(a.epsilon_at_most for a in run.accounts)
    budget, said = run.config.privacy.target_epsilon, number(run.summary.get("epsilon_rdp_max"))
    found = []
    if said is None and low > 0:
        found.append("the events charge the sites for privacy, but summary.json has no ε.")
    if said is not None and not low - _SAME <= said <= high + _SAME:
        found.append(
            f"the events of the worst site give {rounded_up(low)}, summary.json says {rounded_up(said)}."
        )
    if max(high, said or 0.0) > budget + _SAME:
        found.append(f"a site spent {rounded_up(max(high, said or 0.0))} of a budget of {budget:g}.")
    return [f"<strong>ε does not add up:</strong> {text} Do not rely on the claim." for text in found]


def _notes(run: Run) -> list[str]:
    s, found = run.summary, []
    final, majority = number(s.get("accuracy_final")), number(s.get("majority_class"))
    if final is not None and majority is not None and final <= majority:
        found.append("The adapter is no better than always saying the commonest label.")
    before, after = number(s.get("loss_initial")), number(s.get("loss_final"))
    if before is not None and after is not None and after > before:
        start, rose = number(s.get("accuracy_initial")), f"from {fixed(before)} to {fixed(after)}"
        sure = start is not None and final is not None and final > start
        found.append(
            f"Loss on the public records rose {rose}"
            + (
                ", though accuracy rose too: where the model is wrong it is too sure. Calibrate its "
                "probabilities before you use them."
                if sure
                else "."
            )
        )
    void = [r.round for r in run.rounds if not r.counted]
    if void:
        found.append(
            f"{many(len(void), 'round')} did not count, since there was no sum of at least "
            f"{many(run.config.aggregation.min_cohort or 1, 'site')}. What the sites had spent stays spent."
        )
    failures = sum((a.failures for a in run.accounts), Counter[str]())
    if failures:
        found.append(
            f"{failures.total():,} times of {len(run.parts):,} a site that was asked is not in the sum: "
            f"{tally(failures)}."
        )
    if run.uncertain:
        found.append(
            f"{many(len(run.uncertain), 'site')} may have spent more than the events show: a site charges "
            "itself before it computes, and fails or is late afterwards. The column “ε at most” counts that."
        )
    return found


def tiles(run: Run) -> str:
    s = run.summary
    trained = sum(r.seconds for r in run.rounds)
    claim = "worst site" if run.private else "not private: no claim"
    delta = f'<span class="whole">δ = {general(s.get("delta"))}</span>'
    return pairs(
        [
            (chief(s), f"{fixed(s.get('accuracy_initial'))} → {fixed(s.get('accuracy_final'))}"),
            (
                "worst site",
                f"{fixed(s.get('accuracy_worst_site'))}<small>held-out {chief(s)}, simulation only</small>",
            ),
            (
                "ε (Rényi)",
                f"{rounded_up(s.get('epsilon_rdp_max'))}<small>{claim}; budget "
                f"{general(s.get('target_epsilon'))}, {delta}</small>",
            ),
            (
                "bytes up",
                f"{fixed(s.get('bytes_up_per_site_round'), 0)}<small>per site and round, at most; "
                f"{fixed(s.get('trainable_parameters'), 0)} parameters train</small>",
            ),
            (
                "seconds",
                f"{fixed(s.get('wall_seconds'), 0)}<small>of which rounds {fixed(trained, 0)}</small>",
            ),
        ],
        "tiles",
    )


def privacy(run: Run) -> str:
    """The claim in words, or that there is none."""
    if not run.private:
        return (
            '<h2>Privacy</h2>\n<div class="box"><p><strong>Nothing is claimed of this run.</strong> '
            "Every number on this page, and the adapter itself, may tell about single records.</p></div>\n"
        )
    return (
        f'<h2>Privacy</h2>\n<div class="box"><p>{safe(run.summary.get("privacy_statement", ""))}</p>\n'
        f"{pairs(_claim(run))}<h3>What this does not cover</h3>\n{bullets(_not_covered(run))}</div>\n"
    )


def _claim(run: Run) -> list[tuple[str, str]]:
    settings, warmup, s = run.config.privacy, run.config.warmup, run.summary
    nominal = settings.nominal_records or 1
    chosen = (
        f"the default, min(1e-5, 1/(10 × {nominal:,}))"
        if run.delta == default_delta(nominal)
        else "set in the configuration"
    )
    mechanism = (
        f"DP-SGD: each step takes each record with probability {settings.sample_rate:g} (Poisson), clips its "
        f"gradient to {settings.max_grad_norm:g} and adds Gaussian noise of standard deviation "
        f"{general(settings.noise_multiplier)} × {settings.max_grad_norm:g}"
    )
    if warmup.rounds:
        mechanism += (
            f"; in the warm-up probability {warmup.sample_rate:g}, noise "
            f"{general(warmup.noise_multiplier)} × {settings.max_grad_norm:g}"
        )
    return [
        ("Unit", f"one training {safe(settings.unit.value)} of one site"),
        ("Neighbours", "data sets of which one has one record more than the other (add or remove one)"),
        (
            "Against whom",
            "whoever sees every update of a site, the server included, and whoever receives the adapter "
            f"(trust: {safe(settings.trust.value)}). It holds whatever the other sites do",
        ),
        (
            "ε, enforced",
            f"{rounded_up(s.get('epsilon_rdp_max'))} at the worst site, of a budget of "
            f"{settings.target_epsilon:g}: Rényi accounting over all rounds, warm-up included",
        ),
        (
            "ε, reported",
            f"{rounded_up(s.get('epsilon_pld_max'))} by privacy loss distributions: tighter, never enforced",
        ),
        (
            "δ",
            f"{run.delta:g}: {chosen}. {nominal:,} is the published number of a site's records; a δ of one "
            f"over it ({1 / nominal:.2g}) would already allow publishing a whole record",
        ),
        ("Mechanism", mechanism),
        (
            "Aggregation",
            "secure: masked updates were sent, and the server learnt their sum alone; the claim does not "
            "rest on it"
            if s.get("secure_aggregation") is True
            else "in the clear; the claim allows for that",
        ),
        ("Recomputed", _recomputed(run)),
    ]


def _recomputed(run: Run) -> str:
    low = rounded_up(max(a.epsilon[-1] for a in run.accounts))
    high = rounded_up(max(a.epsilon_at_most for a in run.accounts))
    return (
        (low if low == high else f"between {low} and {high}, since sites failed that may have been charged,")
        + " at the worst site, from events.jsonl when this page was written: "
        + ("<strong>see the warning above</strong>" if disagreements(run) else "summary.json agrees")
    )


def _not_covered(run: Run) -> list[str]:
    history, sites = run.worst_history, run.config.sites.count
    copies = [k for k in sorted({2, sites}) if 1 < k <= sites and k <= _COPIES]
    examples = " and ".join(f"{rounded_up(epsilon_rdp(history * k, run.delta))} at {k} sites" for k in copies)
    lies = f": up to ε = {examples}" if examples else ""
    held = (
        "The accuracy of single sites below is exact, measured by the simulation on records that the sites "
        "held out of training. A deployed site tells nobody such a number."
    )
    return [
        "A record that lies at several sites: what it spends there adds up" + lies + ".",
        "A person who has several records: the claim is for one record. With k of them at a site the general "
        "bound is k·ε, with a δ of k·e<sup>(k−1)ε</sup>·δ.",
        "The public records: accuracy and loss by round are measured on them as they are. They belong to "
        "no site and are not protected.",
        *([held] if run.summary.get("accuracy_by_group") else []),
        "Choices made by looking at earlier runs on the same records, such as tuning: each run spends anew.",
        "That a site failed, and with which code: such a bit is not noised.",
    ]
