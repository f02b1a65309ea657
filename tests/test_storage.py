"""Stored trees come back as they were or not at all, and a full disk costs the new file only."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import environment
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from fl_app.storage import CorruptFileError, read_tree, write_tree

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64]
DTYPES += [torch.uint8, torch.bool]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 2**31))
    values = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).T if len(shape) == 2 else values.to(dtype)


KEYS = st.text(max_size=5) | st.integers() | st.booleans() | st.none()
LEAVES = KEYS | st.floats() | tensors()
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS | st.tuples(KEYS, KEYS), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(first: Any, second: Any) -> bool:
    """Return whether two trees are equal in types, bits and the order of keys."""
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        return (first.dtype, first.shape) == (second.dtype, second.shape) and same_bits(
            first, second
        )
    if isinstance(first, dict):
        return same(list(first.items()), list(second.items()))
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, float):
        both_nan = math.isnan(first) and math.isnan(second)
        return both_nan or (first == second and math.copysign(1, first) == math.copysign(1, second))
    return first == second


def same_bits(first: Tensor, second: Tensor) -> bool:
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)]
    return torch.equal(*flat)


@given(TREES)
def test_a_tree_is_read_back_as_it_was_written(tmp_path_factory, tree) -> None:
    path = tmp_path_factory.getbasetemp() / "tree"
    write_tree(path, tree)
    assert same(read_tree(path), tree)


def test_the_state_of_an_optimizer_is_read_back_and_can_be_loaded(tmp_path: Path) -> None:
    parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(()))]
    optimizer = torch.optim.Adam(parameters, lr=0.1, betas=(0.9, 0.99), amsgrad=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    write_tree(tmp_path / "t", optimizer.state_dict())
    state = read_tree(tmp_path / "t")
    assert same(state, optimizer.state_dict())
    torch.optim.Adam(parameters).load_state_dict(state)


def test_tensors_that_share_memory_are_stored_apart(tmp_path: Path) -> None:
    tensor = torch.arange(4.0)
    write_tree(tmp_path / "t", {"a": tensor, "b": tensor, "c": tensor[1:]})
    back = read_tree(tmp_path / "t")
    back["a"].zero_()
    assert back["b"].tolist() == [0, 1, 2, 3]
    assert back["c"].tolist() == [1, 2, 3]


def test_a_tree_does_not_follow_the_file_it_was_read_from(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_tree(path, torch.ones(1000))
    tree = read_tree(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert tree.sum() == 1000


@pytest.mark.parametrize("key", ["__tensor__", "__pairs__", "__tuple__"])
def test_the_names_that_mark_types_are_keys_like_any_other(tmp_path: Path, key) -> None:
    tree = {key: "0", "x": [{key: torch.ones(1)}]}
    write_tree(tmp_path / "t", tree)
    assert same(read_tree(tmp_path / "t"), tree)


def test_an_ordered_dict_becomes_a_dict_in_its_order(tmp_path: Path) -> None:
    write_tree(tmp_path / "t", OrderedDict(b=1, a=2))
    assert same(read_tree(tmp_path / "t"), {"b": 1, "a": 2})


@pytest.mark.parametrize(
    "tree",
    [{1, 2}, b"bytes", object(), 1j, Path("x"), threading.Lock(), [{"a": {3}}]],
    ids=lambda tree: type(tree).__name__,
)
def test_what_is_no_tree_is_refused_and_leaves_the_old_file(tmp_path: Path, tree) -> None:
    path = tmp_path / "t"
    write_tree(path, "old")
    with pytest.raises(TypeError, match="cannot be stored"):
        write_tree(path, {"before": torch.ones(2), "x": tree})
    assert read_tree(path) == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


# Damage -------------------------------------------------------------------------------------------

TREE = {
    "round": 3,
    "w": torch.tensor([1.5, -2.0]),
    "v": torch.tensor([0.5], dtype=torch.float64),
    "rest": (None, True, 0.1, "ü", [torch.tensor(7)]),
}


def reads_as_written_or_corrupt(path: Path) -> bool:
    """Return whether the file is read as `TREE`; raise if it is read as anything else."""
    try:
        tree = read_tree(path)
    except CorruptFileError as error:
        assert str(path) in str(error)
        return False
    assert same(tree, TREE), "a damaged file was taken for a whole one"
    return True


@pytest.mark.parametrize("mask", [0x01, 0x04, 0x0A, 0x29, 0x80, 0xFF])
def test_a_file_with_any_one_byte_flipped_is_never_read_as_something_else(tmp_path, mask) -> None:
    path = tmp_path / "t"
    write_tree(path, TREE)
    content = path.read_bytes()
    whole = []
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= mask
        path.write_bytes(damaged)
        if reads_as_written_or_corrupt(path):
            whole.append(position)
    # What may pass is white space of the header alone, and letters' case in an escape of JSON.
    assert all(chr(content[position]) in " abcdefABCDEF" for position in whole)
    assert len(whole) < len(content) / 50


@pytest.mark.parametrize("letter", "BCFIU")
def test_a_file_with_any_type_renamed_is_never_read_as_something_else(tmp_path, letter) -> None:
    path = tmp_path / "t"
    write_tree(path, TREE)
    content = path.read_bytes()
    begin = content.find(b'"dtype":"')
    assert begin > 0
    while begin > 0:
        position = begin + len(b'"dtype":"')
        path.write_bytes(content[:position] + letter.encode() + content[position + 1 :])
        reads_as_written_or_corrupt(path)
        begin = content.find(b'"dtype":"', position)


def test_a_file_cut_short_anywhere_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_tree(path, TREE)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert not reads_as_written_or_corrupt(path)


def test_a_file_with_more_at_its_end_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_tree(path, TREE)
    with path.open("ab") as file:
        file.write(b"\0")
    assert not reads_as_written_or_corrupt(path)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_no_pickle_is_ever_read(tmp_path: Path) -> None:
    torch.save({"a": Trap(tmp_path / "sprung")}, tmp_path / "torch")
    (tmp_path / "pickle").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    for name in ("torch", "pickle"):
        with pytest.raises(CorruptFileError):
            read_tree(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_a_model_file_is_not_taken_for_a_tree(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(save({"w": torch.ones(1)}))
    with pytest.raises(CorruptFileError):
        read_tree(tmp_path / "m")
    (tmp_path / "n").write_bytes(save({}, {"tree": json.dumps(1), "sha256": "0" * 64}))
    with pytest.raises(CorruptFileError, match="checksum"):
        read_tree(tmp_path / "n")


def test_a_missing_file_is_missing_not_corrupt(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_tree(tmp_path / "none")
    with pytest.raises(CorruptFileError):
        read_tree(tmp_path)  # a folder


# Writing ------------------------------------------------------------------------------------------

FULL_DISK = """
import errno, resource, signal, sys, torch
from pathlib import Path
from fl_app.storage import read_tree, write_tree
path = Path(sys.argv[1])
write_tree(path, {"old": torch.ones(10)})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    write_tree(path, {"new": torch.ones(100_000)})
except OSError as error:
    assert error.errno == errno.EFBIG, error
else:
    sys.exit("the disk was not full")
assert read_tree(path)["old"].sum() == 10
assert [p.name for p in path.parent.iterdir()] == [path.name]
"""


def test_a_full_disk_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "t")],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_folder_that_is_not_there_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        write_tree(tmp_path / "none" / "t", 1)
