"""The coordinator as a Flower ServerApp."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.rounds import Job, Watcher, run


def make_app(open_job: Callable[[Context], Job], watcher: Watcher) -> ServerApp:
    """The Flower app of the job that `open_job` finds; `watcher` sees it go on."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run(open_job(context), grid, watcher)

    return app
