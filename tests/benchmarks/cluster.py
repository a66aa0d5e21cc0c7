"""A federation of processes: the time of an exchange, and what the demo learns against the inline engine.

    python tests/benchmarks/cluster.py [--json]

Three sites on this machine, over TLS (deploy/local_cluster.py); the inline run has the
same three sites' records. The noise differs, so accuracies do too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["PYTHONPATH"] = str(ROOT)

from tests.e2e.cluster import local_cluster


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    module = local_cluster()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        network = module.Network.best(f"cb{os.getpid() % 10000}")
        with module.demo_cluster(folder / "cluster", 3, network) as (cluster, job):
            cluster.start_all()
            deployed = cluster.wait(job, 1800)
            text = (cluster.job(job) / "stages.jsonl").read_text()
            stages = [json.loads(line) for line in text.splitlines()]
        sets = [part for key in ("sites.count=3", "aggregation.min_cohort=3") for part in ("--set", key)]
        done = subprocess.run(
            [sys.executable, "-m", "confide", "simulate", *sets, "--runs", str(folder / "runs"), "--json"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=True,
        )
        inline = json.loads(done.stdout)
    times = [b["at"] - a["at"] for a, b in itertools.pairwise(stages) if a["round"] == b["round"]]
    rows = [
        {
            "work": "exchange over three sites, median",
            "ours": statistics.median(times),
            "peer": None,
            "unit": "s",
        },
        {
            "work": "demo accuracy, deployed against inline",
            "ours": deployed["accuracy_final"],
            "peer": inline["accuracy_final"],
            "unit": "share",
        },
        {"work": "rounds without a sum", "ours": deployed["rounds_without_sum"], "peer": 0, "unit": "rounds"},
    ]
    for row in rows:
        print(
            json.dumps(row)
            if asked.json
            else f"{row['work']}: {row['ours']} (peer {row['peer']}) {row['unit']}"
        )


if __name__ == "__main__":
    main()
