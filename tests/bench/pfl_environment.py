"""The environment of pfl-research: its pins are not ours, so it has one of its own.

``PFL_PYTHON`` names an interpreter that has it; else ``.bench/pfl`` is used, and made if need be,
with the release of torch that runs here. ``TORCH_INDEX`` says where torch comes from, as for the
Makefile.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

PFL = "pfl[pytorch]==0.6.0"
FOLDER = Path(__file__).resolve().parents[2] / ".bench" / "pfl"
PATIENCE_S = 1800.0


class NoPflError(RuntimeError):
    """There is no pfl-research here; the message is one line that says why."""


def pfl_python() -> Path:
    """Return an interpreter that has pfl-research, which may have to be installed.

    Raises:
        NoPflError: It is not there and cannot be installed.
    """
    named = os.environ.get("PFL_PYTHON")
    if named:
        if not _has_pfl(Path(named)):
            raise NoPflError(f"PFL_PYTHON={named} has no pfl-research.")
        return Path(named)
    python = FOLDER / "bin" / "python"
    if not _has_pfl(python):
        shutil.rmtree(FOLDER, ignore_errors=True)
        try:
            _install(python)
        except (OSError, subprocess.SubprocessError) as error:
            shutil.rmtree(FOLDER, ignore_errors=True)
            raise NoPflError(f"pfl-research could not be installed ({_reason(error)}).") from error
    return python


def _has_pfl(python: Path) -> bool:
    command = [str(python), "-c", "import pfl.model.pytorch"]
    try:
        return subprocess.run(command, capture_output=True, timeout=120.0).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def _install(python: Path) -> None:
    torch = "torch==" + importlib.metadata.version("torch").partition("+")[0]
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    commands = [[sys.executable, "-m", "venv", str(FOLDER)]]
    index = os.environ.get("TORCH_INDEX")
    if index:
        commands.append([*pip, "--no-deps", "--index-url", index, torch])
    commands.append([*pip, torch, PFL])
    for command in commands:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE_S)


def _reason(error: Exception) -> str:
    """Return the last line that a command printed, or what else is known."""
    printed = str(getattr(error, "stderr", "") or "").strip().splitlines()
    return printed[-1] if printed else str(error)
