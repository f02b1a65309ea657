"""What clients answer to messages: Flower's on one side, `fl_app.client` on the other.

Serves the clients of simulations, in the process that Flower or `fl_app.engines.local` gives them,
and through `answer_content` those of a site, in its own worker.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, MessageType, RecordDict, UserConfig

from fl_app import codec
from fl_app.client import ClientRuntime
from fl_app.client_state import ClientStateStore, DiskClientState, MemoryClientState
from fl_app.cohort import CohortTrainer
from fl_app.components import adopt_threads, build
from fl_app.config import from_run_config, to_json
from fl_app.failures import code_and_reason, error_reply
from fl_app.privacy.base import Admission, BudgetExhaustedError, PolicyError
from fl_app.run_config import local_path
from fl_app.site import SimulatedSite, Site
from fl_app.site_config import RefusedRequestError
from fl_app.site_protocol import SOCKET
from fl_app.training import ClientTimeoutError
from fl_app.types import Budget, ClientId, ConfigError, FlAppError

log = logging.getLogger(__name__)

_ADMITTED = "admitted"
_LONGEST_LINE = 1000


class ClientFailedError(FlAppError):
    """A client failed in code that is not ours."""


class NoSiteError(FlAppError):
    """A deployed client has no worker of its site."""


def answer(message: Message, context: Context) -> Message:
    """Return a simulated client's reply; an error reply if it fails.

    Raised, an error would reach the server in other words on each of Flower's runtimes, with a
    traceback in the log for a client that merely declined. In the process of ``engine=local``,
    which has its own ways, it is raised.
    """
    if _is_in_process(context):
        return Message(_content(message, context), reply_to=message)
    try:
        _check_simulated()
        return Message(_content(message, context), reply_to=message)
    except Exception as error:
        code, reason = told_error(error, trusted=True)
        return Message(Error(code=code, reason=reason), reply_to=message)


def answer_content(
    kind: str,
    content: RecordDict,
    runtime: ClientRuntime,
    client: ClientId,
    *,
    deadline_s: float | None,
    admission: Admission | None = None,
) -> RecordDict:
    """Return what a client replies to a message of this type and content.

    Args:
        kind: One of Flower's ``MessageType``.
        content: Of the message.
        runtime: Serves the client.
        client: Who is asked.
        deadline_s: Seconds for which the server waits, or None.
        admission: What the engine of this process has already paid for, or None.

    Raises:
        FlAppError: The client declines, or fails.
    """
    if kind == MessageType.QUERY:
        return codec.encode_description(runtime.describe(client))
    if kind == MessageType.EVALUATE:
        return codec.encode_evaluation(runtime.evaluate(client, codec.decode_model(content)))
    instruction = codec.decode_instruction(content, deadline_s=deadline_s)
    return codec.encode_update(runtime.train(client, instruction, admission=admission))


def told_error(error: Exception, *, trusted: bool) -> tuple[int, str]:
    """Return what the server is told of an error, and keep the rest in the client's own log.

    The text of a foreign error may quote a record. Our own quote none, but those of a real client
    may name its size or its files.

    Args:
        error: What was raised.
        trusted: Whether the server may read the words of our own errors: it runs the clients.
    """
    if isinstance(error, FlAppError) and not _quotes_others(error):
        log.warning("This client fails: %s", one_line(str(error)))
        told = trusted or isinstance(error, _TOLD)
        return code_and_reason(error if told else _discreetly(error))
    log.exception("This client failed; the server is told the kind of error alone.", exc_info=error)
    failed = ClientFailedError(f"{type(error).__name__}; see the client's own log")
    return code_and_reason(failed)


_TOLD = (BudgetExhaustedError, codec.VersionError, RefusedRequestError)
"""Errors of a real client whose words its server may read: how a budget stands as far as its
owner's policy allows, and what quotes nothing but the server."""


def one_line(text: str) -> str:
    """Return what others may have written as it can stand in a log: short, and no line of ours."""
    return "".join(c if c.isprintable() else " " for c in text)[:_LONGEST_LINE]


def _discreetly(error: FlAppError) -> FlAppError:
    """Return an error of a real client without its words."""
    for kind in (PolicyError, ClientTimeoutError):
        if isinstance(error, kind):
            return kind("this client's own log says why")
    return ClientFailedError(f"{type(error).__name__}; this client's own log says why")


def _quotes_others(error: FlAppError) -> bool:
    """Return whether an error of ours was made of one that is not, such as a loss function's."""
    return error.__cause__ is not None and not isinstance(error.__cause__, FlAppError)


def _content(message: Message, context: Context) -> RecordDict:
    runtime = _runtime(context)
    return answer_content(
        message.metadata.message_type,
        message.content,
        runtime,
        client_of(context.node_config, runtime),
        deadline_s=codec.patience_of(message),
        admission=_admission(context.node_config),
    )


def client_of(node: Mapping[str, Any], runtime: ClientRuntime) -> ClientId:
    """Return the stable id of the client that a node with this config is.

    A node is the client that its ``client-id`` names, or else the one at position ``partition-id``
    of all clients in canonical order, whatever their names are.
    """
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
    first = messages[0]
    instruction = codec.decode_instruction(first.content, deadline_s=codec.patience_of(first))
    answers = runtime.admit(clients, instruction)
    return [
        error_reply(message, answer)
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
    return _runtime_for(
        str(context.run_config.get("config-json") or ""),
        str(context.run_config.get("overrides") or ""),
        connected=partitions if isinstance(partitions, int) and not in_process else None,
        in_process=in_process,
    )


def _check_simulated() -> None:
    """Refuse to serve a real client here, where code that the server sent would hold its data.

    Raises:
        NoSiteError: Ray, which Flower simulates with, is not running in this process.
    """
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        raise NoSiteError(
            f"this client has no site: start `fl-app site --policy FILE --socket PATH` and set "
            f"{SOCKET}=PATH for flower-superexec or flower-supernode. What the server sends is "
            "never given data to hold."
        )


def _is_in_process(context: Context) -> bool:
    """Return whether the engine that drives this process keeps what clients remember."""
    return bool(context.node_config.get("in-process"))


def local_runtime(run_config: UserConfig) -> ClientRuntime:
    """Return what serves the clients of this process for the engine that drives them."""
    return _runtime_for(
        str(run_config.get("config-json") or ""),
        str(run_config.get("overrides") or ""),
        connected=None,
        in_process=True,
    )


def local_states(run_config: UserConfig) -> MemoryClientState:
    """Return what the clients of this process remember, for the engine that drives them."""
    states = local_runtime(run_config).states
    if not isinstance(states, MemoryClientState):
        raise TypeError(f"Clients of this process remember in a {type(states).__name__}.")
    return states


def runtime_of(
    config: Mapping[str, Any],
    *,
    states: ClientStateStore,
    site: Site,
    trainer: CohortTrainer | None = None,
) -> ClientRuntime:
    """Return what serves the clients of this process under a configuration.

    Args:
        config: Checked.
        states: Where their memory between rounds is kept.
        site: Allows each round, and accounts for it.
        trainer: Trains them on another device, or None.
    """
    components = build(to_json(config))
    return ClientRuntime(
        task=components.task,
        data=components.data,
        training=components.training,
        objective=components.algorithm.objective,
        seed=components.seed,
        states=states,
        privacy=components.privacy,
        site=site,
        trainer=trainer,
    )


@lru_cache(maxsize=2)
def _runtime_for(
    config_json: str, overrides: str, *, connected: int | None, in_process: bool
) -> ClientRuntime:
    """Return the runtime that serves this process's simulated clients under a configuration.

    Args:
        config_json: Flower's run config of that name.
        overrides: Flower's run config of that name.
        connected: Nodes of the federation, if the node was told and it is not in process.
        in_process: Whether the engine that drives this process keeps what clients remember, in
            memory and in its checkpoints; else that lies on disk.
    """
    run_config = {"config-json": config_json, "overrides": overrides}
    config = from_run_config(run_config, connected=connected)
    if not in_process:
        adopt_threads(config)
    components = build(to_json(config))
    folder = Path(local_path(config["output_url"])) / "client_state"
    site = SimulatedSite.dealt(
        components.privacy, task=components.task.name, dealt=to_json(_dealt(config))
    )
    states: ClientStateStore = MemoryClientState() if in_process else DiskClientState(folder)
    return runtime_of(config, states=states, site=site)


def _dealt(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a configuration decides which records a client has; the model does not."""
    others = ("model", "loss", "extra_metrics")
    task = {key: value for key, value in config["task"].items() if key not in others}
    return {"task": task, "partition": config["partition"], "seed": config["seed"]}
