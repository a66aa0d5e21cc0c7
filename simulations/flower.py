"""The two apps for `flwr run .`: the same rounds on Flower's own runtime.

Settings come from the run configuration (pyproject.toml, or `--run-config`): `config`, a confide.toml
(empty: the demo), and `run-dir`, the folder in which runs are kept (empty: confide-runs in the home
folder). Server and sites find the run's folder by Flower's run id.
"""

from __future__ import annotations

import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

import client.app
from client.site import Site
from common.config import Engine, load_config, refuse_study
from server.rounds import run
from simulations.fleet import SimulatedSites, open_fleet
from simulations.run import DEMO, fill_folder, finish, prepare, rehearse
from simulations.screen import Silent


def _folder(context: Context) -> Path:
    runs = str(context.run_config.get("run-dir", "")) or str(Path.home() / "confide-runs")
    return Path(runs).expanduser().resolve() / f"flower-{context.run_id}"


def _open_site(context: Context) -> Site:
    return SimulatedSites(_folder(context))(context)


client_app = client.app.make_app(_open_site)
server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Prepare the run's folder, run all rounds, leave adapter, summary and report there."""
    began = time.monotonic()
    path = _folder(context)
    chosen = str(context.run_config.get("config", ""))
    config = load_config(Path(chosen).expanduser() if chosen else DEMO)
    refuse_study(config)
    resolved, split = prepare(config)
    rehearse(resolved, split)
    path.mkdir(parents=True)
    fill_folder(path, resolved)
    fleet = open_fleet(path)
    end = run(fleet.job(), grid, Silent())
    finish(fleet, end, Engine.RAY, began)
