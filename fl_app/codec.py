"""Flower records <-> our types; the only home of record keys.

Message contents, by message type:

========  ==============================================  =========================================
type      instruction                                     reply
========  ==============================================  =========================================
train     ``arrays``: model; ``config``: server-round     ``arrays``: delta; ``metrics``
evaluate  ``arrays``: model; ``config``: server-round     ``metrics``
query     empty                                           ``client``: what it tells about itself
========  ==============================================  =========================================

``metrics`` holds ``num-examples``, ``train-*`` and ``test-*`` (with ``test-num-examples``): one
MetricRecord with ``num-examples``, as Flower's own strategies expect.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any, Literal, TypeAlias, TypeVar, cast

import numpy as np
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.common.constant import ErrorCode
from torch import Tensor

from fl_app.params import num_bytes
from fl_app.types import (
    ClientDescription,
    ClientId,
    ClientUpdate,
    Evaluation,
    FailureKind,
    FlAppError,
    Params,
    TrainInstruction,
)

_ARRAYS, _CONFIG, _METRICS, _CLIENT = "arrays", "config", "metrics", "client"
_ROUND, _NUM_EXAMPLES, _TEST_NUM_EXAMPLES = "server-round", "num-examples", "test-num-examples"
_TRAIN, _TEST = "train-", "test-"
_CLIENT_ID, _LABEL_COUNTS = "client-id", "label-counts"
_NPY = "numpy.ndarray"
_MOST_METRICS, _LONGEST_NAME = 64, 64
_RUN = "run"
_Order: TypeAlias = Literal["C", "F"]
_C_ORDER: _Order = "C"
_R = TypeVar("_R", ArrayRecord, MetricRecord, ConfigRecord)

_FAILURE_KINDS = {
    ErrorCode.NODE_UNAVAILABLE: FailureKind.OFFLINE,
    ErrorCode.MESSAGE_UNAVAILABLE: FailureKind.TIMEOUT,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: FailureKind.TIMEOUT,
}


class MalformedReplyError(FlAppError):
    """A reply is not what the protocol says; the message says what is wrong with it."""


# Parameters <-> ArrayRecord -----------------------------------------------------------------------


def encode_params(params: Params) -> ArrayRecord:
    """Return the tensors as Flower arrays, byte for byte as ``ArrayRecord(state_dict)`` gives them.

    About twenty times as fast for small tensors: the NPY header is made once per shape.
    """
    record = ArrayRecord()
    for name, tensor in params.items():
        values = tensor.detach().cpu().numpy()
        transposed = values.flags.f_contiguous and not values.flags.c_contiguous
        dtype = _dtype_name(values.dtype)
        header = _npy_header(dtype, values.shape, fortran_order=transposed)
        record[name] = Array(
            dtype=dtype,
            shape=values.shape,
            stype=_NPY,
            data=header + values.tobytes(order="F" if transposed else "C"),
        )
    return record


def decode_params(record: ArrayRecord) -> Params:
    """Return the tensors of a record.

    Each array must declare truly what it holds: the size of its data is checked against its
    declared shape and type before anything is parsed.

    Raises:
        MalformedReplyError: An array is not a plain numeric NPY array of its declared shape.
    """
    return {name: _decode_array(name, array) for name, array in record.items()}


def _decode_array(name: str, array: Array) -> Tensor:
    shape = tuple(array.shape)
    try:
        header = _npy_header(array.dtype, shape)
        if array.stype != _NPY:
            raise ValueError(f"it is serialised as {array.stype:.40}")
        offset, order = len(header), _C_ORDER
        if not array.data.startswith(header):
            offset, order = _read_npy_header(array)
        dtype = np.dtype(array.dtype)
        if min(shape, default=0) < 0:
            raise ValueError("no size can be negative")
        if len(array.data) - offset != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"it holds {len(array.data) - offset} bytes of values")
        flat = np.frombuffer(array.data, dtype=dtype, offset=offset)
        # The copy makes the tensor writable and independent of the message.
        return torch.from_numpy(flat.reshape(shape, order=order).copy(order="C"))
    # NumPy has Python's parser read types and headers, which raises all kinds of things.
    except Exception as error:
        claim = f"{array.dtype:.40}{shape}"
        raise MalformedReplyError(
            f"array {name!r:.80} is not the {claim:.80} it claims to be: {error}"
        ) from error


def _read_npy_header(array: Array) -> tuple[int, _Order]:
    """Return where the values begin and in which order they lie, for a header not as ours.

    Such as of a transposed array, or one padded otherwise by another release of NumPy.

    Raises:
        ValueError: The header is broken, or states another shape or type than the array declares.
    """
    stream = io.BytesIO(array.data)
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"NPY format {version} is not known")
    shape, fortran_order, dtype = read(stream)
    if shape != tuple(array.shape) or dtype != np.dtype(array.dtype):
        raise ValueError(f"it holds {dtype}{shape}")
    return stream.tell(), "F" if fortran_order else "C"


@lru_cache(maxsize=64)
def _dtype_name(dtype: np.dtype[Any]) -> str:
    """Return NumPy's name of a type, such as "float32", which NumPy makes anew at every call."""
    return str(dtype)


@lru_cache(maxsize=1024)
def _npy_header(dtype: str, shape: tuple[int, ...], *, fortran_order: bool = False) -> bytes:
    """Return what NumPy's format puts before the values of an array."""
    described = np.dtype(dtype)
    if described.kind not in "fiub":
        raise ValueError(f"dtype {dtype} is not numeric")
    header = {
        "descr": np.lib.format.dtype_to_descr(described),
        "fortran_order": fortran_order,
        "shape": shape,
    }
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


# Server side --------------------------------------------------------------------------------------


def instruction_config(run: str) -> ConfigRecord:
    """Return what every instruction of the run of this name carries besides the model."""
    return ConfigRecord({_RUN: run})


def train_messages(
    node_ids: Iterable[int], arrays: ArrayRecord, config: ConfigRecord, *, round: int, ttl: float
) -> list[Message]:
    """Return one training instruction a node; all share the same records."""
    return _messages(node_ids, MessageType.TRAIN, arrays, config, round=round, ttl=ttl)


def evaluate_messages(
    node_ids: Iterable[int], arrays: ArrayRecord, config: ConfigRecord, *, round: int, ttl: float
) -> list[Message]:
    """Return one evaluation instruction a node; all share the same records."""
    return _messages(node_ids, MessageType.EVALUATE, arrays, config, round=round, ttl=ttl)


def query_messages(node_ids: Iterable[int], *, ttl: float) -> list[Message]:
    """Return one question a node: who it is, and what it is willing to tell."""
    return [Message(RecordDict(), node, MessageType.QUERY, ttl=ttl) for node in node_ids]


def _messages(
    node_ids: Iterable[int],
    message_type: str,
    arrays: ArrayRecord,
    config: ConfigRecord,
    *,
    round: int,
    ttl: float,
) -> list[Message]:
    config[_ROUND] = round
    content = RecordDict({_ARRAYS: arrays, _CONFIG: config})
    return [Message(content, node, message_type, ttl=ttl, group_id=str(round)) for node in node_ids]


def failure_of(reply: Message) -> tuple[FailureKind, str] | None:
    """Return why a reply carries no content, in one line, or None if it carries some."""
    if not reply.has_error():
        return None
    lines = (reply.error.reason or "").strip().splitlines() or ["no reason given"]
    return _FAILURE_KINDS.get(reply.error.code, FailureKind.ERROR), lines[-1][:500]


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
        metrics=_floats(metrics, _TRAIN),
        evaluation=_decode_evaluation(metrics),
        num_bytes=num_bytes(delta),
        num_bytes_uncompressed=num_bytes(delta),
    )


def decode_evaluation(reply: Message) -> Evaluation:
    """Return the evaluation in a reply to an evaluation instruction.

    Raises:
        MalformedReplyError: There is none.
    """
    evaluation = _decode_evaluation(_record(reply, _METRICS, MetricRecord))
    if evaluation is None:
        raise MalformedReplyError(f"{_TEST_NUM_EXAMPLES} is missing")
    return evaluation


def decode_description(reply: Message) -> ClientDescription:
    """Return what a client tells about itself.

    Raises:
        MalformedReplyError: It gives no id, or no count.
    """
    told = _record(reply, _CLIENT, ConfigRecord)
    client, num_examples = told.get(_CLIENT_ID), told.get(_NUM_EXAMPLES)
    if not isinstance(client, str) or not client or not isinstance(num_examples, int):
        raise MalformedReplyError(f"client-id={client!r:.40}, num-examples={num_examples!r:.40}")
    counts = told.get(_LABEL_COUNTS)
    return ClientDescription(
        client=client,
        num_examples=num_examples,
        label_counts=tuple(cast(list[int], counts)) if isinstance(counts, list) else None,
    )


def _record(reply: Message, key: str, kind: type[_R]) -> _R:
    record = reply.content.get(key)
    if not isinstance(record, kind):
        raise MalformedReplyError(f"its {kind.__name__} {key!r} is missing")
    return record


def _floats(metrics: MetricRecord, prefix: str) -> Mapping[str, float]:
    """Return the figures with a prefix; what is no plain finite figure is left out.

    They go into means, and into files that must stay readable, whatever a client sends.
    """
    named = {
        key.removeprefix(prefix).replace("-", "_"): float(value)
        for key, value in islice(metrics.items(), _MOST_METRICS)
        if key.startswith(prefix) and isinstance(value, (int, float))
    }
    return {
        name: value
        for name, value in named.items()
        if math.isfinite(value) and len(name) <= _LONGEST_NAME and name.isidentifier()
    }


def _decode_evaluation(metrics: MetricRecord) -> Evaluation | None:
    count = metrics.get(_TEST_NUM_EXAMPLES)
    if not isinstance(count, int) or count <= 0:
        return None
    figures = {k: v for k, v in _floats(metrics, _TEST).items() if k != "num_examples"}
    return Evaluation(num_examples=count, metrics=figures)


# Client side --------------------------------------------------------------------------------------

_last_model: tuple[ArrayRecord, Params] | None = None


def decode_model(instruction: Message) -> Params:
    """Return the model in a training or evaluation instruction; do not write to it.

    In process all clients of a round get the very same record, which is decoded once.
    """
    global _last_model
    arrays = cast(ArrayRecord, instruction.content[_ARRAYS])
    if _last_model is None or _last_model[0] is not arrays:
        _last_model = (arrays, decode_params(arrays))
    return _last_model[1]


def decode_instruction(instruction: Message) -> TrainInstruction:
    """Return what the server asks of a client."""
    config = cast(ConfigRecord, instruction.content[_CONFIG])
    metadata = instruction.metadata
    return TrainInstruction(
        round=cast(int, config[_ROUND]),
        params=decode_model(instruction),
        run=str(config.get(_RUN, ""))[:_LONGEST_NAME],
        deadline_s=metadata.created_at + metadata.ttl - time.time(),
    )


def update_reply(instruction: Message, update: ClientUpdate) -> Message:
    """Return the reply that carries an update."""
    metrics: dict[str, int | float] = {_NUM_EXAMPLES: update.num_examples}
    metrics |= {f"{_TRAIN}{name.replace('_', '-')}": v for name, v in update.metrics.items()}
    metrics |= _encode_evaluation(update.evaluation)
    content = RecordDict(
        {_ARRAYS: encode_params(update.delta), _METRICS: MetricRecord(dict(metrics))}
    )
    return Message(content, reply_to=instruction)


def evaluation_reply(instruction: Message, evaluation: Evaluation) -> Message:
    """Return the reply that carries an evaluation."""
    metrics = {_NUM_EXAMPLES: evaluation.num_examples} | _encode_evaluation(evaluation)
    return Message(RecordDict({_METRICS: MetricRecord(dict(metrics))}), reply_to=instruction)


def description_reply(instruction: Message, told: ClientDescription) -> Message:
    """Return the reply that carries what a client tells about itself."""
    config = ConfigRecord({_CLIENT_ID: told.client, _NUM_EXAMPLES: told.num_examples})
    if told.label_counts is not None:
        config[_LABEL_COUNTS] = list(told.label_counts)
    return Message(RecordDict({_CLIENT: config}), reply_to=instruction)


def error_reply(instruction: Message, error: BaseException) -> Message:
    """Return the reply of a client that failed; as Flower's own runtimes give it."""
    reason = f"{type(error).__name__}: {error}"
    late = type(error).__name__ == "ClientTimeoutError"
    code = ErrorCode.REPLY_MESSAGE_UNAVAILABLE if late else ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    return Message(Error(code=code, reason=reason), reply_to=instruction)


def _encode_evaluation(evaluation: Evaluation | None) -> dict[str, int | float]:
    if evaluation is None:
        return {}
    figures: dict[str, int | float] = {_TEST_NUM_EXAMPLES: evaluation.num_examples}
    return figures | {
        f"{_TEST}{name.replace('_', '-')}": value for name, value in evaluation.metrics.items()
    }
