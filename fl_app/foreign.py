"""ClientApps that somebody else wrote, such as those of Flower's tutorials.

They get real Flower messages, and answer as Flower's own strategies expect: with their whole model
in the reply's one ArrayRecord, and ``num-examples`` among its metrics. What of ours is theirs to
tell is decided here alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from fl_app import codec
from fl_app.arrays import MalformedReplyError, decode_params
from fl_app.client_state import MemoryClientState
from fl_app.metric_records import figures_of
from fl_app.params import num_bytes
from fl_app.types import (
    ClientId,
    ClientUpdate,
    ConfigError,
    Evaluation,
    Params,
    Role,
    seeded_globals,
    stream_seed,
)

OURS = "fl_app.client_app:app"
_STATE = "context"
_NUM_EXAMPLES = "num-examples"


class Replies(Protocol):
    """Reads what clients send."""

    def update(self, reply: Message, client: ClientId, model: Params) -> ClientUpdate:
        """Return the update in a reply to a training instruction that carried ``model``.

        Raises:
            MalformedReplyError: There is none.
        """
        ...

    def evaluation(self, reply: Message) -> Evaluation:
        """Return the evaluation in a reply to an evaluation instruction. Raises likewise."""
        ...


class OurReplies:
    """Replies of `fl_app.client_app`, which carry deltas."""

    def update(self, reply: Message, client: ClientId, model: Params) -> ClientUpdate:
        """Return the update in a reply."""
        return codec.decode_update(reply, client)

    def evaluation(self, reply: Message) -> Evaluation:
        """Return the evaluation in a reply."""
        return codec.decode_evaluation(reply)


class StockReplies:
    """Replies as Flower's own strategies expect them, which carry whole models."""

    def update(self, reply: Message, client: ClientId, model: Params) -> ClientUpdate:
        """Return the update in a reply: the delta is its model less the one it was sent.

        Arrays that do not fit the model are passed on as they are, for validation to name.
        """
        group = reply.metadata.group_id
        if not (group.isascii() and group.isdecimal()):
            raise MalformedReplyError(f"group-id={group!r:.40} is not the number of a round")
        trained = decode_params(_only(reply, ArrayRecord))
        metrics = _only(reply, MetricRecord)
        delta = {
            name: tensor - model[name]
            if name in model and model[name].shape == tensor.shape
            else tensor
            for name, tensor in trained.items()
        }
        return ClientUpdate(
            client=client,
            round=int(group),
            delta=delta,
            num_examples=_count(metrics),
            metrics=_figures(metrics, "train_"),
            num_bytes=num_bytes(trained),
            num_bytes_uncompressed=num_bytes(trained),
        )

    def evaluation(self, reply: Message) -> Evaluation:
        """Return the evaluation in a reply; ``eval_loss`` becomes ``loss``."""
        metrics = _only(reply, MetricRecord)
        return Evaluation(num_examples=_count(metrics), metrics=_figures(metrics, "eval_"))


@dataclass(frozen=True, kw_only=True)
class ClientAppChoice:
    """What the clients run.

    Attributes:
        app: A Flower ClientApp, as "package.module:attribute" or "package.module.attribute".
            ``engine=local`` runs any; in a federation the nodes run that of the app bundle.
        replies: What it sends: "delta" or "model", as Flower's own strategies expect; None is
            delta for our own app and model for any other.
        train_config: What the ConfigRecord of each training instruction carries besides
            ``server-round``, such as ``lr``.
        run_config: What the app finds in its ``Context.run_config``, in ``engine=local``.
    """

    app: str = OURS
    replies: str | None = None
    train_config: Mapping[str, Any] = field(default_factory=dict)
    run_config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.replies not in (None, "delta", "model"):
            raise ConfigError(
                f"client_app.replies={self.replies} is not known: choose delta, model, or null for "
                "what fits the app."
            )
        if taken := set(self.train_config) & {"server-round", "run"}:
            raise ConfigError(
                f"client_app.train_config.{min(taken)} is set by the server: take another name."
            )
        try:
            ConfigRecord(dict(self.train_config))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"client_app.train_config={dict(self.train_config)} cannot be sent ({error}): give "
                "numbers, strings, booleans, or lists of one of them."
            ) from error
        for key, value in self.run_config.items():
            if not isinstance(value, bool | int | float | str):
                raise ConfigError(
                    f"client_app.run_config.{key}={value!r:.80} must be a number, a string or a "
                    "boolean: Flower's run config holds nothing else."
                )

    @property
    def is_ours(self) -> bool:
        """Whether the app is `fl_app.client_app`."""
        return self.app.replace(":", ".") == OURS.replace(":", ".")

    def reader(self) -> Replies:
        """Return what reads the app's replies."""
        model = self.replies == "model" or (self.replies is None and not self.is_ours)
        return StockReplies() if model else OurReplies()

    def load(self) -> ClientApp:
        """Return the app.

        Raises:
            ConfigError: It cannot be imported, or is none.
        """
        module, _, attribute = self.app.replace(":", ".").rpartition(".")
        try:
            loaded = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # an import runs code that may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(
                f"client_app.app={self.app} cannot be imported ({reason}): name a ClientApp as "
                "package.module:attribute, of a package that is installed or on PYTHONPATH."
            ) from error
        if not isinstance(loaded, ClientApp):
            raise ConfigError(
                f"client_app.app={self.app} is a {type(loaded).__name__}, not a "
                "flwr.clientapp.ClientApp: name the attribute that holds one."
            )
        return loaded


class SimulatedApp:
    """A ClientApp with what Flower's runtime gives each client: a ``Context.state`` that lasts.

    Before each call torch's, NumPy's and Python's global generators are seeded by (seed, round,
    client), and put back after it: apps draw the order of their records from them, and which
    process a client is trained in must not show. What a call that raises did to the state is
    dropped.

    Args:
        app: The app.
        states: Keeps the clients' states.
        seed: The run's seed.
    """

    def __init__(
        self, app: Callable[[Message, Context], Message], states: MemoryClientState, *, seed: int
    ) -> None:
        self._app = app
        self._states = states
        self._seed = seed

    def __call__(self, message: Message, context: Context) -> Message:
        """Return the app's reply."""
        client = str(context.node_config["client-id"])
        round = int(message.metadata.group_id or 0)
        kept = self._states.of(client).get(client)
        if kept is not None:
            content = ProtoRecordDict.FromString(kept[1][_STATE].numpy().tobytes())
            context.state = recorddict_from_proto(content)
        with seeded_globals(stream_seed(self._seed, Role.LAYERS, round=round, client=client)):
            reply = self._app(message, context)
        if len(context.state):
            content = recorddict_to_proto(context.state).SerializeToString(deterministic=True)
            tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            self._states.put(client, {_STATE: tensor}, round=round)
        return reply


def _only(reply: Message, kind: type[Any]) -> Any:
    """Return the one record of a kind; Flower's strategies insist on one, whatever its name."""
    records = [record for record in reply.content.values() if isinstance(record, kind)]
    if len(records) != 1:
        raise MalformedReplyError(f"it holds {len(records)} records of type {kind.__name__}, not 1")
    return records[0]


def _count(metrics: MetricRecord) -> int:
    count = metrics.get(_NUM_EXAMPLES)
    if not isinstance(count, int) or count <= 0:
        raise MalformedReplyError(f"num-examples={count!r:.40} is not a whole number > 0")
    return count


def _figures(metrics: MetricRecord, prefix: str) -> dict[str, float]:
    figures = figures_of(metrics, "")
    return {k.removeprefix(prefix): v for k, v in figures.items() if k != "num_examples"}
