"""The Flower ClientApp: messages in, messages out; the work is `fl_app.client`'s."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import TypeAlias

from flwr.app import Context, Message, UserConfig
from flwr.clientapp import ClientApp

from fl_app import codec
from fl_app.client import ClientRuntime
from fl_app.client_state import ClientStateStore, DiskClientState, MemoryClientState
from fl_app.config import build, from_run_config, to_json
from fl_app.run_config import local_path
from fl_app.types import ClientId, ConfigError, FlAppError

log = logging.getLogger(__name__)

app = ClientApp()

_Handler: TypeAlias = Callable[[Message, Context], Message]


def _discreet(handler: _Handler) -> _Handler:
    """Keep the text of foreign errors on the client: it may quote a record.

    Our own errors quote none, and clients of ``engine=local`` have nothing to keep from their
    server.
    """

    @wraps(handler)
    def handle(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except FlAppError:
            raise
        except Exception as error:
            if _is_in_process(context):
                raise
            log.exception("This client failed; the server is told the kind of error alone.")
            raise ClientFailedError(f"{type(error).__name__}; see the client's own log") from None

    return handle


class ClientFailedError(FlAppError):
    """A client failed in code that is not ours."""


@app.train()
@_discreet
def train(message: Message, context: Context) -> Message:
    """Train the received model, and measure it on the way, in one reply."""
    instruction = codec.decode_instruction(message)
    return codec.update_reply(message, _runtime(context).train(_client(context), instruction))


@app.evaluate()
@_discreet
def evaluate(message: Message, context: Context) -> Message:
    """Measure the received model on the client's own held-out part."""
    params = codec.decode_model(message)
    return codec.evaluation_reply(message, _runtime(context).evaluate(_client(context), params))


@app.query()
@_discreet
def query(message: Message, context: Context) -> Message:
    """Tell who this client is, and what it is willing to tell about itself."""
    return codec.description_reply(message, _runtime(context).describe(_client(context)))


def _client(context: Context) -> ClientId:
    """Return the stable id of the client that a node is."""
    node = context.node_config
    name = node.get("client-id", node.get("partition-id"))
    if name is None:
        raise ConfigError(
            "this node has no name: start it with --node-config "
            "'partition-id=0 num-partitions=3' or 'client-id=\"NAME\"'."
        )
    return str(name)


def _runtime(context: Context) -> ClientRuntime:
    return _runtime_for(
        str(context.run_config.get("config-json") or ""),
        str(context.run_config.get("overrides") or ""),
        in_process=_is_in_process(context),
    )


def _is_in_process(context: Context) -> bool:
    """Return whether the engine that drives this process keeps what clients remember."""
    return bool(context.node_config.get("in-process", 0))


def local_states(run_config: UserConfig) -> MemoryClientState:
    """Return what the clients of this process remember, for the engine that drives them."""
    states = _runtime_for(
        str(run_config.get("config-json") or ""),
        str(run_config.get("overrides") or ""),
        in_process=True,
    ).states
    if not isinstance(states, MemoryClientState):
        raise TypeError(f"Clients of this process remember in a {type(states).__name__}.")
    return states


@lru_cache(maxsize=2)
def _runtime_for(config_json: str, overrides: str, *, in_process: bool) -> ClientRuntime:
    """Return the runtime that serves this process's clients under a configuration.

    Args:
        config_json: Flower's run config of that name.
        overrides: Flower's run config of that name.
        in_process: Whether the engine that drives this process keeps what clients remember, in
            memory and in its checkpoints; else that lies on disk.
    """
    config = from_run_config({"config-json": config_json, "overrides": overrides})
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
    )
