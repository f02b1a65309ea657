"""Small tools that several test modules share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fl_app.config import compose_config
from fl_app.engines.local import LocalEngine

REPOSITORY = Path(__file__).resolve().parent.parent

TINY = (
    "task/model=logistic",
    "partition.num_clients=6",
    "client.epochs=1",
    "rounds=3",
    "checkpoint_every=1",
    "progress=none",
)
"""Overrides that make a run last a fraction of a second."""


def play(folder: Path, *overrides: str, tiny: bool = True) -> Path:
    """Play a run in this process and return its folder."""
    config = compose_config([*(TINY if tiny else ()), *overrides])
    return play_config({**config, "run_dir": str(folder)})


def play_config(config: dict[str, Any]) -> Path:
    """Play a run of this configuration in this process and return its folder."""
    engine = LocalEngine(**{k: v for k, v in config["engine"].items() if k != "_target_"})
    return engine.run(config, launched_at=time.time())


def summary_of(run_dir: Path) -> dict[str, Any]:
    """Return a run's ``summary.json``."""
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return summary


def rounds_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return a run's ``rounds.jsonl``, without the one entry that a rerun does not repeat."""
    rounds = [json.loads(line) for line in (run_dir / "rounds.jsonl").read_text().splitlines()]
    for entry in rounds:
        del entry["seconds"]
    return rounds


def alike(first: Any, second: Any) -> bool:
    """Return whether two trees of figures are the same, to rounding."""
    if isinstance(second, dict):
        return first.keys() == second.keys() and all(alike(first[k], second[k]) for k in second)
    if isinstance(second, list):
        return len(first) == len(second) and all(map(alike, first, second))
    if isinstance(second, float) and not isinstance(first, str | None):
        return first == pytest.approx(second, rel=1e-3, abs=1e-5)
    return bool(first == second)


def fl_app(
    *arguments: str,
    cwd: Path,
    path: Path | None = None,
    extra: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own.

    Args:
        arguments: Of the command.
        cwd: Working directory.
        path: Put on PYTHONPATH.
        extra: Further environment variables.
        kwargs: Of `subprocess.run`.
    """
    return subprocess.run(
        [sys.executable, "-m", "fl_app", *arguments],
        cwd=cwd,
        env=environment(path) | dict(extra or {}),
        capture_output=True,
        text=True,
        check=False,
        **kwargs,
    )


def environment(path: Path | None = None) -> dict[str, str]:
    """Return the environment of a child process that can import ``fl_app``, and ``path``."""
    paths = [str(REPOSITORY), *([str(path)] if path else [])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
