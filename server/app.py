"""The coordinator as a Flower ServerApp."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.rounds import Job, Watcher, run


def make_app(
    open_job: Callable[[Context], Job],
    watcher: Watcher,
    network: Callable[[Grid], Grid] = lambda grid: grid,
) -> ServerApp:
    """The Flower app of the job that `open_job` finds; `watcher` sees it go on.

    `network` stands between the job and Flower's grid: a simulation loses messages there.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run(open_job(context), network(grid), watcher)

    return app
