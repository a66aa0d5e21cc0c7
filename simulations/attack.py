"""`confide audit attack`: can one tell from the final adapter who was in the training data?

The attacker has the exported adapter and the base model, looks at one record at a time, and says "trained on"
where its score is high (Yeom et al. 2018, 1709.01604):

    loss         −loss under the final adapter
    calibrated   loss under the adapter that training started from − loss under the final one, since a record
                 may be easy without having been seen (Watson et al. 2022, 2111.08440)
    control      −loss under the starting adapter, which has seen nobody: what it tells apart is not memory
                 but a difference between the two sets of records

Only a simulation can be attacked like this: it owns every site's records and knows who was in. A report, not
a gate: simple attacks on a final adapter see little even where nothing is private.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peft import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.adapter import Vector, read_vector
from common.errors import CheckpointError, ConfigError, DataError
from common.evaluation import record_scores
from common.models import AdaptedModel, load_model
from common.tasks import Examples, IntArray, make_task
from server.record import RunFolder
from simulations.audit_stats import Floats
from simulations.fleet import Fleet, open_fleet

FALSE_POSITIVE_RATES = (0.01, 0.001)
MOST_RECORDS = 2_000
_ENOUGH = 100  # held-out records, to do without public ones that are of another kind
_RESAMPLES = 1_000
_ROC_POINTS = 400


@dataclass(frozen=True)
class Attack:
    """How well one score tells members from outsiders. Higher scores mean "trained on".

    `low` and `high`: 95% interval of the AUC, bootstrap over records. `tpr`: of the members, the share found
    at a rate of false accusations; `None` where there are too few outsiders to measure that rate.
    `fpr_curve` and `tpr_curve`: the ROC curve, both rising from 0 to 1.
    """

    name: str
    auc: float
    low: float
    high: float
    tpr: Mapping[float, float | None]
    fpr_curve: Floats
    tpr_curve: Floats

    def to_json(self) -> dict[str, Any]:
        tpr = {f"{rate:g}": found for rate, found in self.tpr.items()}
        return {"auc": self.auc, "auc_95_percent": [self.low, self.high], "tpr_at_fpr": tpr}


@dataclass(frozen=True)
class Attacked:
    """One run under attack. `epsilon` is the claim of the worst site, `None` where the run claims nothing."""

    name: str
    path: Path
    private: bool
    epsilon: float | None
    delta: float
    site: int | None  # whose records the members are; None: every site's
    members: int
    outsiders: int
    held_out: int  # of the outsiders, those that sites held out; the others are public
    loss: tuple[float, float]  # mean under the final adapter, of members and of outsiders
    correct: tuple[float, float]  # the same of how right it is
    attacks: tuple[Attack, ...]
    control: Attack
    shifted: bool  # public records are among the outsiders, but were not drawn by chance: they may differ
    records: bytes  # SHA-256 of members and outsiders

    def max_tpr(self, fpr: float) -> float:
        """What the claim allows any attack at all; 1 where there is none."""
        return 1.0 if self.epsilon is None else max_tpr(fpr, self.epsilon, self.delta)

    def to_json(self) -> dict[str, Any]:
        return {
            "run": str(self.path),
            "name": self.name,
            "private": self.private,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "site": self.site,
            "members": self.members,
            "outsiders": self.outsiders,
            "loss": dict(zip(("members", "outsiders"), self.loss, strict=True)),
            "correct": dict(zip(("members", "outsiders"), self.correct, strict=True)),
            "attacks": {attack.name: attack.to_json() for attack in self.attacks},
            "control": self.control.to_json(),
            "max_tpr_at_fpr": {f"{rate:g}": self.max_tpr(rate) for rate in FALSE_POSITIVE_RATES},
        }


def max_tpr(fpr: float, epsilon: float, delta: float) -> float:
    """The most that any attack on an (ε, δ)-DP result finds at `fpr`.

    TPR ≤ min(e^ε·FPR + δ, 1 − e^−ε·(1 − δ − FPR)): Kairouz, Oh & Viswanath 2015, 1311.0776.
    """
    steep = math.exp(min(epsilon, 700.0)) * fpr + delta
    flat = 1 - math.exp(-epsilon) * max(0.0, 1 - delta - fpr)
    return min(1.0, steep, flat)


def judge(name: str, members: Floats, outsiders: Floats, rng: np.random.Generator) -> Attack:
    """The attack that says "trained on" above a threshold, for every threshold."""
    values, places = np.unique(np.concatenate([members, outsiders]), return_inverse=True)
    of_members, of_outsiders = places[: len(members)], places[len(members) :]
    size = len(values)

    def area(inside: Floats, outside: Floats) -> float:
        """Σ over members of the share of outsiders below, ties by half; arguments: counts by value."""
        below = np.cumsum(outside) - outside / 2
        return float((inside * below).sum() / (inside.sum() * outside.sum()))

    def counts(places: IntArray) -> Floats:
        return np.bincount(places, minlength=size).astype(np.float64)

    def again(places: IntArray) -> Floats:
        return counts(places[rng.integers(0, len(places), len(places))])

    inside, outside = counts(of_members), counts(of_outsiders)
    areas = [area(again(of_members), again(of_outsiders)) for _ in range(_RESAMPLES)]
    low, high = np.quantile(areas, [0.025, 0.975])
    fpr, tpr = (np.concatenate([[0.0], np.cumsum(c[::-1]) / c.sum()]) for c in (outside, inside))
    found = {
        rate: float(tpr[fpr <= rate].max()) if rate * len(outsiders) >= 1 else None
        for rate in FALSE_POSITIVE_RATES
    }
    return Attack(name, area(inside, outside), float(low), float(high), found, *_thin(fpr, tpr))


def _thin(fpr: Floats, tpr: Floats) -> tuple[Floats, Floats]:
    """Of a long curve some points all along, and every point at its low end, where the interest is."""
    chosen = np.unique(
        np.concatenate(
            [
                np.arange(min(len(fpr), _ROC_POINTS)),
                np.searchsorted(fpr, np.geomspace(1e-5, 1, _ROC_POINTS)),
                np.linspace(0, len(fpr) - 1, _ROC_POINTS).astype(int),
                [len(fpr) - 1],
            ]
        )
    )
    chosen = chosen[chosen < len(fpr)]
    return fpr[chosen], tpr[chosen]


def attack_run(
    path: Path, *, site: int | None = None, records: int = MOST_RECORDS, seed: int = 0
) -> Attacked:
    """Attack the finished run in `path`; at most `records` of each kind, drawn by `seed`.

    1. Who was in: the training records of `site`, or of every site. Who was not: what sites held out, and the
       public records, unless those were not drawn by chance and sites held out enough.
    2. Losses under the adapter that training started from, and under the exported one.
    3. How well each score tells the two apart.

    Raises:
        CheckpointError: not a finished run. DataError: too few records.
    """
    folder = RunFolder(path)
    config = folder.load_config()
    if not (folder.summary.is_file() and folder.adapter.is_dir()):
        raise CheckpointError(f"{path} is not finished: go on with confide simulate --resume {path}")
    summary = json.loads(folder.summary.read_text("utf-8"))
    rng = np.random.default_rng(seed)
    # The fleet's model may have been trained in this process: the start is read from one of its own.
    fresh = load_model(config, make_task(config.task.kind, config.task.labels, config.task))
    start = read_vector(fresh.parameters, fresh.layout)
    del fresh
    fleet = open_fleet(path.resolve())

    # 1.
    members, held = _members(fleet, site, rng, records)
    apart = config.data.test is not None or bool(config.data.group)
    wanted = 0 if apart and len(held) >= _ENOUGH else max(0, records - len(held))
    public = _some(np.arange(len(fleet.public)), rng, wanted)
    if min(len(members), len(held) + len(public)) < 2:
        raise DataError(f"an attack needs two records of each kind at least ({path})")

    # 2.
    def scores(adapter: Vector) -> tuple[Floats, Floats, tuple[float, float]]:
        model = fleet.model
        inside, right = losses(model, adapter, fleet.examples, members)
        at_sites, held_right = losses(model, adapter, fleet.examples, held)
        elsewhere, public_right = losses(model, adapter, fleet.public, public)
        out = np.concatenate([held_right, public_right])
        return inside, np.concatenate([at_sites, elsewhere]), (float(right.mean()), float(out.mean()))

    base_in, base_out, _ = scores(start)
    final_in, final_out, correct = scores(exported_adapter(fleet.model, folder))

    # 3.
    return Attacked(
        name=config.run.name,
        path=path,
        private=bool(summary["private"]),
        epsilon=summary["epsilon_rdp_max"] if summary["private"] else None,
        delta=summary["delta"],
        site=site,
        members=len(members),
        outsiders=len(held) + len(public),
        held_out=len(held),
        loss=(float(final_in.mean()), float(final_out.mean())),
        correct=correct,
        attacks=(
            judge("loss", -final_in, -final_out, rng),
            judge("calibrated", base_in - final_in, base_out - final_out, rng),
        ),
        control=judge("control", -base_in, -base_out, rng),
        shifted=apart and len(public) > 0,
        records=_digest(fleet, members, held, public),
    )


def _members(
    fleet: Fleet, site: int | None, rng: np.random.Generator, most: int
) -> tuple[IntArray, IntArray]:
    sites, held = fleet.split.sites, fleet.split.held
    if site is None:
        chosen = range(len(sites))
    elif 1 <= site <= len(sites):
        chosen = range(site - 1, site)
    else:
        raise ConfigError(f"--site must lie between 1 and {len(sites)}, found {site}")
    inside = np.concatenate([sites[i] for i in chosen])
    away = np.concatenate([held[i] for i in chosen])
    return _some(inside, rng, most), _some(away, rng, most)


def _some(indices: IntArray, rng: np.random.Generator, most: int) -> IntArray:
    return indices if len(indices) <= most else np.sort(rng.choice(indices, most, replace=False))


def losses(
    model: AdaptedModel, adapter: Vector, examples: Examples, indices: IntArray
) -> tuple[Floats, Floats]:
    """(each record's loss, how right it is), `(n,)`, in the order of `indices`, in evaluation mode."""
    loss, right = np.zeros(len(examples)), np.zeros(len(examples))
    for part, lost, correct in record_scores(model, adapter, examples, indices):
        loss[part], right[part] = lost.cpu().numpy(), correct.cpu().numpy()
    if not np.isfinite(loss[indices]).all():
        raise DataError("a record has a loss that is not finite: the adapter diverged")
    return loss[indices], right[indices]


def exported_adapter(model: AdaptedModel, folder: RunFolder) -> Vector:
    """The vector of RUN/adapter: what people receive is what is attacked.

    Raises:
        CheckpointError: the files do not fit the model.
    """
    try:
        state = load_file(str(folder.adapter / "adapter_model.safetensors"))
        unknown = set_peft_model_state_dict(model.peft, state).unexpected_keys
        if model.head is not None:
            model.head.load_state_dict(load_file(str(folder.adapter / "head.safetensors")))
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{folder.adapter} does not fit the run's model: {error}") from None
    if unknown:
        raise CheckpointError(f"{folder.adapter} has weights that the model lacks: {sorted(unknown)[:3]}")
    return read_vector(model.parameters, model.layout)


def _digest(fleet: Fleet, members: IntArray, held: IntArray, public: IntArray) -> bytes:
    h = hashlib.sha256(b"confide/attack/v1")
    for examples, indices in ((fleet.examples, members), (fleet.examples, held), (fleet.public, public)):
        h.update(len(indices).to_bytes(8, "little"))
        for content in examples.contents(indices):
            h.update(len(content).to_bytes(8, "little") + content)
    return h.digest()


def check_twins(run: Attacked, against: Attacked) -> None:
    """Two runs can be compared when the same records were in, and the same out.

    Raises:
        ConfigError: they were not.
    """
    if run.records != against.records:
        raise ConfigError(
            f"{against.path} cannot be compared with {run.path}: expected the same members and outsiders. "
            "Run both with the same data, tokenizer, sites and run.seed"
        )


def learnt_less(run: Attacked, other: Attacked) -> bool:
    """Whether `run` is clearly worse on records that nobody trained on: then there is less to find in it."""
    return run.correct[1] < other.correct[1] - 0.02
