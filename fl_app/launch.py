"""From the command line to a played run: Hydra composes a configuration, its engine plays it."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from fl_app.errors import ConfigError
from fl_app.run_config import CONFIG_NAME, conf_dir, register


def call_with_hydra(job: Callable[[DictConfig], Any], arguments: Sequence[str]) -> None:
    """Have Hydra compose what the arguments say, and call ``job`` with it; in a sweep, often.

    Args:
        job: Where Hydra's launcher starts processes, it must be picklable.
        arguments: Hydra's flags first, because its parser wants all overrides in one piece.
    """
    register()
    sys.argv = ["fl-app run", *arguments]
    hydra.main(version_base=None, config_path=str(conf_dir()), config_name=CONFIG_NAME)(job)()


def composed_run(composed: DictConfig, folder: Path) -> dict[str, Any]:
    """Return the checked configuration of a run that begins in this folder.

    Raises:
        ConfigError: A key, type or value is not valid, or it is no run that begins.
    """
    from fl_app.config import to_plain

    config = {**to_plain(composed), "run_dir": str(folder)}
    if config["resume"]:
        raise ConfigError(
            f"resume={config['resume']} goes on with a run only as an argument of its own: "
            f"fl-app run resume={config['resume']}"
        )
    return config


def play(
    config: Mapping[str, Any], *, launched_at: float, quiet: bool, mark: str = ""
) -> tuple[Path, dict[str, Any]]:
    """Play a run on its engine; return its folder and its summary.

    Args:
        config: A checked configuration.
        launched_at: `time.time` value when the command was started.
        quiet: Whether nothing but warnings is to be shown on the way.
        mark: What each line of the log begins with.
    """
    from fl_app.components import make_engine
    from fl_app.tracking.console import log_handler, stderr_console

    logging.basicConfig(
        level=logging.WARNING if quiet else logging.INFO,
        handlers=[log_handler(stderr_console())],
        format=f"{mark}%(message)s",
        force=True,
    )
    shown = {**config, "progress": "none"} if quiet else config
    run_dir: Path = make_engine(config).run(shown, launched_at=launched_at)
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return run_dir, summary


def objective_of(summary: Mapping[str, Any]) -> float:
    """Return what a sweeper may optimise: accuracy on held-out records, or loss without that.

    NaN if neither was measured.
    """
    metrics = summary["metrics"]
    value = metrics.get("accuracy", metrics.get("loss"))
    return math.nan if value is None else float(value)
