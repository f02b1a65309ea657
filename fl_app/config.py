"""Configuration: composed by Hydra, and checked against what its components take.

Nothing below this module sees Hydra.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fl_app.config_keys import RESUMABLE_KEYS
from fl_app.run_config import (
    CONFIG_NAME,
    RunConfig,
    closest,
    conf_dir,
    explain,
    parse_overrides,
    register,
)
from fl_app.schema import check
from fl_app.types import ConfigError

_LEAST = {
    "rounds": 1,
    "num_malicious": 0,
    "seed": 0,
    "evaluate_every": 1,
    "fairness_clients": 0,
    "checkpoint_every": 0,
    "checkpoint_keep": 2,
}


def compose_config(
    overrides: Sequence[str], config_dirs: Sequence[Path] = (), *, population: int | None = None
) -> dict[str, Any]:
    """Return the resolved and checked configuration that overrides in Hydra's grammar give.

    Args:
        overrides: Such as ``["task=digits", "rounds=5"]``.
        config_dirs: Further folders in which groups are looked up.
        population: How many clients there are where nothing says ``partition.num_clients``; None
            for as many as the partition's YAML says.

    Raises:
        ConfigError: The overrides do not compose, or the result is not valid.
    """
    register(population)
    search = [f"hydra.searchpath=[{','.join(f'file://{d.resolve()}' for d in config_dirs)}]"]
    try:
        # Hydra keeps its state in a global; a caller inside a Hydra job must get it back.
        outer = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(conf_dir()), version_base=None):
                composed = compose(CONFIG_NAME, [*overrides, *(search if config_dirs else [])])
        finally:
            GlobalHydra.instance().hydra = outer
        return to_plain(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error


def to_plain(composed: DictConfig | ListConfig) -> dict[str, Any]:
    """Return a composed configuration as plain, resolved and checked nested dicts.

    Raises:
        ConfigError: A key, type or value is not valid.
    """
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    known = [field.name for field in dataclasses.fields(RunConfig)]
    for key in cast(dict[str, Any], plain):
        if key not in known:
            raise ConfigError(f"{key} is not a key of the configuration{closest(key, known)}.")
    config = check(cast(dict[str, Any], plain))
    for key in ("secure_aggregation", "compression"):
        if config[key]:
            raise ConfigError(f"{key}={config[key]} is not available: choose {key}=none.")
    for key, least in _LEAST.items():
        if config[key] < least:
            raise ConfigError(f"{key}={config[key]} must be >= {least}.")
    if config["progress"] not in ("auto", "none"):
        raise ConfigError(f"progress={config['progress']} is not known: choose auto or none.")
    return config


def resumed_config(run_dir: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the configuration of an earlier run, to go on with it.

    Args:
        run_dir: The run's folder.
        overrides: Such as ``["rounds=50"]``; only of `RESUMABLE_KEYS`.

    Raises:
        ConfigError: The folder holds no run, or an override would make it another run.
    """
    path = Path(run_dir) / "config.yaml"
    try:
        saved = OmegaConf.load(path)
    except (OSError, YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"resume={run_dir} is not the folder of a run: {path} cannot be read ({error})."
        ) from error
    if not saved:
        raise ConfigError(
            f"resume={run_dir}: its config.yaml is empty, so the run was ended before it began. "
            "Start it again instead."
        )
    for override in overrides:
        key, equals, _ = override.lstrip("+~").partition("=")
        if not equals:
            raise ConfigError(f"{override} is no override: write KEY=VALUE.")
        if not any(key == known or key.startswith(f"{known}.") for known in RESUMABLE_KEYS):
            raise ConfigError(
                f"{override} cannot be changed when a run is resumed: it would be another run. "
                f"Only {', '.join(RESUMABLE_KEYS)} can; start a new run for the rest."
            )
    try:
        typed = OmegaConf.merge(OmegaConf.structured(RunConfig), saved)
        OmegaConf.set_struct(typed, True)
        merged = OmegaConf.merge(typed, OmegaConf.from_dotlist(list(overrides)))
        return {**to_plain(merged), "resume": run_dir, "run_dir": run_dir}
    except (OmegaConfBaseException, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"resume={run_dir}: {explain(error)}") from error


def from_run_config(
    run_config: Mapping[str, Any], *, connected: int | None = None
) -> dict[str, Any]:
    """Return the configuration that Flower's run config carries.

    ``config-json`` (sent by our own launcher) is a resolved configuration; ``overrides`` (typed by
    people) is Hydra's grammar, with ``--config-dir=DIR`` among it, in the quotes of a shell.

    Args:
        run_config: Flower's run config.
        connected: Nodes of the federation. They are the population, unless ``overrides`` or the
            experiment it names says ``partition.num_clients``.

    Raises:
        ConfigError: Neither gives a valid configuration.
    """
    text = str(run_config.get("config-json") or "")
    if not text:
        overrides, folders = parse_overrides(str(run_config.get("overrides") or ""))
        config = compose_config(overrides, folders, population=connected)
        return resumed_config(config["resume"], ()) if config["resume"] else config
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"config-json is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError("config-json must be a JSON object: the config.yaml of a run, as JSON.")
    return check(config)


def chosen_engine(run_config: Mapping[str, Any]) -> str | None:
    """Return the override by which a person chose the engine in Flower's run config.

    Such as ``engine=local``; None if nobody did. The default of ``conf/config.yaml`` is no choice:
    ``flwr run .`` means Flower's runtime. Neither is a key such as ``engine.threads=2``, which
    holds there as well.

    Args:
        run_config: Flower's run config; ``config-json`` is a program's, and no override.

    Raises:
        ConfigError: ``overrides`` cannot be read.
    """
    if run_config.get("config-json"):
        return None
    overrides, _ = parse_overrides(str(run_config.get("overrides") or ""))
    chosen = [o for o in overrides if o.partition("=")[0].strip().lstrip("+~") == "engine"]
    return chosen[-1] if chosen else None


def to_yaml(config: Mapping[str, Any]) -> str:
    """Return the configuration as the text of a ``config.yaml``."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(config)))


def to_json(config: Mapping[str, Any]) -> str:
    """Return the configuration as one line of JSON; `from_run_config` reads it back."""
    return json.dumps(config, sort_keys=True)
