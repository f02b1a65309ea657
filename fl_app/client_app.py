"""The Flower ClientApp: messages in, messages out; the work is `fl_app.client`'s."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, TypeAlias

from flwr.app import Context, Message, UserConfig
from flwr.clientapp import ClientApp

from fl_app import codec
from fl_app.client import ClientRuntime
from fl_app.client_state import ClientStateStore, DiskClientState, MemoryClientState
from fl_app.components import adopt_threads, build
from fl_app.config import from_run_config, to_json
from fl_app.privacy.base import Admission, BudgetExhaustedError, PolicyError
from fl_app.run_config import local_path
from fl_app.site import POLICY, site_of
from fl_app.training import ClientTimeoutError
from fl_app.types import Budget, ClientId, ConfigError, FlAppError

log = logging.getLogger(__name__)

app = ClientApp()

_ADMITTED = "admitted"

_Handler: TypeAlias = Callable[[Message, Context], Message]


def _discreet(handler: _Handler) -> _Handler:
    """Answer errors by an error reply, and keep the text of foreign ones on the client.

    That text may quote a record; our own errors quote none, and clients of ``engine=local`` have
    nothing to keep from their server. Raised, an error would reach the server in other words on
    each of Flower's runtimes, with a traceback in the log for a client that merely declined.
    """

    @wraps(handler)
    def handle(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except Exception as error:
            if _is_in_process(context):
                raise
            if isinstance(error, FlAppError) and not _quotes_others(error):
                log.warning("This client fails: %s", error)
                told = isinstance(error, BudgetExhaustedError) or _is_simulated(context)
                return codec.error_reply(message, error if told else _discreetly(error))
            log.exception("This client failed; the server is told the kind of error alone.")
            failed = ClientFailedError(f"{type(error).__name__}; see the client's own log")
            return codec.error_reply(message, failed)

    return handle


def _discreetly(error: FlAppError) -> FlAppError:
    """Return an error of a real client without its words: they may name its size or its files.

    How a budget stands is told, if at all, in the words that its owner's policy allows.
    """
    kinds = (PolicyError, ClientTimeoutError)
    kind = next((kind for kind in kinds if isinstance(error, kind)), ClientFailedError)
    return kind(f"{type(error).__name__}; this client's own log says why")


def _quotes_others(error: FlAppError) -> bool:
    """Return whether an error of ours was made of one that is not, such as a loss function's."""
    return error.__cause__ is not None and not isinstance(error.__cause__, FlAppError)


class ClientFailedError(FlAppError):
    """A client failed in code that is not ours."""


@app.train()
@_discreet
def train(message: Message, context: Context) -> Message:
    """Train the received model, and measure it on the way, in one reply."""
    instruction = codec.decode_instruction(message)
    runtime = _runtime(context)
    update = runtime.train(
        _client(context, runtime), instruction, admission=_admission(context.node_config)
    )
    return codec.update_reply(message, update)


@app.evaluate()
@_discreet
def evaluate(message: Message, context: Context) -> Message:
    """Measure the received model on the client's own held-out part."""
    params = codec.decode_model(message)
    runtime = _runtime(context)
    return codec.evaluation_reply(message, runtime.evaluate(_client(context, runtime), params))


@app.query()
@_discreet
def query(message: Message, context: Context) -> Message:
    """Tell who this client is, and what it is willing to tell about itself."""
    runtime = _runtime(context)
    return codec.description_reply(message, runtime.describe(_client(context, runtime)))


def _client(context: Context, runtime: ClientRuntime) -> ClientId:
    """Return the stable id of the client that a node is.

    A node is the client that its ``client-id`` names, or else the one at position ``partition-id``
    of all clients in canonical order, whatever their names are.
    """
    node = context.node_config
    if "client-id" in node:
        return str(node["client-id"])
    position = node.get("partition-id")
    if position is None:
        raise ConfigError(
            "this node has no name: start it with --node-config "
            "'partition-id=0 num-partitions=3' or 'client-id=\"NAME\"'."
        )
    clients = runtime.data.clients
    if not (isinstance(position, int) and 0 <= position < len(clients)):
        raise ConfigError(
            f"partition-id={position} of this node must lie in [0, {len(clients)}): it is a "
            "position in the population, and this node owns nothing. Leave partition.num_clients "
            "out to have as many clients as nodes, or start fewer nodes."
        )
    return clients[position]


def admit(
    messages: Sequence[Message], clients: Sequence[ClientId], run_config: UserConfig
) -> list[Message | UserConfig]:
    """Pay for the training of a cohort of this process in one synced write, before it begins.

    Returns:
        For each instruction the error reply of a client that declines, or what to add to the node
        config of one that is admitted.
    """
    runtime = local_runtime(run_config)
    answers = runtime.admit(clients, codec.decode_instruction(messages[0]))
    return [
        codec.error_reply(message, answer)
        if isinstance(answer, FlAppError)
        else {_ADMITTED: json.dumps(answer.budget and asdict(answer.budget))}
        for message, answer in zip(messages, answers, strict=True)
    ]


def _admission(node_config: UserConfig) -> Admission | None:
    """Return what `admit` put into a node's config; taken from the engine in this process alone."""
    if _ADMITTED not in node_config or not node_config.get("in-process"):
        return None
    budget = json.loads(str(node_config[_ADMITTED]))
    return Admission(budget=None if budget is None else Budget(**budget))


def _runtime(context: Context) -> ClientRuntime:
    in_process = _is_in_process(context)
    partitions = context.node_config.get("num-partitions")
    policy = context.node_config.get("policy")
    return _runtime_for(
        str(context.run_config.get("config-json") or ""),
        str(context.run_config.get("overrides") or ""),
        connected=partitions if isinstance(partitions, int) and not in_process else None,
        in_process=in_process,
        simulated=_is_simulated(context),
        policy=None if policy is None else str(policy),
    )


def _is_simulated(context: Context) -> bool:
    """Return whether a client has no owner but whoever runs the simulation.

    In Flower's simulation that is a guess, from Ray being there, which a policy overrules.
    """
    if _is_in_process(context):
        return True
    ray = sys.modules.get("ray")
    has_policy = "policy" in context.node_config or POLICY in os.environ
    return ray is not None and bool(ray.is_initialized()) and not has_policy


def _is_in_process(context: Context) -> bool:
    """Return whether the engine that drives this process keeps what clients remember."""
    return bool(context.node_config.get("in-process", 0))


def local_runtime(run_config: UserConfig) -> ClientRuntime:
    """Return what serves the clients of this process for the engine that drives them."""
    return _runtime_for(
        str(run_config.get("config-json") or ""),
        str(run_config.get("overrides") or ""),
        connected=None,
        in_process=True,
        simulated=True,
        policy=None,
    )


def local_states(run_config: UserConfig) -> MemoryClientState:
    """Return what the clients of this process remember, for the engine that drives them."""
    states = local_runtime(run_config).states
    if not isinstance(states, MemoryClientState):
        raise TypeError(f"Clients of this process remember in a {type(states).__name__}.")
    return states


def _dealt(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a configuration decides which records a client has; the model does not."""
    others = ("model", "loss", "extra_metrics")
    task = {key: value for key, value in config["task"].items() if key not in others}
    return {"task": task, "partition": config["partition"], "seed": config["seed"]}


@lru_cache(maxsize=2)
def _runtime_for(
    config_json: str,
    overrides: str,
    *,
    connected: int | None,
    in_process: bool,
    simulated: bool,
    policy: str | None,
) -> ClientRuntime:
    """Return the runtime that serves this process's clients under a configuration.

    Args:
        config_json: Flower's run config of that name.
        overrides: Flower's run config of that name.
        connected: Nodes of the federation, if the node was told and it is not in process.
        in_process: Whether the engine that drives this process keeps what clients remember, in
            memory and in its checkpoints; else that lies on disk.
        simulated: Whether the clients are.
        policy: Path of the owner's policy that the node was started with, or None.
    """
    run_config = {"config-json": config_json, "overrides": overrides}
    config = from_run_config(run_config, connected=connected)
    if not in_process:
        adopt_threads(config)
    components = build(to_json(config))
    folder = Path(local_path(config["output_url"])) / "client_state"
    states: ClientStateStore = MemoryClientState() if in_process else DiskClientState(folder)
    return ClientRuntime(
        task=components.task,
        data=components.data,
        training=components.training,
        objective=components.algorithm.objective,
        seed=components.seed,
        states=states,
        privacy=components.privacy,
        site=site_of(
            components.privacy,
            task=components.task.name,
            dealt=to_json(_dealt(config)),
            policy=policy,
            simulated=simulated,
        ),
    )
