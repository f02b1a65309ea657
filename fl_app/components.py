"""Building what a configuration describes: the one place where components are made."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from torch import nn

from fl_app.algorithm import Algorithm, Composition
from fl_app.attacks import NoAttack
from fl_app.config import to_json
from fl_app.flower_strategy import as_algorithm
from fl_app.foreign import ClientAppChoice
from fl_app.params import read_params, trainable_names
from fl_app.preflight import (
    check_aggregation,
    check_cohort,
    check_metrics,
    check_optimizer,
    check_selector,
    check_task,
    naming,
)
from fl_app.privacy.base import Privacy
from fl_app.privacy.client_level import ClientLevel, ClientLevelPlan
from fl_app.private_algorithm import check_client_level, plan_client_level
from fl_app.private_preflight import FixedTask, check_ghost, check_privacy
from fl_app.selection import Selector, planned_rounds
from fl_app.stopping import Progress, Stopping
from fl_app.tasks.base import Task
from fl_app.tasks.partition import OneOwner
from fl_app.training import LocalTraining, evaluate
from fl_app.types import ConfigError, FederatedData, PrivacyUnit
from fl_app.validation import UpdateChecks


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
    privacy: Privacy
    release: ClientLevelPlan | None
    client_app: ClientAppChoice
    seed: int


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
    privacy = _make(config, "privacy", "unit", "event", "steps", "protect")
    if getattr(privacy, "fix", False):
        task = FixedTask(task=task)
    components = Components(
        task=task,
        data=data,
        training=_make(config, "client", "epochs", "batch_size", "optimizer", "attack"),
        algorithm=_make_algorithm(config),
        selector=_make(config, "selection", "select", "wanted"),
        checks=_make(config, "checks", "objection"),
        stopping=_make(config, "stopping", "after_round"),
        privacy=privacy,
        release=None,
        client_app=_make(config, "client_app", "reader", "load"),
        seed=seed,
    )
    _require("client.attack", components.training.attack, "hostile", "poison", "forge")
    if components.privacy.unit is not PrivacyUnit.NONE and not components.client_app.is_ours:
        raise ConfigError(
            f"privacy={components.privacy.unit} is kept by our own ClientApp, and client_app.app="
            f"{components.client_app.app}: choose privacy=none."
        )
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
    # One owner's records at its own site: whom a round asks, and how many, is the server's affair.
    alone = isinstance(partition, OneOwner)
    if not alone:
        check_selector(components.selector, data.clients, seed=seed)
    model = check_task(task, data)
    if isinstance(components.algorithm, Composition) and not alone:
        wanted = components.selector.wanted(len(data.clients))
        check_optimizer("strategy.server_optimizer", components.algorithm.server_optimizer)
        check_cohort(components.algorithm.aggregation, wanted)
        check_aggregation(components.algorithm.aggregation, read_params(model), wanted)
    components = _with_plan(components, rounds=config["rounds"])
    check_privacy(components.privacy, model, data, components.training)
    if getattr(components.privacy, "gradients", None) == "ghost":
        probe = data.held_out or data.examples_of(data.clients[0]).train
        check_ghost(task.build_model(), task.losses, probe)
    if isinstance(components.privacy, ClientLevel) and not alone:
        return _with_release(components, model, rounds=config["rounds"])
    return components


def _with_release(components: Components, model: nn.Module, *, rounds: int) -> Components:
    """Return components whose server adds noise: what it releases in each round, checked."""
    algorithm, selector = components.algorithm, components.selector
    check_client_level(
        algorithm, selector, params=read_params(model), trainable=trainable_names(model)
    )
    plan = plan_client_level(
        cast(ClientLevel, components.privacy),
        selector,
        components.data.clients,
        rounds=rounds,
        seed=components.seed,
    )
    return dataclasses.replace(components, release=plan)


def _with_plan(components: Components, *, rounds: int) -> Components:
    """Return components whose privacy knows for how many rounds its noise is to be solved."""
    privacy = components.privacy
    target, known = (getattr(privacy, key, None) for key in ("target_epsilon", "planned_rounds"))
    if target is None or known is not None:
        return components
    planned = planned_rounds(
        components.selector, components.data.clients, rounds=rounds, seed=components.seed
    )
    planned_privacy = dataclasses.replace(cast(Any, privacy), planned_rounds=planned)
    return dataclasses.replace(components, privacy=planned_privacy)


def settled(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration in which what is solved once for a run is written down.

    A run that is resumed, even for more rounds, then trains with the noise it began with.
    """
    planned = getattr(build(to_json(config)).privacy, "planned_rounds", None)
    if planned is None or config["privacy"].get("planned_rounds") is not None:
        return dict(config)
    return {**config, "privacy": {**config["privacy"], "planned_rounds": planned}}


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
    torch.set_num_threads(config["engine"].get("threads") or 1)


def make_engine(config: Mapping[str, Any]) -> Any:
    """Return the engine that a configuration names."""
    return _make(config, "engine")


def has_own_grid(config: Mapping[str, Any]) -> bool:
    """Return whether the engine reaches its clients by a Grid of its own, not by one of Flower's.

    Asked of the class: where it is not to be used, its values need not suit the machine.
    """
    target = config["engine"].get("_target_")
    return target is not None and hasattr(get_object(target), "grid")


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
