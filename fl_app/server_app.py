"""The Flower ServerApp: a configuration and a Grid in, a run's folder out."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fl_app.components import adopt_threads
from fl_app.config import from_run_config
from fl_app.federation import run_federation
from fl_app.population import wait_for_nodes
from fl_app.types import ConfigError, FlAppError

OUTCOME = "FL_APP_OUTCOME"
"""Environment variable: the file in which a launcher wants to be told what came of the run."""

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that Flower's run config describes."""
    launched_at = float(context.run_config.get("launched-at") or time.time())
    _show_log()
    with _telling_the_launcher() as outcome:
        config = from_run_config(context.run_config, connected=wait_for_nodes(grid))
        adopt_threads(config)
        outcome["run_dir"] = str(run_federation(config, grid, launched_at=launched_at))


def _show_log() -> None:
    """Have our log lines shown on stderr, which Flower makes the run's log, if nobody does yet."""
    ours = logging.getLogger("fl_app")
    if not ours.hasHandlers():
        ours.addHandler(logging.StreamHandler())
        ours.setLevel(logging.INFO)


@contextmanager
def _telling_the_launcher() -> Generator[dict[str, str], None, None]:
    """Write what the block puts into the dict, or its error, to the file that `OUTCOME` names.

    Flower's own word on a run is whether it failed; a launcher wants the reason, and the folder.
    """
    outcome: dict[str, str] = {}
    try:
        yield outcome
    except Exception as error:
        outcome["error"] = str(error)
        outcome["kind"] = _kind(error)
        raise
    finally:
        if path := os.environ.get(OUTCOME):
            Path(path).write_text(json.dumps(outcome), encoding="utf-8")


def _kind(error: Exception) -> str:
    """Return ``config`` or ``known`` for errors whose message is for a person, or the type."""
    if isinstance(error, ConfigError):
        return "config"
    return "known" if isinstance(error, FlAppError) else type(error).__name__
