"""A thousand simulated sites, one round, inline: seconds and memory a site.

`python tests/benchmarks/fleet.py`. Two fleets, of 100 and of 1,000 sites with shards of the same size, in
processes of their own; memory is the peak of each process. Only the shards should make the difference.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
RECORDS_A_SITE = 10


def one(sites: int) -> None:
    """Run one round with `sites` sites; print the figures as JSON."""
    import confide
    from common.config import Engine, parse_config
    from simulations.run import create_folder, prepare, simulate
    from simulations.screen import Silent

    confide.settle_environment()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "train.csv"
        lines = [f"record {i} says {'yes' if i % 2 else 'no'},{i % 2}" for i in range(sites * RECORDS_A_SITE)]
        data.write_text("text,label\n" + "\n".join(lines) + "\n")
        test = Path(folder) / "test.csv"
        test.write_text("text,label\nit says yes,1\nit says no,0\n")
        config = parse_config(
            {
                "run": {"rounds": 1, "name": "fleet"},
                "model": {"name": "sample:all-minilm-l6-v2", "head": "mean", "max_length": 16},
                "adapter": {"layers": [-1]},
                "data": {"train": str(data), "test": str(test)},
                "sites": {"count": sites},
                "privacy": {"sample_rate": 0.5, "target_epsilon": 8.0},
                "training": {"local_steps": 1},
            },
            source="benchmark",
        )
        resolved, _ = prepare(config)
        run = create_folder(Path(folder) / "runs", resolved)
        began = time.monotonic()
        simulate(run, Engine.INLINE, Silent())
        seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak_mib": peak}))


def main() -> None:
    from tests.benchmarks.harness import row, show

    found = {}
    for sites in (100, 1000):
        done = subprocess.run(
            [sys.executable, __file__, "--sites", str(sites)], capture_output=True, text=True, check=True
        )
        found[sites] = json.loads(done.stdout.splitlines()[-1])
    few, many = found[100], found[1000]
    rows = [
        row("1,000 sites, one round, inline: a site", many["seconds"] / 1000, None, "s"),
        row("1,000 sites against 100: a site", many["seconds"] / 1000, few["seconds"] / 100, "s"),
        row("peak memory, 1,000 sites against 100", many["peak_mib"], few["peak_mib"], "MiB"),
    ]
    show(rows, __doc__ or "")


if __name__ == "__main__":
    if "--sites" in sys.argv:
        one(int(sys.argv[-1]))
    else:
        main()
