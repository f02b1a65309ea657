"""Submit a run to the SuperLink of this federation: what the ``run`` service of compose does.

    python -m fl_app.engines.submit

Exit code as of `fl-app run`. Read from the environment:

    SUPERLINK           host:port of its Control API (default: superlink:8000)
    ROOT_CERTIFICATES   the CA that vouches for it; empty: it speaks no TLS
    OVERRIDES           Hydra overrides of the run, as after `fl-app run`
    CONFIG_JSON         a whole resolved configuration instead, from a program; wins over OVERRIDES
    CLIENTS             how many clients there are (default: 3)
    LAUNCHED_AT         when the command began, in seconds since 1970 (default: now)

The working directory and ``outputs`` in it are the same here and where the ServerApp runs.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import time
from dataclasses import replace
from typing import Any

import typer

from fl_app.components import make_engine
from fl_app.config import compose_config
from fl_app.engines.deployment import DeploymentEngine
from fl_app.run_config import split_config_dirs
from fl_app.run_log import outcome_line
from fl_app.schema import check
from fl_app.tracking.console import log_handler, stderr_console
from fl_app.types import ConfigError, FlAppError


def main() -> int:
    """Submit, follow, judge; a program is told what came of it as a ServerApp tells it."""
    logging.basicConfig(
        level=logging.INFO, handlers=[log_handler(stderr_console())], format="%(message)s"
    )
    launched_at = float(os.environ.get("LAUNCHED_AT") or time.time())
    outcome: dict[str, str] = {}
    program = bool(os.environ.get("CONFIG_JSON"))
    if program:
        typer.echo(outcome_line(outcome))  # the federation is up: nothing has come of the run yet
    try:
        config = _config()
        engine = make_engine(config)
        if not isinstance(engine, DeploymentEngine):
            raise ConfigError(
                f"engine={config['engine'].get('_target_')} plays no run on this federation: leave "
                "the engine out of OVERRIDES."
            )
        certificates = os.environ.get("ROOT_CERTIFICATES") or None
        there = replace(
            engine,
            superlink=os.environ.get("SUPERLINK") or "superlink:8000",
            root_certificates=certificates,
            insecure=certificates is None,
            shared_outputs=True,
        )
        outcome["run_dir"] = str(there.run(config, launched_at=launched_at))
    except FlAppError as error:
        outcome = {"error": str(error), "kind": "known"}
        if isinstance(error, ConfigError):
            outcome["kind"] = "config"
    if program:
        typer.echo(outcome_line(outcome))
    elif "error" in outcome:
        typer.echo(f"Error: {outcome['error']}", err=True)
    else:
        typer.echo(outcome["run_dir"])
    return {None: 0, "config": 2}.get(outcome.get("kind"), 1)


def _config() -> dict[str, Any]:
    if text := os.environ.get("CONFIG_JSON"):
        return check(json.loads(text))
    overrides, folders = split_config_dirs(shlex.split(os.environ.get("OVERRIDES", "")), roots=())
    clients = os.environ.get("CLIENTS") or "3"
    # What is given comes last, so it wins.
    first = ["experiment=federation", "engine=deployment", f"engine.clients={clients}"]
    return compose_config([*first, *overrides], folders)


if __name__ == "__main__":
    sys.exit(main())
