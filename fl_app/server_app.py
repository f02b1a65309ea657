"""The Flower ServerApp: a configuration and a Grid in, a run's folder out."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fl_app.components import adopt_threads, has_own_grid, make_engine
from fl_app.config import chosen_engine, from_run_config
from fl_app.federation import run_federation
from fl_app.population import engine_of, wait_for_nodes
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
        run_dir = _play(grid, context.run_config, launched_at=launched_at)
        outcome["run_dir"] = str(run_dir)


def _play(grid: Grid, run_config: Mapping[str, Any], *, launched_at: float) -> Path:
    """Play the run on Flower's Grid, or on that of an engine that was asked for; return its folder.

    Raises:
        ConfigError: The configuration is not valid, or cannot be run here.
    """
    own = _config_of_own_grid(grid, run_config)
    if own is not None:
        # Flower's identity of this process is the engine's from here on: nobody else needs it.
        run_dir: Path = make_engine(own).run(own, launched_at=launched_at)
        return run_dir
    config = from_run_config(run_config, connected=wait_for_nodes(grid))
    adopt_threads(config)
    return run_federation(config, grid, launched_at=launched_at)


def _config_of_own_grid(grid: Grid, run_config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the configuration if its engine is to play in this process, without Flower's Grid.

    The connected nodes are then nobody's: the population is that of the configuration alone. A
    program that sends a whole configuration to real clients has chosen them by where it sent it,
    and the engine in it may be just the default.

    Raises:
        ConfigError: A person chose such an engine, and the federation's clients are real.
    """
    chosen, program = chosen_engine(run_config), bool(run_config.get("config-json"))
    simulated = engine_of(grid) == "simulation"
    if not (chosen or (program and simulated)):
        return None
    config = from_run_config(run_config)
    if not has_own_grid(config):
        return None
    if not simulated:
        raise ConfigError(
            f"{chosen} simulates the clients in the ServerApp, and those of this federation are "
            "real: none of them would be asked. Leave it out to train on them; simulate with "
            f"fl-app run {chosen}, or with flwr run on a simulation federation."
        )
    return config


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
