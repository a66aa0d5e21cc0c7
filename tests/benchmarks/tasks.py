"""What every task of docs/tasks.md gives at ε ≤ 8, without privacy, and trained on the pooled records.

`python tests/benchmarks/tasks.py DATA [NAME ...] [--json] [--seed N] [--write FOLDER]`. DATA holds
banking77/{train,test}.csv, wnut17/{train,test}.conll and xquad/en.json; two tasks need scikit-learn. A row
has the chief metric on public records of

- a baseline: what saying always the same would reach, or the model before tuning;
- the federation at ε ≤ 8, with secure aggregation, and the ε that the run reports;
- the federation without clipping and noise, with secure aggregation;
- plain training of the same adapter and head, by PEFT and torch, on the pooled records.

Three sites, in one row ten. Some minutes of one core for each row. With --write nothing is measured: FOLDER
gets data and configurations, for `confide simulate FOLDER/NAME/private.toml`, and for public.toml beside it
with --insecure-no-privacy.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if TYPE_CHECKING:
    from common.config import RunConfig
    from simulations.fleet import Split

Sections = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Row:
    task: str
    metric: str
    baseline: float
    baseline_of: str
    private: float
    epsilon: float
    federated: float
    plain: float
    seconds: float


def merged(*layers: Sections) -> Sections:
    found: Sections = {}
    for layer in layers:
        for section, keys in layer.items():
            found[section] = {**found.get(section, {}), **keys}
    return found


def configuration(sections: Sections, *, private: bool) -> RunConfig:
    from common.config import parse_config

    fixed: Sections = {
        "run": {"threads": 1, "name": "benchmark"},
        "sites": {"count": 3},
        "evaluation": {"every": 0, "decoded": 0},
    }
    config = parse_config(merged(fixed, sections), source="benchmark", base=Path.cwd())
    off = config.privacy.model_copy(update={"insecure_disabled": not private})
    return config.model_copy(update={"privacy": off})


def federated(sections: Sections, *, private: bool) -> dict[str, Any]:
    """The summary of a simulation: every round through secure aggregation."""
    from common.config import Engine
    from simulations.run import create_folder, prepare, simulate
    from simulations.screen import Silent

    with tempfile.TemporaryDirectory() as folder:
        resolved, _ = prepare(configuration(sections, private=private))
        summary = simulate(create_folder(Path(folder) / "runs", resolved), Engine.INLINE, Silent()).summary
    if not summary["secure_aggregation"] or summary["private"] != private:
        raise SystemExit("the run was not what this row says")
    return summary


def constant(split: Split, config: RunConfig) -> tuple[float, str] | None:
    """The chief metric of the best answer that is always the same, where the task has such a one."""
    from common.config import TaskKind

    labels = list(split.public.label or ())
    match config.task.kind:
        case TaskKind.SEQUENCE_CLASSIFICATION | TaskKind.IMAGE_CLASSIFICATION:
            return max(labels.count(name) for name in set(labels)) / len(labels), "majority"
        case TaskKind.MULTI_LABEL:
            sets = [set(label.split("|")) - {""} for label in labels]
            counts = sorted((sum(name in s for s in sets) for name in split.labels), reverse=True)
            wanted, n = sum(counts), len(sets)
            best = max(2 * sum(counts[:k]) / (k * n + wanted) for k in range(1, len(counts) + 1))
            return best, "best constant set"
        case TaskKind.REGRESSION:
            return 0.0, "a constant"
    return None


def measure(name: str, data: Path, seed: int) -> Row:
    from simulations.fleet import split_data
    from tests.benchmarks.task_peer import plain
    from tests.benchmarks.task_settings import WORKS

    work, began = WORKS[name], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        files = merged(work.write(data, Path(folder)), {"run": {"seed": seed}})
        private = federated(merged(files, work.common, work.private), private=True)
        public = federated(merged(files, work.common, work.public), private=False)
        config = configuration(merged(files, work.common, work.public), private=False)
        peer = plain(configuration(merged(files, work.common, work.public, work.peer), private=False))
        metric = private["metric"]
        before = (private["scores_initial"][metric], "before tuning")
        baseline, of = constant(split_data(config), config) or before
    return Row(
        name,
        metric,
        baseline,
        of,
        private["scores_final"][metric],
        max(private["epsilon_rdp_max"], private["epsilon_pld_max"]),
        public["scores_final"][metric],
        peer[metric],
        round(time.monotonic() - began),
    )


def write(name: str, data: Path, seed: int, folder: Path) -> None:
    """The row's records and its two configurations, with paths relative to `folder`."""
    from tests.benchmarks.task_settings import WORKS

    work = WORKS[name]
    folder.mkdir(parents=True)
    files = merged(work.write(data, folder), {"run": {"seed": seed}})
    for part, settings in (("private", work.private), ("public", work.public)):
        config = configuration(merged(files, work.common, settings), private=True)
        text = tomli_w.dumps(config.model_dump(mode="json", exclude_none=True, exclude_defaults=True))
        (folder / f"{part}.toml").write_text(text.replace(f"{folder}/", ""), "utf-8")


def main() -> None:
    import confide

    confide.settle_environment()
    from tests.benchmarks.task_settings import WORKS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(WORKS)}; none: all")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    parser.add_argument(
        "--seed", type=int, default=0, help="of who has which record, and of the adapter's start"
    )
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="data and configurations of the rows")
    asked = parser.parse_args()
    for name in asked.names or WORKS:
        if asked.write is not None:
            folder = asked.write.resolve() / name.replace(", ", "-").replace(" ", "-")
            write(name, asked.data.resolve(), asked.seed, folder)
            continue
        row = measure(name, asked.data.resolve(), asked.seed)
        text = (
            f"{row.task}: {row.metric} {row.baseline_of} {row.baseline:.3f}, ε = {row.epsilon:.2f} "
            f"{row.private:.3f}, federated {row.federated:.3f}, plain {row.plain:.3f} ({row.seconds:.0f} s)"
        )
        print(json.dumps(asdict(row)) if asked.json else text, flush=True)


if __name__ == "__main__":
    main()
