"""The Flower ServerApp: a configuration and a Grid in, a run's folder out."""

from __future__ import annotations

import logging
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
from fl_app.run_log import MOST_BYTES, digest_of, file_lines, outcome_line, pack
from fl_app.types import ConfigError, FlAppError

log = logging.getLogger(__name__)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that Flower's run config describes."""
    launched_at = float(context.run_config.get("launched-at") or time.time())
    _show_log()
    with _telling_the_launcher(context.run_config) as outcome:
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
def _telling_the_launcher(
    run_config: Mapping[str, Any],
) -> Generator[dict[str, str], None, None]:
    """Tell what the block puts into the dict, or its error, if a launcher listens to the log.

    Flower's own word on a run is whether it failed; a launcher wants the reason, and the folder,
    or all that is in it if that lies on another machine.
    """
    outcome: dict[str, str] = {}
    try:
        yield outcome
        if run_config.get("collect"):
            outcome |= _sent(Path(outcome["run_dir"]))
    except Exception as error:
        outcome["error"] = str(error)
        outcome["kind"] = _kind(error)
        raise
    finally:
        if run_config.get("launched-at"):
            print(outcome_line(outcome), flush=True)


def _sent(run_dir: Path) -> dict[str, str]:
    """Send the files of a run; return by what the launcher knows them."""
    archive, left_out = pack(run_dir)
    for line in file_lines(archive):
        print(line, flush=True)
    for name in left_out:
        log.warning(
            "%s is larger than the %d MiB that come over a run's log: it stays at %s on the "
            "server's machine. Copy it from there.",
            *(name, MOST_BYTES >> 20, (run_dir / name).resolve()),
        )
    return {"digest": digest_of(archive)}


def _kind(error: Exception) -> str:
    """Return ``config`` or ``known`` for errors whose message is for a person, or the type."""
    if isinstance(error, ConfigError):
        return "config"
    return "known" if isinstance(error, FlAppError) else type(error).__name__
