"""Files that survive a crash: written whole or not at all, and known to be whole when read.

A *tree* is nested dicts, lists, tuples, numbers, strings, None and tensors, as in an optimizer's
``state_dict``. It is kept as one ``.safetensors`` file: the tensors, and beside them the rest as
JSON and a SHA-256 over both. No pickle is ever read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fl_app.files import write_atomically
from fl_app.params import model_hash
from fl_app.types import FlAppError

_TENSOR, _PAIRS, _TUPLE = "__tensor__", "__pairs__", "__tuple__"


class CorruptFileError(FlAppError):
    """A stored file is not what was written: torn, altered, or of another format."""


def write_tree(path: Path, tree: Any) -> None:
    """Write a tree atomically.

    Raises:
        TypeError: The tree holds something other than the types named in this module's head.
        OSError: As `write_atomically`.
    """
    write_atomically(path, tree_to_bytes(tree))


def read_tree(path: Path) -> Any:
    """Return the tree that `write_tree` wrote.

    Raises:
        CorruptFileError: The file is torn, altered, unreadable or of another format.
        FileNotFoundError: There is no such file.
    """
    try:
        return tree_from_bytes(path.read_bytes())
    except FileNotFoundError:
        raise
    except (CorruptFileError, OSError) as error:
        raise CorruptFileError(f"{path} cannot be read: {error}") from error


def tree_to_bytes(tree: Any) -> bytes:
    """Return a tree as bytes, with their checksum in them. Raises `TypeError` as `write_tree`."""
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_pack(tree, tensors), allow_nan=True)
    return save(tensors, {"tree": structure, "sha256": _digest(structure, tensors)})


def tree_from_bytes(content: bytes) -> Any:
    """Return the tree in bytes.

    Raises:
        CorruptFileError: They are not what `tree_to_bytes` gave.
    """
    try:
        tensors = load(content)
        header = int.from_bytes(content[:8], "little")  # the safetensors format's own header
        metadata = json.loads(content[8 : 8 + header])["__metadata__"]
        structure = metadata["tree"]
        intact = metadata["sha256"] == _digest(structure, tensors)
        tree = _unpack(json.loads(structure), tensors) if intact else None
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CorruptFileError(str(error)) from error
    if not intact:
        raise CorruptFileError("its content does not match its checksum")
    return tree


def _digest(structure: str, tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256((structure + model_hash(tensors)).encode()).hexdigest()


def _pack(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor):
        name = str(len(tensors))
        # A copy: safetensors refuses tensors that share memory.
        tensors[name] = node.detach().cpu().clone().contiguous()
        return {_TENSOR: name}
    if isinstance(node, Mapping):
        return {_PAIRS: [[_pack(k, tensors), _pack(v, tensors)] for k, v in node.items()]}
    if isinstance(node, tuple):
        return {_TUPLE: [_pack(item, tensors) for item in node]}
    if isinstance(node, list):
        return [_pack(item, tensors) for item in node]
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise TypeError(f"A {type(node).__name__} cannot be stored: {node!r:.80}")


def _unpack(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_unpack(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    if _TENSOR in node:
        return tensors[node[_TENSOR]]
    if _TUPLE in node:
        return tuple(_unpack(item, tensors) for item in node[_TUPLE])
    return {_unpack(k, tensors): _unpack(v, tensors) for k, v in node[_PAIRS]}
