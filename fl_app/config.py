"""Configuration: composed by Hydra, checked against the components, built in one place.

Nothing below this module sees Hydra.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fl_app.algorithm import Algorithm, Composition
from fl_app.attacks import NoAttack
from fl_app.flower_strategy import as_algorithm
from fl_app.foreign import ClientAppChoice
from fl_app.params import read_params
from fl_app.preflight import (
    check_aggregation,
    check_cohort,
    check_metrics,
    check_optimizer,
    check_selector,
    check_task,
    naming,
)
from fl_app.privacy.plan import NoPrivacy
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
from fl_app.selection import Selector
from fl_app.stopping import Progress, Stopping
from fl_app.tasks.base import Task
from fl_app.training import LocalTraining, evaluate
from fl_app.types import ConfigError, FederatedData
from fl_app.validation import UpdateChecks

RESUMABLE_KEYS = (
    "rounds",
    "stopping",
    "checkpoint_every",
    "checkpoint_keep",
    "fairness_clients",
    "progress",
    "engine.workers",
    "engine.cpus",
    "engine.client_cpus",
    "engine.client_gpus",
    "engine.port",
)
"""Keys that may be given anew when a run is resumed: they change nothing of what has been done."""

_LEAST = {
    "rounds": 1,
    "num_malicious": 0,
    "seed": 0,
    "evaluate_every": 1,
    "fairness_clients": 0,
    "checkpoint_every": 0,
    "checkpoint_keep": 2,
}


@dataclass(frozen=True, kw_only=True)
class Components:
    """What a configuration builds, for the server and for the clients alike."""

    task: Task
    data: FederatedData
    training: LocalTraining
    algorithm: Algorithm
    selector: Selector
    checks: UpdateChecks
    stopping: Stopping
    privacy: NoPrivacy
    client_app: ClientAppChoice
    seed: int


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


def to_yaml(config: Mapping[str, Any]) -> str:
    """Return the configuration as the text of a ``config.yaml``."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(config)))


def to_json(config: Mapping[str, Any]) -> str:
    """Return the configuration as one line of JSON; `from_run_config` reads it back."""
    return json.dumps(config, sort_keys=True)


@lru_cache(maxsize=4)
def build(config_json: str) -> Components:
    """Return the components of a configuration; the one place where they are made.

    Args:
        config_json: What `to_json` gives; one process builds each configuration once.

    Raises:
        ConfigError: A component refuses its values, or they do not fit together.
    """
    config = json.loads(config_json)
    seed = config["seed"]
    task = _make(config, "task", "name", "build_model", "losses", "metrics")
    partition = _make(config, "partition", "__call__")
    with naming("task", "give its records"):
        data = partition(task, seed)
    components = Components(
        task=task,
        data=data,
        training=_make(config, "client", "epochs", "batch_size", "optimizer", "attack"),
        algorithm=_make_algorithm(config),
        selector=_make(config, "selection", "select", "wanted"),
        checks=_make(config, "checks", "objection"),
        stopping=_make(config, "stopping", "after_round"),
        privacy=_make(config, "privacy"),
        client_app=_make(config, "client_app", "reader", "load"),
        seed=seed,
    )
    _require("client.attack", components.training.attack, "hostile", "poison", "forge")
    if not isinstance(components.privacy, NoPrivacy):
        raise ConfigError("privacy: only privacy=none is available.")
    if components.training.early_stopping_patience and not config["partition"].get(
        "validation_fraction", 1.0
    ):
        raise ConfigError(
            "client.early_stopping_patience needs records to watch: set "
            "partition.validation_fraction > 0, or early_stopping_patience=null."
        )
    if components.training.attack != NoAttack() and not components.client_app.is_ours:
        raise ConfigError(
            f"client.attack={components.training.attack} is made by our own ClientApp, and "
            f"client_app.app={components.client_app.app}: choose client/attack=none."
        )
    check_optimizer("client.optimizer", components.training.optimizer)
    check_selector(components.selector, data.clients, seed=seed)
    wanted = components.selector.wanted(len(data.clients))
    params = read_params(check_task(task, data))
    if isinstance(components.algorithm, Composition):
        check_optimizer("strategy.server_optimizer", components.algorithm.server_optimizer)
        check_cohort(components.algorithm.aggregation, wanted)
        check_aggregation(components.algorithm.aggregation, params, wanted)
    return components


def check_stopping(components: Components) -> None:
    """Refuse a rule that watches what is not measured: for the server, before the first round.

    Raises:
        ConfigError: There is no held-out set, or the metric is not one of the task's, or the
            task's metrics raise.
    """
    task, data = components.task, components.data
    if data.held_out is not None:
        check_metrics(task, data.held_out)
    if not components.stopping.watches:
        return
    if data.held_out is None:
        raise ConfigError(
            "stopping.target and stopping.patience watch the held-out set, and there is none: "
            "raise task.test_fraction, or use stopping.max_seconds."
        )
    model = task.build_model()
    start = evaluate(model, task, data.held_out, params=read_params(model))
    components.stopping.after_round(Progress(), start.metrics, elapsed_s=0.0)


def _make_algorithm(config: Mapping[str, Any]) -> Algorithm:
    named = _make(config, "strategy")
    algorithm: Algorithm = as_algorithm(named, config["strategy"])
    _require("strategy", algorithm, "instruct", "step")
    _require("strategy.objective", algorithm.objective, "add_gradient")
    if isinstance(algorithm, Composition):
        _require("strategy.aggregation", algorithm.aggregation, "__call__")
    return algorithm


def adopt_threads(config: Mapping[str, Any]) -> None:
    """Set torch's intra-op threads to ``engine.threads``: another number gives other bits.

    For the processes that Flower starts, where no engine of ours does it.
    """
    torch.set_num_threads(config["engine"].get("threads", 1))


def make_engine(config: Mapping[str, Any]) -> Any:
    """Return the engine that a configuration names."""
    return _make(config, "engine")


def make_tracker(config: Mapping[str, Any]) -> Any:
    """Return the tracker that a configuration names, or None for ``tracking=none``."""
    return _make(config, "tracking") if config["tracking"] else None


def _with_plain_partials(component: Any) -> Any:
    """Return a component with Python's own partials in place of Hydra's.

    Hydra's check their target again at every call. Optimizers are made for every client, and the
    target was checked when the configuration was.
    """
    if isinstance(component, functools.partial):
        return functools.partial(component.func, *component.args, **component.keywords)
    if not dataclasses.is_dataclass(component) or isinstance(component, type):
        return component
    fields = {f.name: getattr(component, f.name) for f in dataclasses.fields(component) if f.init}
    plain = {name: _with_plain_partials(value) for name, value in fields.items()}
    changed = {name: value for name, value in plain.items() if value is not fields[name]}
    return dataclasses.replace(component, **changed) if changed else component


def _require(key: str, component: Any, *members: str) -> None:
    for member in members:
        if not hasattr(component, member):
            raise ConfigError(
                f"{key} is a {type(component).__name__}, which has no {member}: name by _target_ a "
                f"class of the kind that conf/{key.partition('.')[0]}/ has."
            )


def _make(config: Mapping[str, Any], key: str, *members: str) -> Any:
    """Return the component at a key, which must have these members."""
    try:
        component = _with_plain_partials(instantiate(config[key], _convert_="all"))
        _require(key, component, *members)
        return component
    except InstantiationException as error:
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, ConfigError):
            cause = cause.__cause__
        if isinstance(cause, ConfigError):
            raise cause from None
        part = str(error).partition("full_key: ")[2].split("\n")[0]
        raise ConfigError(
            f"{key}{'.' * bool(part)}{part} cannot be made: {type(cause).__name__} "
            f"({' '.join(str(cause).split())[:300]}). Mend its values, or the class that its "
            "_target_ names."
        ) from error
