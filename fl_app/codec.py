"""Flower records <-> our types; the only home of record keys.

Message contents, by message type:

========  ==============================================  =========================================
type      instruction                                     reply
========  ==============================================  =========================================
train     ``arrays``: model; ``config``: server-round,    ``arrays``: delta; ``metrics``
          run, max-norm
evaluate  ``arrays``: model; ``config``: server-round     ``metrics``
query     empty                                           ``client``: what it tells about itself
========  ==============================================  =========================================

``metrics`` holds ``num-examples``, ``train-*`` and ``test-*`` (with ``test-num-examples``): one
MetricRecord with ``num-examples``, as Flower's own strategies expect.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)

from fl_app import __version__
from fl_app.arrays import MalformedReplyError, decode_params, encode_params
from fl_app.metric_records import (
    TEST_NUM_EXAMPLES,
    decode_evaluation_in,
    evaluation_figures,
    figures_of,
)
from fl_app.params import num_bytes
from fl_app.types import (
    Budget,
    ClientDescription,
    ClientId,
    ClientUpdate,
    Evaluation,
    FlAppError,
    Params,
    TrainInstruction,
)

_ARRAYS, _CONFIG, _METRICS, _CLIENT = "arrays", "config", "metrics", "client"
_ROUND, _NUM_EXAMPLES, _TRAIN = "server-round", "num-examples", "train-"
_CLIENT_ID, _LABEL_COUNTS = "client-id", "label-counts"
_LONGEST_NAME, _MOST_LABELS, _LAST_ROUND = 64, 10_000, 10**9
_RUN, _RUN_DIR, _MAX_NORM, _VERSION = "run", "run-dir", "max-norm", "fl-app"
_PRIVACY, _SPENT, _EPSILON = "privacy", "epsilon-spent", "epsilon"
_DELTA, _ROUNDS_LEFT = "delta", "rounds-left"
_R = TypeVar("_R", ArrayRecord, MetricRecord, ConfigRecord)


# Server side --------------------------------------------------------------------------------------


def instruction_config(
    run: str, further: Mapping[str, Any], *, run_dir: str | None = None
) -> ConfigRecord:
    """Return what every instruction of the run of this name carries besides the model.

    Args:
        run: The run's name.
        further: What the configuration adds for ClientApps of others.
        run_dir: The run's folder, for simulated clients alone.
    """
    return ConfigRecord({**further, _RUN: run, **({_RUN_DIR: run_dir} if run_dir else {})})


def ask_to_clip(config: ConfigRecord, max_norm: float) -> None:
    """Put the round's L2 bound on updates into what instructions carry."""
    config[_MAX_NORM] = max_norm


def instruction(arrays: ArrayRecord, config: ConfigRecord, *, round: int) -> RecordDict:
    """Return what an instruction carries: the model, and the configuration with the round in it."""
    config[_ROUND], config[_VERSION] = round, __version__
    return RecordDict({_ARRAYS: arrays, _CONFIG: config})


def train_messages(contents: Mapping[int, RecordDict], *, round: int, ttl: float) -> list[Message]:
    """Return one training instruction for each (node, content)."""
    return _messages(contents, MessageType.TRAIN, round=round, ttl=ttl)


def evaluate_messages(
    contents: Mapping[int, RecordDict], *, round: int, ttl: float
) -> list[Message]:
    """Return one evaluation instruction for each (node, content)."""
    return _messages(contents, MessageType.EVALUATE, round=round, ttl=ttl)


def query_messages(node_ids: Iterable[int], *, ttl: float) -> list[Message]:
    """Return one question a node: who it is, and what it is willing to tell."""
    return [Message(RecordDict(), node, MessageType.QUERY, ttl=ttl) for node in node_ids]


def _messages(
    contents: Mapping[int, RecordDict], message_type: str, *, round: int, ttl: float
) -> list[Message]:
    return [
        Message(content, node, message_type, ttl=ttl, group_id=str(round))
        for node, content in contents.items()
    ]


def decode_update(reply: Message, client: ClientId) -> ClientUpdate:
    """Return the update in a reply to a training instruction.

    Args:
        reply: A reply with content.
        client: Who sent it, by the server's own directory: what a reply says of itself is not
            to be trusted.

    Raises:
        MalformedReplyError: Records or keys are missing, or an array is not what it claims to be.
    """
    arrays = _record(reply, _ARRAYS, ArrayRecord)
    metrics = _record(reply, _METRICS, MetricRecord)
    num_examples = metrics.get(_NUM_EXAMPLES)
    if not isinstance(num_examples, int):
        raise MalformedReplyError(f"num-examples={num_examples!r:.40} is not a whole number")
    group = reply.metadata.group_id
    if not (group.isascii() and group.isdecimal()):
        raise MalformedReplyError(f"group-id={group!r:.40} is not the number of a round")
    delta = decode_params(arrays)
    return ClientUpdate(
        client=client,
        round=int(group),
        delta=delta,
        num_examples=num_examples,
        metrics=figures_of(metrics, _TRAIN),
        evaluation=decode_evaluation_in(metrics),
        num_bytes=num_bytes(delta),
        num_bytes_uncompressed=num_bytes(delta),
        budget=_decode_budget(reply),
    )


def decode_evaluation(reply: Message) -> Evaluation:
    """Return the evaluation in a reply to an evaluation instruction.

    Raises:
        MalformedReplyError: There is none.
    """
    evaluation = decode_evaluation_in(_record(reply, _METRICS, MetricRecord))
    if evaluation is None:
        raise MalformedReplyError(f"{TEST_NUM_EXAMPLES} is missing")
    return evaluation


def decode_description(reply: Message) -> ClientDescription:
    """Return what a client tells about itself.

    Raises:
        MalformedReplyError: It gives no id, or a count that is none.
    """
    told = _record(reply, _CLIENT, ConfigRecord)
    client, num_examples = told.get(_CLIENT_ID), told.get(_NUM_EXAMPLES)
    if not (isinstance(client, str) and client and isinstance(num_examples, int | None)):
        raise MalformedReplyError(f"client-id={client!r:.40}, num-examples={num_examples!r:.40}")
    return ClientDescription(
        client=client,
        num_examples=num_examples,
        label_counts=_decode_label_counts(told.get(_LABEL_COUNTS)),
    )


def _decode_label_counts(counts: object) -> tuple[int, ...] | None:
    """Return the counts, or None if there are none, or what was sent cannot be counts."""
    if not isinstance(counts, list) or len(counts) > _MOST_LABELS:
        return None
    told = tuple(count for count in counts if isinstance(count, int) and count >= 0)
    return told if len(told) == len(counts) else None


def _record(reply: Message, key: str, kind: type[_R]) -> _R:
    record = reply.content.get(key)
    if not isinstance(record, kind):
        raise MalformedReplyError(f"its {kind.__name__} {key!r} is missing")
    return record


def model_replies(
    updates: Mapping[int, ClientUpdate], model: Params, *, round: int
) -> list[Message]:
    """Return updates as the replies that Flower's own strategies expect.

    That is the whole local model, and figures that all replies have. Those of the training go by
    "train-loss" and, as Flower's QFedAvg asks for it, by "train_loss".

    Args:
        updates: Node -> update, in canonical client order.
        model: The global model that the updates change.
        round: The round that they answer.
    """
    shared = set.intersection(*(set(update.metrics) for update in updates.values()))
    replies = []
    for node, update in updates.items():
        figures: dict[str, int | float] = {_NUM_EXAMPLES: update.num_examples}
        for name in sorted(shared):
            hyphenated = f"{_TRAIN}{name.replace('_', '-')}"
            figures[hyphenated] = figures[hyphenated.replace("-", "_")] = update.metrics[name]
        local = {name: tensor + update.delta[name] for name, tensor in model.items()}
        content = RecordDict({_ARRAYS: encode_params(local), _METRICS: MetricRecord(dict(figures))})
        asked = Message(RecordDict(), node, MessageType.TRAIN, group_id=str(round))
        replies.append(Message(content, reply_to=asked))
    return replies


def _decode_budget(reply: Message) -> Budget | None:
    """Return what a client tells of its budget; None if it tells nothing that makes sense."""
    record = reply.content.get(_PRIVACY)
    if not isinstance(record, ConfigRecord):
        return None
    spent, limit, delta = (record.get(key) for key in (_SPENT, _EPSILON, _DELTA))
    left = record.get(_ROUNDS_LEFT)
    if not (isinstance(spent, float) and isinstance(delta, float)):
        return None
    if not (0 <= spent < math.inf and 0 < delta < 1):
        return None
    return Budget(
        epsilon_spent=spent,
        epsilon=limit if isinstance(limit, float) else None,
        delta=delta,
        rounds_left=left if isinstance(left, int) else None,
    )


# Client side --------------------------------------------------------------------------------------

_last_model: tuple[ArrayRecord, Params] | None = None


def decode_model(content: RecordDict) -> Params:
    """Return the model in a training or evaluation instruction; do not write to it.

    In process all clients of a round get the very same record, which is decoded once.
    """
    global _last_model
    arrays = cast(ArrayRecord, content[_ARRAYS])
    if _last_model is None or _last_model[0] is not arrays:
        _last_model = (arrays, decode_params(arrays))
    return _last_model[1]


def encode_model(params: Params) -> ArrayRecord:
    """Return a global model as Flower's arrays; decoding these in this process costs nothing."""
    global _last_model
    arrays = encode_params(params)
    _last_model = (arrays, params)
    return arrays


def patience_of(instruction: Message) -> float:
    """Return for how many seconds yet the server waits for an answer."""
    metadata = instruction.metadata
    return metadata.created_at + metadata.ttl - time.time()


class MalformedInstructionError(FlAppError):
    """A server's message is no instruction."""


class VersionError(FlAppError):
    """Server and site run versions of fl-app that do not understand one another."""


def check_version(content: RecordDict) -> None:
    """Refuse an instruction of a server whose fl-app differs in more than the last number.

    Raises:
        VersionError: It does.
    """
    config = content.get(_CONFIG)
    told = config.get(_VERSION) if isinstance(config, ConfigRecord) else None
    if isinstance(told, str) and told.split(".")[:2] != __version__.split(".")[:2]:
        raise VersionError(
            f"the server runs fl-app {told[:20]} and this site {__version__}: upgrade the older "
            "one; versions that differ in the last number alone work together."
        )


def described(kind: str, content: RecordDict) -> str:
    """Return what a message asks in a few words, for a site's log."""
    config = content.get(_CONFIG)
    if not isinstance(config, ConfigRecord):
        return kind
    return f"{kind} in round {config.get(_ROUND)!r:.20} of run {config.get(_RUN)!r:.24}"


def decode_instruction(content: RecordDict, *, deadline_s: float | None) -> TrainInstruction:
    """Return what a training instruction says, to whomever it is sent.

    Raises:
        MalformedInstructionError: It is none.
    """
    config = content.get(_CONFIG)
    if not (isinstance(config, ConfigRecord) and isinstance(content.get(_ARRAYS), ArrayRecord)):
        raise MalformedInstructionError("the instruction holds no model, or no configuration.")
    max_norm, round, run = config.get(_MAX_NORM), config.get(_ROUND), config.get(_RUN, "")
    # Both go into the ledger, which holds nothing that it could not read again.
    if type(round) is not int or not 1 <= round <= _LAST_ROUND or not isinstance(run, str):
        raise MalformedInstructionError(f"round={round!r:.20} or run={run!r:.20} cannot be.")
    return TrainInstruction(
        round=round,
        params=decode_model(content),
        run=run[:_LONGEST_NAME],
        deadline_s=deadline_s,
        max_norm=max_norm if isinstance(max_norm, float) and 0 < max_norm < math.inf else None,
        run_dir=str(config[_RUN_DIR]) if _RUN_DIR in config else None,
    )


def encode_update(update: ClientUpdate) -> RecordDict:
    """Return the reply that carries an update."""
    metrics: dict[str, int | float] = {_NUM_EXAMPLES: update.num_examples}
    metrics |= {f"{_TRAIN}{name.replace('_', '-')}": v for name, v in update.metrics.items()}
    metrics |= evaluation_figures(update.evaluation)
    content = RecordDict(
        {_ARRAYS: encode_params(update.delta), _METRICS: MetricRecord(dict(metrics))}
    )
    if update.budget is not None:
        content[_PRIVACY] = _encode_budget(update.budget)
    return content


def encode_evaluation(evaluation: Evaluation) -> RecordDict:
    """Return the reply that carries an evaluation."""
    metrics = {_NUM_EXAMPLES: evaluation.num_examples} | evaluation_figures(evaluation)
    return RecordDict({_METRICS: MetricRecord(dict(metrics))})


def encode_description(told: ClientDescription) -> RecordDict:
    """Return the reply that carries what a client tells about itself."""
    config = ConfigRecord({_CLIENT_ID: told.client})
    if told.num_examples is not None:
        config[_NUM_EXAMPLES] = told.num_examples
    if told.label_counts is not None:
        config[_LABEL_COUNTS] = list(told.label_counts)
    return RecordDict({_CLIENT: config})


def _encode_budget(budget: Budget) -> ConfigRecord:
    record = ConfigRecord({_SPENT: budget.epsilon_spent, _DELTA: budget.delta})
    if budget.epsilon is not None:
        record[_EPSILON] = budget.epsilon
    if budget.rounds_left is not None:
        record[_ROUNDS_LEFT] = budget.rounds_left
    return record
