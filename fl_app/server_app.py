"""The Flower ServerApp: a configuration and a Grid in, a run's folder out."""

from __future__ import annotations

import time

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fl_app.config import from_run_config
from fl_app.federation import run_federation

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that Flower's run config describes."""
    launched_at = float(context.run_config.get("launched-at", time.time()))
    run_federation(from_run_config(context.run_config), grid, launched_at=launched_at)
