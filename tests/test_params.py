"""Reading, writing, comparing, hashing and storing parameters."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fl_app.params import (
    change_of,
    describe_misfit,
    entries_of,
    l2_norm,
    load_model,
    model_hash,
    num_bytes,
    read_params,
    save_model,
    trainable_names,
    write_params,
)
from fl_app.types import ConfigError, Params


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


NAMES = ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"]


def equal(first: Params, second: Params) -> bool:
    return list(first) == list(second) and all(torch.equal(first[k], second[k]) for k in first)


def test_parameters_are_the_floating_point_entries_of_the_state_dict() -> None:
    model = network()
    assert list(read_params(model)) == NAMES
    assert "1.num_batches_tracked" in model.state_dict()


def test_trainable_names_leave_out_buffers_and_frozen_parameters() -> None:
    model = network()
    model[0].bias.requires_grad_(False)
    assert trainable_names(model) == {"0.weight", "1.weight", "1.bias"}


def test_what_is_written_is_read_back_to_the_bit() -> None:
    source, target = network(1), network(2)
    write_params(target, read_params(source))
    assert equal(read_params(target), read_params(source))


def test_what_was_read_does_not_follow_the_model() -> None:
    model = network()
    before = read_params(model)
    copy = {name: tensor.clone() for name, tensor in before.items()}
    write_params(model, {name: tensor + 1 for name, tensor in before.items()})
    assert equal(before, copy)


def test_what_was_written_does_not_follow_its_source() -> None:
    model = network()
    source = read_params(network(1))
    write_params(model, source)
    for tensor in source.values():
        tensor.zero_()
    assert equal(read_params(model), read_params(network(1)))


def test_writing_without_one_of_the_names_is_an_error() -> None:
    params = dict(read_params(network()))
    del params["1.running_var"]
    with pytest.raises(KeyError, match="1.running_var"):
        write_params(network(), params)


def test_start_plus_delta_is_the_model_buffers_included() -> None:
    model, start = network(1), read_params(network(2))
    model[1].running_mean.fill_(0.5)
    delta = change_of(entries_of(model), start)
    assert list(delta) == NAMES
    assert delta["1.running_mean"].tolist() == [0.5, 0.5]
    for name, tensor in read_params(model).items():
        torch.testing.assert_close(start[name] + delta[name], tensor)
    assert not any(tensor.requires_grad for tensor in delta.values())


@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), max_size=4), max_size=4))
def test_the_norm_is_that_of_the_concatenation(values) -> None:
    params = {str(k): torch.tensor(v, dtype=torch.float32) for k, v in enumerate(values)}
    flat = torch.tensor([x for v in values for x in v], dtype=torch.float64)
    assert l2_norm(params) == pytest.approx(float(flat.norm()), rel=1e-12)


def test_bytes_are_counted_by_type() -> None:
    assert num_bytes({"a": torch.zeros(3), "b": torch.zeros(2, 2, dtype=torch.float16)}) == 20
    assert num_bytes({}) == 0


# Hash ---------------------------------------------------------------------------------------------


def test_the_hash_is_the_sha_256_of_header_and_little_endian_values() -> None:
    params = {"w": torch.tensor([[1.0, -2.0]]), "b": torch.tensor(0.5)}
    content = b'["b","float32",[]]\n' + struct.pack("<f", 0.5)
    content += b'["w","float32",[1,2]]\n' + struct.pack("<2f", 1.0, -2.0)
    assert model_hash(params) == hashlib.sha256(content).hexdigest()


def test_the_hash_forgets_order_of_names_and_layout_in_memory() -> None:
    square = torch.arange(6.0).reshape(2, 3)
    first = {"a": square, "b": torch.ones(1)}
    second = {"b": torch.ones(1), "a": square.T.contiguous().T}
    assert model_hash(first) == model_hash(second)


@pytest.mark.parametrize(
    "other",
    [
        {"v": torch.zeros(2, 3)},
        {"w": torch.zeros(3, 2)},
        {"w": torch.zeros(2, 3, dtype=torch.float64)},
        {"w": -torch.zeros(2, 3)},
        {"w": torch.zeros(2, 3), "b": torch.zeros(0)},
        {},
    ],
    ids=["name", "shape", "type", "sign of zero", "one more", "none"],
)
def test_the_hash_tells_apart_what_differs_in(other) -> None:
    assert model_hash({"w": torch.zeros(2, 3)}) != model_hash(other)


@given(st.integers(0, 5), st.integers(0, 31))
def test_any_single_bit_changes_the_hash(position, bit) -> None:
    values = torch.arange(6, dtype=torch.int32)
    flipped = values.clone()
    flipped[position] ^= 1 << bit if bit < 31 else -(2**31)
    assert model_hash({"w": values.view(torch.float32)}) != model_hash(
        {"w": flipped.view(torch.float32)}
    )


# Files --------------------------------------------------------------------------------------------


def test_a_saved_model_is_loaded_to_the_bit(tmp_path: Path) -> None:
    params = read_params(network(1))
    save_model(params, tmp_path / "model.safetensors")
    loaded = load_model(str(tmp_path / "model.safetensors"), read_params(network(2)))
    assert equal(loaded, params)


def test_equal_models_give_equal_files_whatever_their_order(tmp_path: Path) -> None:
    params = read_params(network())
    backwards = {name: params[name] for name in reversed(list(params))}
    save_model(params, tmp_path / "a")
    save_model(backwards, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_model_of_another_float_type_is_converted(tmp_path: Path) -> None:
    save_model({"w": torch.tensor([0.5], dtype=torch.float64)}, tmp_path / "m")
    loaded = load_model(str(tmp_path / "m"), {"w": torch.zeros(1)})
    assert loaded["w"].dtype == torch.float32


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"w": torch.zeros(3)}, "w has shape (3,), not (2,)"),
        ({"v": torch.zeros(2)}, "missing w"),
        ({"w": torch.zeros(2), "v": torch.zeros(2)}, "unexpected v"),
        ({"w": torch.zeros(2, dtype=torch.int64)}, "w has dtype torch.int64"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_by_its_key(tmp_path: Path, stored, words) -> None:
    save_model(stored, tmp_path / "m")
    with pytest.raises(ConfigError) as caught:
        load_model(str(tmp_path / "m"), {"w": torch.zeros(2)})
    assert f"initial_model={tmp_path / 'm'} " in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_a_file_that_is_missing_or_no_model_is_refused_by_its_key(tmp_path, content) -> None:
    if content is not None:
        (tmp_path / "m").write_bytes(content)
    with pytest.raises(ConfigError, match="initial_model=.* cannot be read"):
        load_model(str(tmp_path / "m"), {"w": torch.zeros(2)})


def test_a_long_list_of_misfits_is_cut_short() -> None:
    like = {str(k): torch.zeros(1) for k in range(9)}
    assert describe_misfit({}, like) == "missing 0, 1, 2 …"
    assert describe_misfit(like, {}) == "unexpected 0, 1, 2 …"
    assert describe_misfit(like, like) is None


def test_a_loaded_model_does_not_follow_its_file(tmp_path: Path) -> None:
    path = tmp_path / "m"
    save_model({"w": torch.ones(1000)}, path)
    loaded = load_model(str(path), {"w": torch.zeros(1000)})
    path.write_bytes(bytes(path.stat().st_size))
    assert loaded["w"].sum() == 1000
