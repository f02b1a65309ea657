"""The top-level keys of a configuration, where Hydra finds the rest, and its errors in words.

Imports neither torch nor Flower, so that a mistyped key is answered at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException
from omegaconf import MISSING, DictConfig, OmegaConf

from fl_app.errors import ConfigError

CONFIG_NAME = "config"


@dataclass
class RunConfig:
    """Top-level keys of a configuration; the groups' own keys are those of their components."""

    task: Any = MISSING
    partition: Any = MISSING
    client: Any = MISSING
    strategy: Any = MISSING
    selection: Any = MISSING
    privacy: Any = MISSING
    secure_aggregation: Any = MISSING
    compression: Any = MISSING
    engine: Any = MISSING
    tracking: Any = MISSING
    checks: Any = MISSING
    stopping: Any = MISSING
    client_app: Any = MISSING
    name: str = MISSING
    seed: int = MISSING
    rounds: int = MISSING
    num_malicious: int = MISSING
    evaluate_every: int = MISSING
    fairness_clients: int = MISSING
    checkpoint_every: int = MISSING
    checkpoint_keep: int = MISSING
    initial_model: str | None = None
    resume: str | None = None
    output_url: str = MISSING
    run_dir: str | None = None
    progress: str = MISSING


def conf_dir() -> Path:
    """Return the folder of our YAML files: beside the package in a clone, inside it in a wheel."""
    package = Path(__file__).resolve().parent
    beside = package.parent / "conf"
    return beside if (beside / "config.yaml").is_file() else package / "conf"


def parse_overrides(text: str) -> tuple[list[str], list[Path]]:
    """Return the overrides, and the folders of ``--config-dir``, in one line of a run config.

    The line is split as a shell would: quotes keep spaces together. A relative folder is looked
    up beside our own ``conf/`` first, which is what travels with the app, then in the working
    directory: that of whoever typed the command is not known here.

    Raises:
        ConfigError: A quote is not closed, or a folder does not exist.
    """
    try:
        arguments = shlex.split(text)
    except ValueError as error:
        raise ConfigError(
            f"overrides={text} cannot be split into words ({error}): close every quote, or put a "
            "backslash before one that is meant literally."
        ) from error
    return split_config_dirs(arguments, roots=(conf_dir().parent, Path.cwd()))


def split_config_dirs(
    arguments: Sequence[str], *, roots: Sequence[Path]
) -> tuple[list[str], list[Path]]:
    """Return the overrides among arguments, and the folders that ``--config-dir`` names.

    Args:
        arguments: Overrides, and ``--config-dir=DIR``, ``--config-dir DIR`` or ``-cd DIR``.
        roots: Where relative folders are looked up, in this order.

    Raises:
        ConfigError: A folder does not exist.
    """
    overrides, folders, rest = [], [], iter(arguments)
    for argument in rest:
        if argument in ("--config-dir", "-cd"):
            folders.append(_existing(next(rest, ""), roots))
        elif argument.startswith("--config-dir="):
            folders.append(_existing(argument.partition("=")[2], roots))
        else:
            overrides.append(argument)
    return overrides, folders


def _existing(folder: str, roots: Sequence[Path]) -> Path:
    places = [root / folder for root in roots]
    for place in places:
        if folder and place.is_dir():
            return place
    looked = " and ".join(dict.fromkeys(str(root) for root in roots))
    raise ConfigError(
        f"--config-dir={folder} is not a folder (looked in {looked}): name the folder of your own "
        "YAML files, which has subfolders such as task/."
    )


def register(population: int | None = None) -> None:
    """Make the schema of the top-level keys, and the resolvers, known to Hydra.

    Args:
        population: What ``${population:DEFAULT}`` gives, or None for ``engine.clients``, or for its
            default where the engine takes any number.
    """
    ConfigStore.instance().store(name="run_schema", node=RunConfig, provider="fl_app")
    OmegaConf.register_new_resolver("local_path", local_path, replace=True)
    OmegaConf.register_new_resolver("sweep_path", sweep_path, replace=True)
    OmegaConf.register_new_resolver("file_name", file_name, replace=True)

    def resolved(default: int, *, _root_: DictConfig) -> int:
        if population is not None:
            return population
        clients = OmegaConf.select(_root_, "engine.clients")  # an engine with so many, or without
        return int(default if clients is None else clients)

    OmegaConf.register_new_resolver("population", resolved, replace=True)


def local_path(url: str) -> str:
    """Return the path that ``output_url`` means: itself, or what follows ``file://``.

    Raises:
        ConfigError: It has another scheme.
    """
    path = str(url).removeprefix("file://")
    if "://" in path:
        raise ConfigError(
            f"output_url={url} is not a local folder: give a path or file://PATH, and copy the "
            "run's folder elsewhere when it is done."
        )
    return path


def sweep_path(url: str) -> str:
    """Return where sweeps go: ``multirun/``, or one under an ``output_url`` that was given."""
    return "multirun" if url == "outputs" else f"{local_path(url)}/multirun"


def file_name(name: str) -> str:
    """Return a run's name, which ends the name of its folder.

    Raises:
        ConfigError: It could lead out of that folder.
    """
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise ConfigError(
            f"name={name} must be made of letters, digits, '_', '-' and '.', and not begin with a "
            "dot: it ends the name of the run's folder."
        )
    return name


def closest(name: str, known: Sequence[str]) -> str:
    """Return "; did you mean …?" with the names nearest to a mistyped one, or nothing."""
    matches = difflib.get_close_matches(name, known, n=2)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def explain(error: BaseException) -> str:
    """Return what is wrong with a configuration, without the tools' own vocabulary."""
    parts = [str(error)]
    cause = error.__cause__
    if isinstance(error, ConfigCompositionException) and cause is not None:
        parts.append(str(cause))
    text = "\n".join(parts)
    if "Could not find '" in text and "Available options" in text:
        return _explain_choice(text)
    if "is not in struct" in text or "not in 'RunConfig'" in text:
        return _explain_key(text)
    if "could not be converted to" in text and "full_key:" in text:
        return _explain_type(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    noise = ("object_type=", "reference_type=", "Config search path", "provider=", "Set the env")
    kept = [line for line in dict.fromkeys(lines) if not line.startswith(noise)]
    return " ".join(kept)


def _explain_choice(text: str) -> str:
    wanted = text.split("Could not find '", 1)[1].split("'", 1)[0]
    group, _, choice = wanted.rpartition("/")
    listed = text.split("Available options in", 1)[1].split("Config search path", 1)[0]
    options = [line.strip() for line in listed.splitlines()[1:] if line.strip()]
    close = closest(choice, options).lstrip("; ")
    return (
        f"{group}={choice} does not exist{'; ' + close if close else ':'} "
        f"choose one of {', '.join(options)}."
    )


def _explain_key(text: str) -> str:
    marker = next(line for line in text.splitlines() if "full_key:" in line)
    full_key = marker.split("full_key:", 1)[1].strip()
    known = [field.name for field in dataclasses.fields(RunConfig)]
    hint = closest(full_key, known) if "." not in full_key else ""
    return (
        f"{full_key} is not a key of the configuration{hint or '.'} "
        "`fl-app run --cfg job` prints them all."
    )


def _explain_type(text: str) -> str:
    line = next(line for line in text.splitlines() if "could not be converted to" in line)
    value = line.split("Value '", 1)[-1].split("'", 1)[0]
    wanted = line.rsplit("could not be converted to", 1)[1].strip()
    full_key = text.split("full_key:", 1)[1].split()[0]
    return f"{full_key}={value} must be of type {wanted.lower().replace('integer', 'int')}."
