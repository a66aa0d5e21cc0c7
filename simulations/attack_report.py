"""The page of an attack, for a person who wants to see what privacy bought."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from common.privacy import epsilon_text
from common.report_style import alarm, bullets, figure, page, pairs, safe, table
from simulations.attack import FALSE_POSITIVE_RATES, Attack, Attacked, learnt_less
from simulations.audit_plots import ALARM, FAINT, FIRST, SECOND, Curve, plot, sampled
from simulations.audit_report import EXTRA_STYLE

_DASH = "6 4"


def attack_page(run: Attacked, against: Attacked | None) -> str:
    """`run` under attack, beside `against` where that is given: as a rule the same without privacy."""
    runs = [run, *([against] if against else [])]
    whose = "every site" if run.site is None else f"site {run.site}"
    others = [
        f"{count:,} that {what}"
        for count, what in ((run.held_out, "sites held out"), (run.outsiders - run.held_out, "are public"))
        if count
    ]
    facts = f"{run.members:,} training records of {whose}, against {' and '.join(others)}"
    return page(
        f"{safe(run.name)}: Confide membership attack",
        f'<p class="over">Confide membership attack</p>\n<h1>{safe(run.name)}</h1>\n'
        f'<p class="facts">{facts}</p>\n<p class="verdict">{_attack_verdict(run, against)}</p>\n'
        + _cautions(runs)
        + _attack_tiles(runs)
        + _QUESTION
        + f'<h2>What was found</h2>\n<div class="plots">\n{"".join(_roc_plots(runs))}</div>\n'
        + _attack_table(runs)
        + _attack_limits(run),
        style=EXTRA_STYLE,
    )


def _best(run: Attacked) -> Attack:
    return max(run.attacks, key=lambda attack: attack.auc)


def interval(attack: Attack) -> str:
    return f"{attack.auc:.3f} ({attack.low:.3f} to {attack.high:.3f})"


def _attack_verdict(run: Attacked, against: Attacked | None) -> str:
    best = _best(run)
    if best.low <= 0.5 <= best.high:
        said = "In this run the attack does not tell training records from others"
    elif best.auc > 0.5:
        little = "a little " if best.auc < 0.55 else ""
        said = f"In this run the attack tells training records from others {little}better than a coin"
    else:
        said = "In this run the attack is worse than a coin"
    text = f"{said}: <strong>AUC {interval(best)}</strong>, where guessing gives 0.5."
    if against is not None:
        kind = "with privacy" if against.private else "without privacy"
        text += (
            f" On {safe(against.path.name)}, {kind}, it reaches <strong>{interval(_best(against))}</strong>."
        )
    return text


def _cautions(runs: Sequence[Attacked]) -> str:
    text, notes = "", []
    for run in runs:
        if not run.private and run is runs[0]:
            text += alarm(
                f"<strong>{safe(run.path.name)} claims no privacy.</strong> Nothing limits an attack."
            )
        if not run.control.low <= 0.5 <= run.control.high:
            notes.append(
                f"{safe(run.path.name)}: an adapter that has seen nobody tells the two sets apart as well "
                f"(AUC {interval(run.control)}). So they differ in kind, and the attack by loss measures "
                "that difference too. Read the calibrated attack."
            )
    if len(runs) > 1 and learnt_less(runs[1], runs[0]):
        notes.append(
            f"{safe(runs[1].path.name)} has learnt less than {safe(runs[0].path.name)}: it is right on "
            f"{_rate(runs[1].correct[1])} of the others, against {_rate(runs[0].correct[1])}. What was not "
            "learnt cannot be found, so this is no fair comparison. Without clipping, learning rates must be "
            "far lower."
        )
    if runs[0].shifted:
        notes.append(
            "The public records were not drawn from the sites' records at random (data.test or data.group), "
            "so they may be easier or harder for another reason than not having been trained on. A "
            "<code>sites.holdout</code> gives records of the same kind to compare with."
        )
    return text + (f'<div class="care">{bullets(notes)}</div>\n' if notes else "")


def _attack_tiles(runs: Sequence[Attacked]) -> str:
    items = []
    for run in runs:
        best = _best(run)
        claim = "no claim" if run.epsilon is None else f"ε = {epsilon_text(run.epsilon)}"
        items.append((f"AUC, {safe(run.path.name)}", f"{best.auc:.3f}<small>{claim}</small>"))
        found = best.tpr[FALSE_POSITIVE_RATES[0]]
        items.append(
            (
                f"members found, {safe(run.path.name)}",
                f"{_rate(found)}<small>while 1% of others are accused</small>",
            )
        )
    return pairs(items, "tiles")


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


_QUESTION = """<h2>What was asked</h2>
<div class="box"><p>Given the finished adapter and somebody's record: <strong>was it in the training
data?</strong> </p>
<ul>
<li>A model often does better on what it was trained on. So the attack says “in” where the loss of a
record is low (<em>loss</em>), or has fallen most since training began (<em>calibrated</em>).</li>
<li>How strict to be is a choice: accuse few and miss many, or the other way round. The curves show all
choices. On the diagonal, the attack is a coin.</li>
<li>What counts for a person is the left end: how many members are found while hardly anybody is accused
wrongly. The plot with powers of ten shows it.</li>
<li>Where the run claims an ε, no attack whatever can rise above the red line.</li>
</ul></div>
"""


def _roc_plots(runs: Sequence[Attacked]) -> Iterator[str]:
    curves = []
    for run, color in zip(runs, (FIRST, SECOND), strict=False):
        for attack, dash in zip(run.attacks, ("", _DASH), strict=True):
            if attack.name == "calibrated" and _flat(run.control):
                continue
            label = f"{safe(run.path.name)}, {attack.name}"
            curves.append(Curve(label, attack.fpr_curve, attack.tpr_curve, color, dash))
    low = max(1e-5, 10.0 ** math.floor(math.log10(1 / runs[0].outsiders)))
    line = np.concatenate([[0.0], np.geomspace(low, 1, 200)])
    curves.append(Curve("guessing", line, line, FAINT, "2 3"))
    if runs[0].epsilon is not None:
        limit = sampled(runs[0].max_tpr, line)
        curves.append(
            Curve(f"most that ε = {epsilon_text(runs[0].epsilon)} allows", line, limit, ALARM, "8 3")
        )
    label = "others accused wrongly"
    svg = plot("Members found, all choices", label, curves, (0, 1), (0, 1))
    yield figure("Members found", "share of members found, by share of others accused", svg)
    curves = [replace(c, x=c.x[c.x >= low], y=c.y[c.x >= low]) for c in curves]
    svg = plot("Members found, few accused", label, curves, (low, 1), (low, 1), log=True)
    yield figure("The same by powers of ten", "the left end is where it hurts", svg)


def _flat(control: Attack) -> bool:
    """The start answers everybody alike, so that the calibrated attack is the attack by loss."""
    return control.auc == control.low == control.high == 0.5


def _attack_table(runs: Sequence[Attacked]) -> str:
    columns = [
        ("run", "name"),
        ("attack", "text"),
        ("AUC", ""),
        ("95% interval", ""),
        *((f"found at {rate:.1%} accused", "") for rate in FALSE_POSITIVE_RATES),
    ]
    rows = []
    for run in runs:
        name = safe(run.path.name)
        for attack in (*run.attacks, run.control):
            found = [_rate(attack.tpr[rate]) for rate in FALSE_POSITIVE_RATES]
            between = f"{attack.low:.3f} to {attack.high:.3f}"
            rows.append(("", [name, attack.name, f"{attack.auc:.3f}", between, *found]))
        if run.epsilon is not None:
            most = [_rate(run.max_tpr(rate)) for rate in FALSE_POSITIVE_RATES]
            rows.append(("", [name, f"most that ε = {epsilon_text(run.epsilon)} allows", "", "", *most]))
    means = [("", [safe(r.path.name), *(f"{value:.3f}" for value in (*r.loss, *r.correct))]) for r in runs]
    heads = [
        ("run", "name"),
        ("loss, members", ""),
        ("loss, others", ""),
        ("right, members", ""),
        ("right, others", ""),
    ]
    return (
        "<h2>Numbers</h2>\n"
        + table(columns, rows)
        + '<p class="small">control: the same by the adapter that training started from, which has seen '
        "nobody; exactly 0.5 where it answers everybody alike, and then calibrated is loss. –: too few other "
        "records to measure so low a rate. Intervals: bootstrap over records.</p>\n" + table(heads, means)
    )


def _attack_limits(run: Attacked) -> str:
    claim = (
        f"The guarantee is ε = {epsilon_text(run.epsilon)} at δ = {run.delta:g}, and it holds against "
        "attacks that nobody has thought of yet. At 1% of others accused it allows "
        f"{_rate(run.max_tpr(0.01))} of members to be found at the most; where that is near 100%, the "
        "guarantee alone says little at that point, and the curve only shows that "
        "this attack does not get there."
        if run.epsilon is not None
        else "Without a claim of ε nothing says that a better attack would not find more."
    )
    return (
        '<h2>How to read it</h2>\n<div class="box">'
        + bullets(
            [
                "<strong>An AUC near 0.5 shows</strong> that this simple attack, on the adapter alone, "
                "learns nothing about who was in, on average over the records.",
                "<strong>It does not show</strong> that no attack can. Attackers who see each round's "
                "updates, who train models of their own to compare with, or who look at the few most unusual "
                "records find more. An average hides those few.",
                claim,
                "<strong>An AUC well above 0.5</strong> is memory, if the control lies at 0.5. If the "
                "control lies above as well, members and others differ in kind.",
                "Simple attacks on adapters are weak even where nothing is private, so a low AUC is no "
                "reason to leave privacy out. Whether the noise is there is tested by "
                "<code>confide audit mechanism</code>.",
                "The attack knows which records were in, since a simulation owns all of them. Nobody can run "
                "this on a real federation.",
            ]
        )
        + "</div>\n"
    )
