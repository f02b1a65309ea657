"""Records are Flower's to the byte, come back to the bit, and are trusted in nothing."""

from __future__ import annotations

import io
import math
import pickle
import time
import tracemalloc

import numpy as np
import pytest
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
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fl_app import codec
from fl_app.arrays import MalformedReplyError, decode_params, encode_params
from fl_app.engines.local import adopt_identity
from fl_app.failures import error_reply, failure_of
from fl_app.training import ClientTimeoutError
from fl_app.types import ClientDescription, ClientUpdate, Evaluation, FailureKind

NPY = "numpy.ndarray"
LAYOUTS = {
    "scalar": torch.tensor(1.5),
    "vector": torch.arange(5.0),
    "no elements": torch.zeros(0),
    "no rows": torch.zeros(0, 3),
    "no columns, transposed": torch.zeros(3, 0).T,
    "matrix": torch.arange(6.0).reshape(2, 3),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "axes swapped": torch.arange(24.0).reshape(2, 3, 4).transpose(1, 2),
    "all axes reversed": torch.arange(24.0).reshape(2, 3, 4).permute(2, 1, 0),
    "channels last": torch.arange(48.0).reshape(2, 3, 2, 4).to(memory_format=torch.channels_last),
    "every other": torch.arange(6.0)[::2],
    "expanded": torch.ones(1).expand(3),
    "part of another": torch.arange(12.0).reshape(3, 4)[1:, 1:3],
    "needs a gradient": torch.ones(2, requires_grad=True),
}
DTYPES = [torch.float16, torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def flower_knows_its_task() -> None:
    adopt_identity()


def array(
    data: bytes, *, dtype: str = "float32", shape: tuple[int, ...] = (2,), stype: str = NPY
) -> ArrayRecord:
    record = ArrayRecord()
    record["w"] = Array(dtype=dtype, shape=shape, stype=stype, data=data)
    return record


def npy(values: np.ndarray, *, version: tuple[int, int] = (1, 0)) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, values, version=version)
    return buffer.getvalue()


def header(dtype: str, shape: str) -> bytes:
    """Return an NPY header that says whatever it likes."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


TWO = np.array([1.0, 2.0], dtype=np.float32)


# Parameters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_arrays_are_flowers_to_the_byte_and_come_back_to_the_bit(layout, dtype) -> None:
    tensor = layout.to(dtype)
    ours = encode_params({"w": tensor})
    theirs = ArrayRecord({"w": tensor.detach()})
    assert ours["w"] == theirs["w"]
    assert ours.object_id == theirs.object_id
    back = decode_params(ours)["w"]
    assert back.dtype == dtype
    assert back.is_contiguous()
    assert torch.equal(back, tensor)
    assert np.array_equal(ours["w"].numpy(), tensor.detach().numpy())


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    bits = draw(st.binary(min_size=8 * math.prod(shape), max_size=8 * math.prod(shape)))
    flat = torch.frombuffer(bytearray(bits), dtype=torch.float64) if bits else torch.zeros(0)
    tensor = flat.to(dtype).reshape(shape)
    return tensor.permute(draw(st.permutations(range(len(shape)))))


@given(st.dictionaries(st.text(min_size=1, max_size=8), tensors(), max_size=4))
def test_decoding_undoes_encoding_whatever_the_bits(params) -> None:
    back = decode_params(encode_params(params))
    assert list(back) == list(params)
    for name, tensor in params.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        assert back[name].numpy().tobytes() == tensor.contiguous().numpy().tobytes()


def test_a_decoded_tensor_is_writable_and_follows_no_message() -> None:
    record = encode_params({"w": torch.zeros(2)})
    decode_params(record)["w"].add_(1)
    assert decode_params(record)["w"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "data",
    [
        npy(TWO, version=(2, 0)),
        npy(np.asfortranarray(TWO)),
        header("<f4", "(2,)") + TWO.tobytes(),
        header("<f4", "( 2, )") + TWO.tobytes(),
    ],
    ids=["version 2", "fortran", "without padding", "spaced"],
)
def test_headers_of_other_writers_are_understood(data) -> None:
    assert decode_params(array(data))["w"].tolist() == [1.0, 2.0]


GOOD = npy(TWO)
HUGE = 10**11
MALICIOUS = {
    "too few values": array(GOOD, shape=(3,)),
    "too many values": array(npy(np.zeros(3, np.float32))),
    "declared shape differs, same size": array(npy(np.zeros((2, 1), np.float32))),
    "declared scalar": array(GOOD, shape=()),
    "declared type differs": array(npy(np.zeros(2)), dtype="float32"),
    "declared type differs, same size": array(npy(np.zeros(2, np.int32)), dtype="float32"),
    "negative size": array(header("<f4", "(-1,)") + TWO.tobytes(), shape=(-1,)),
    "two negative sizes": array(header("<f4", "(-1, -2)") + TWO.tobytes(), shape=(-1, -2)),
    "huge shape": array(GOOD, shape=(HUGE,)),
    "huge shape on both sides": array(header("<f4", f"({HUGE},)") + TWO.tobytes(), shape=(HUGE,)),
    "huge shape in the data": array(header("<f4", f"({HUGE},)") + TWO.tobytes()),
    "shape beyond any integer": array(header("<f4", f"({2**70},)"), shape=(2**70,)),
    "shape that overflows to zero": array(header("<f4", f"({2**62}, 4)"), shape=(2**62, 4)),
    "too many axes": array(npy(np.zeros(2, np.float32)), shape=(1,) * 100),
    "trailing bytes": array(GOOD + b"\0\0\0\0"),
    "object type": array(b"\x93NUMPY\x01\x00", dtype="object"),
    "objects in the data": array(header("|O", "(2,)") + pickle.dumps([1, 2])),
    "objects on both sides": array(header("|O", "(2,)") + pickle.dumps([1, 2]), dtype="object"),
    "a pickle": array(pickle.dumps(TWO)),
    "an archive": array(b"PK\x03\x04" + bytes(100)),
    "another serialisation": array(GOOD, stype="pickle"),
    "no data": array(b""),
    "no magic": array(b"\0" * 200),
    "an unknown version": array(b"\x93NUMPY\x09\x00" + GOOD[8:]),
    "a header without end": array(b"\x93NUMPY\x01\x00\xff\xff{"),
    "a header that is no dict": array(b"\x93NUMPY\x01\x00\x05\x00[1,2]"),
    "a header too deep to parse": array(b"\x93NUMPY\x01\x00\x00\x20" + b"-" * 0x1FFF + b"1"),
    "other byte order": array(npy(TWO.astype(">f4")), dtype=">f4"),
    **{
        f"type {dtype[:12]!r}": array(GOOD, dtype=dtype)
        for dtype in (
            *("", "nonsense", "f4,f4", "(2,)f4", ",", "i4,(", "1" * 5000 + "f4", "(" * 300),
            *("complex64", "S8", "U2", "V8", "M8[s]", "m8[s]", "float32\0", "é", "float32\n"),
        )
    },
}


@pytest.mark.parametrize("record", MALICIOUS.values(), ids=MALICIOUS.keys())
def test_an_array_that_is_not_what_it_claims_to_be_is_malformed(record) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(MalformedReplyError, match="array 'w' is not the "):
            decode_params(record)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


@given(st.integers(0, len(GOOD) - 1))
def test_a_truncated_array_is_malformed_wherever_it_ends(length) -> None:
    with pytest.raises(MalformedReplyError):
        decode_params(array(GOOD[:length]))


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
@pytest.mark.filterwarnings("ignore:Reading `.npy`")
def test_a_flipped_byte_is_malformed_or_another_value_of_the_same_shape(position, mask) -> None:
    data = bytearray(GOOD)
    data[position] ^= mask
    try:
        tensor = decode_params(array(bytes(data)))["w"]
    except MalformedReplyError:
        return
    assert tensor.shape == (2,)
    assert tensor.dtype == torch.float32


# Messages -----------------------------------------------------------------------------------------


def instruction(kind: str = MessageType.TRAIN, *, ttl: float = 60.0) -> Message:
    arrays = encode_params({"w": torch.tensor([1.0, 2.0])})
    make = codec.train_messages if kind == MessageType.TRAIN else codec.evaluate_messages
    content = codec.instruction(arrays, ConfigRecord({"lr": 0.1}), round=7)
    return make({5: content}, round=7, ttl=ttl)[0]


def carried(message: Message) -> Message:
    """Return a message as it comes out of another process."""
    return pickle.loads(pickle.dumps(message))


FIGURES = st.dictionaries(
    st.from_regex(r"[a-z][a-z0-9]{0,5}(_[a-z0-9]{1,5})?", fullmatch=True).filter(
        lambda name: name != "num_examples"
    ),
    st.floats(allow_nan=False, allow_infinity=False),
    max_size=3,
)


@given(
    st.integers(1, 10**9),
    FIGURES,
    st.none() | st.tuples(st.integers(1, 10**9), FIGURES),
    st.booleans(),
)
def test_an_update_survives_the_way_through_a_message(count, metrics, test, pickled) -> None:
    evaluation = None if test is None else Evaluation(num_examples=test[0], metrics=test[1])
    delta = {"w": torch.tensor([0.5, -0.25]), "b": torch.tensor(3.0)}
    sent = ClientUpdate(
        client="a",
        round=7,
        delta=delta,
        num_examples=count,
        metrics=metrics,
        evaluation=evaluation,
    )
    reply = Message(codec.encode_update(sent), reply_to=instruction())
    received = codec.decode_update(carried(reply) if pickled else reply, "a")
    assert (received.client, received.round) == ("a", 7)
    assert received.num_examples == count
    assert received.metrics == metrics
    assert received.evaluation == evaluation
    assert list(received.delta) == ["w", "b"]
    assert all(torch.equal(received.delta[name], delta[name]) for name in delta)
    assert received.num_bytes == received.num_bytes_uncompressed == 12


@given(st.integers(1, 10**9), FIGURES)
def test_an_evaluation_survives_the_way_through_a_message(count, metrics) -> None:
    sent = Evaluation(num_examples=count, metrics=metrics)
    reply = Message(codec.encode_evaluation(sent), reply_to=instruction(MessageType.EVALUATE))
    assert codec.decode_evaluation(carried(reply)) == sent


def test_what_is_no_plain_finite_figure_is_left_out() -> None:
    figures = {"loss": 1.0, "a": math.nan, "b": math.inf, "c" * 65: 1.0, "<script>": 1.0}
    sent = Evaluation(num_examples=3, metrics=figures)
    reply = Message(codec.encode_evaluation(sent), reply_to=instruction(MessageType.EVALUATE))
    assert codec.decode_evaluation(reply).metrics == {"loss": 1.0}
    many = Evaluation(num_examples=3, metrics={f"m{i}": 1.0 for i in range(10_000)})
    reply = Message(codec.encode_evaluation(many), reply_to=instruction(MessageType.EVALUATE))
    assert len(codec.decode_evaluation(reply).metrics) <= 64


@pytest.mark.parametrize("counts", [None, (3, 0, 9), ()])
def test_a_description_survives_the_way_through_a_message(counts) -> None:
    told = ClientDescription(client="Klinik Süd/2", num_examples=12, label_counts=counts)
    (question,) = codec.query_messages([3], ttl=5.0)
    assert question.metadata.message_type == MessageType.QUERY
    assert (
        codec.decode_description(
            carried(Message(codec.encode_description(told), reply_to=question))
        )
        == told
    )


@pytest.mark.parametrize("counts", [[-1, 2], [0.5], ["3"], [1] * 10_001], ids=lambda c: f"{c[:2]}")
def test_label_counts_that_cannot_be_counts_are_left_out(counts) -> None:
    (question,) = codec.query_messages([3], ttl=5.0)
    told = ClientDescription(client="a", num_examples=12, label_counts=(1,))
    reply = Message(codec.encode_description(told), reply_to=question)
    reply.content["client"]["label-counts"] = counts
    assert codec.decode_description(reply) == ClientDescription(client="a", num_examples=12)


def test_an_instruction_survives_the_way_through_a_message() -> None:
    message = carried(instruction(ttl=60.0))
    received = codec.decode_instruction(message.content, deadline_s=codec.patience_of(message))
    assert received.round == 7
    assert received.params["w"].tolist() == [1.0, 2.0]
    assert 55 < received.deadline_s <= 60


def test_an_instruction_that_has_waited_has_less_time_left() -> None:
    message = instruction(ttl=60.0)
    message.metadata.__dict__["_created_at"] = time.time() - 100
    assert codec.patience_of(message) == pytest.approx(-40, abs=5)


def test_instructions_of_a_round_share_one_model_and_are_numbered_by_node() -> None:
    arrays = encode_params({"w": torch.zeros(1)})
    content = codec.instruction(arrays, ConfigRecord(), round=3)
    messages = codec.train_messages({4: content, 2: content}, round=3, ttl=9.0)
    assert [m.metadata.dst_node_id for m in messages] == [4, 2]
    assert {m.metadata.group_id for m in messages} == {"3"}
    assert {m.metadata.ttl for m in messages} == {9.0}
    assert messages[0].content["arrays"] is messages[1].content["arrays"]
    assert (
        codec.decode_model(messages[0].content)["w"] is codec.decode_model(messages[1].content)["w"]
    )


def test_a_model_is_decoded_anew_once_another_record_comes() -> None:
    zero = encode_params({"w": torch.zeros(1)})
    content = codec.instruction(zero, ConfigRecord(), round=1)
    (first,) = codec.train_messages({1: content}, round=1, ttl=9.0)
    assert codec.decode_model(first.content)["w"].tolist() == [0.0]
    assert codec.decode_model(instruction().content)["w"].tolist() == [1.0, 2.0]
    assert codec.decode_model(first.content)["w"].tolist() == [0.0]


def test_flowers_own_aggregation_can_read_an_update() -> None:
    sent = ClientUpdate(client="a", round=7, delta={"w": torch.ones(1)}, num_examples=3)
    content = Message(codec.encode_update(sent), reply_to=instruction()).content
    assert len(content.array_records) == len(content.metric_records) == 1
    assert content.metric_records["metrics"]["num-examples"] == 3


# Replies that are wrong ---------------------------------------------------------------------------


def reply(*, group_id: str = "7", **records: ArrayRecord | MetricRecord | ConfigRecord) -> Message:
    message = Message(RecordDict(records), 5, MessageType.TRAIN, group_id=group_id)
    return Message(message.content, reply_to=message)


ARRAYS = encode_params({"w": torch.zeros(1)})
GOOD_METRICS = MetricRecord({"num-examples": 1})
WRONG_UPDATES = {
    "nothing": {},
    "no arrays": {"metrics": GOOD_METRICS},
    "no metrics": {"arrays": ARRAYS},
    "a config in place of metrics": {"arrays": ARRAYS, "metrics": ConfigRecord()},
    "metrics in place of arrays": {"arrays": MetricRecord(), "metrics": GOOD_METRICS},
    "no count": {"arrays": ARRAYS, "metrics": MetricRecord({"loss": 1.0})},
    "a broken count": {"arrays": ARRAYS, "metrics": MetricRecord({"num-examples": 1.5})},
    "a NaN count": {"arrays": ARRAYS, "metrics": MetricRecord({"num-examples": math.nan})},
    "a list of counts": {"arrays": ARRAYS, "metrics": MetricRecord({"num-examples": [1]})},
    "no number of a round": {"arrays": ARRAYS, "metrics": GOOD_METRICS, "group_id": "seven"},
    "no round": {"arrays": ARRAYS, "metrics": GOOD_METRICS, "group_id": ""},
    "an unusual digit": {"arrays": ARRAYS, "metrics": GOOD_METRICS, "group_id": "²"},
}


@pytest.mark.parametrize("wrong", WRONG_UPDATES.values(), ids=WRONG_UPDATES.keys())
def test_a_reply_that_is_no_update_is_malformed(wrong) -> None:
    with pytest.raises(MalformedReplyError):
        codec.decode_update(reply(**wrong), "a")


def test_a_reply_without_evaluation_is_malformed_as_one() -> None:
    for metrics in ({"num-examples": 3}, {"test-num-examples": 0}, {"test-num-examples": -1}):
        with pytest.raises(MalformedReplyError, match="test-num-examples"):
            codec.decode_evaluation(reply(metrics=MetricRecord(metrics)))


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"client-id": "", "num-examples": 1},
        {"client-id": 5, "num-examples": 1},
        {"client-id": "a", "num-examples": "many"},
    ],
    ids=str,
)
def test_a_reply_that_does_not_say_who_it_is_is_malformed(told) -> None:
    with pytest.raises(MalformedReplyError):
        codec.decode_description(reply(client=ConfigRecord(told)))


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (ErrorCode.NODE_UNAVAILABLE, FailureKind.OFFLINE),
        (ErrorCode.MESSAGE_UNAVAILABLE, FailureKind.TIMEOUT),
        (ErrorCode.REPLY_MESSAGE_UNAVAILABLE, FailureKind.TIMEOUT),
        (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, FailureKind.ERROR),
        (9999, FailureKind.ERROR),
    ],
)
def test_the_code_of_an_error_says_what_kind_of_failure_it_is(code, kind) -> None:
    failed = Message(Error(code=code, reason="a\nb\n"), reply_to=instruction())
    assert failure_of(failed) == (kind, "b")


@pytest.mark.parametrize("reason", [None, "", " \n\t"])
def test_an_error_without_a_reason_says_so(reason) -> None:
    failed = Message(Error(code=0, reason=reason), reply_to=instruction())
    assert failure_of(failed) == (FailureKind.ERROR, "no reason given")


def test_the_reason_of_an_error_is_cut_to_one_line() -> None:
    failed = Message(Error(code=0, reason="x" * 10_000), reply_to=instruction())
    assert failure_of(failed)[1] == "x" * 500


def test_a_client_that_was_too_late_is_a_timeout_any_other_exception_an_error() -> None:
    late = error_reply(instruction(), ClientTimeoutError("too slow"))
    broken = error_reply(instruction(), RuntimeError("no disk"))
    assert failure_of(late) == (FailureKind.TIMEOUT, "ClientTimeoutError: too slow")
    assert failure_of(broken) == (FailureKind.ERROR, "RuntimeError: no disk")
    assert failure_of(reply()) is None
