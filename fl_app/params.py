"""Reading parameters out of a module and writing them back, and arithmetic on them.

Parameters (`fl_app.types.Params`) are the floating-point entries of a module's ``state_dict``:
weights, and persistent buffers such as running means. Integer entries (BatchNorm's batch counter)
are no model of anything and stay where they are.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fl_app.files import write_atomically
from fl_app.types import ConfigError, Params


class StackedParams:
    """Parameters of many clients, stacked; each client's `Params` is a row of it.

    What all rows are asked for, such as their norms, is computed for all at once.

    Args:
        tensors: Name -> ``(clients, *shape)``.

    Attributes:
        row_bytes: Bytes that the tensors of a row hold.
    """

    def __init__(self, tensors: Params) -> None:
        self.tensors = tensors
        self.row_bytes = sum(t[0].numel() * t.element_size() for t in tensors.values())
        self._norms: list[float] | None = None
        self._rough: list[float] | None = None
        self._misfit: tuple[Params, bool, str | None] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def row(self, number: int) -> Params:
        """Return one client's parameters: views, made when they are looked at."""
        return StackedRow(self, number)

    def norms(self) -> list[float]:
        """Return the L2 norm of each row; see `l2_norm`."""
        if self._norms is None:
            squares = [
                torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square_()
                for rows in (tensor.reshape(len(tensor), -1) for tensor in self.tensors.values())
            ]
            self._norms = torch.stack(squares).sum(0).sqrt_().tolist()
        return self._norms

    def rough_norms(self) -> list[float]:
        """Return norms to six digits, in a third of the time; infinite where squares overflow."""
        if self._rough is None:
            squares = [
                torch.linalg.vector_norm(part, dim=-1).double().square_().reshape(len(self), -1)
                for part in map(_in_blocks, self.tensors.values())
            ]
            self._rough = torch.stack([part.sum(1) for part in squares]).sum(0).sqrt_().tolist()
        return self._rough

    def misfit(self, like: Params, *, same_types: bool) -> str | None:
        """Return how rows differ from ``like``; see `describe_misfit`."""
        known = self._misfit
        if known is None or known[0] is not like or known[1] != same_types:
            words = describe_misfit(dict(self.row(0)), like, same_types=same_types)
            known = self._misfit = (like, same_types, words)
        return known[2]


def _in_blocks(stacked: Tensor) -> Tensor:
    """Return each row in blocks of about a hundred: in single precision their sums stay exact."""
    flat = stacked.reshape(len(stacked), -1)
    size = flat.shape[1]
    block = next((b for b in range(128, 31, -1) if size % b == 0), None)
    return flat.view(len(flat), -1, block) if block else flat.unsqueeze(2)


class StackedRow(Mapping[str, Tensor]):
    """One client's part of `StackedParams`.

    Args:
        stack: All clients' parameters.
        number: The client's row.
    """

    __slots__ = ("number", "stack")

    def __init__(self, stack: StackedParams, number: int) -> None:
        self.stack = stack
        self.number = number

    def __getitem__(self, name: str) -> Tensor:
        return self.stack.tensors[name][self.number]

    def __iter__(self) -> Iterator[str]:
        return iter(self.stack.tensors)

    def __len__(self) -> int:
        return len(self.stack.tensors)


def entries_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's own tensors by name: to be read or written in place, not to be kept.

    Of tied parameters, which are one tensor, the first name alone is there.
    """
    entries: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and id(tensor) not in seen:
            seen.add(id(tensor))
            entries[name] = tensor
    return entries


@torch.no_grad()
def copy_into(entries: Mapping[str, Tensor], params: Params) -> None:
    """Overwrite a model's own tensors (`entries_of`) in place.

    Raises:
        KeyError: A name is missing from ``params``.
    """
    torch._foreach_copy_(list(entries.values()), [params[name] for name in entries])


@torch.no_grad()
def change_of(entries: Mapping[str, Tensor], start: Params) -> Params:
    """Return a model's own tensors (`entries_of`) minus ``start``, as new tensors."""
    changes = torch._foreach_sub(list(entries.values()), [start[name] for name in entries])
    return dict(zip(entries, changes, strict=True))


def read_params(model: nn.Module) -> Params:
    """Return copies of the model's parameters."""
    return {name: tensor.detach().clone() for name, tensor in entries_of(model).items()}


def write_params(model: nn.Module, params: Params) -> None:
    """Overwrite the model's parameters in place.

    Args:
        model: Module to write to.
        params: Exactly the model's names and shapes.

    Raises:
        KeyError: A parameter of the model is missing from ``params``.
    """
    copy_into(entries_of(model), params)


def trainable_names(model: nn.Module) -> frozenset[str]:
    """Return the names that gradients change; the rest of the parameters are buffers."""
    return frozenset(name for name, p in model.named_parameters() if p.requires_grad)


def l2_norm(params: Params) -> float:
    """Return the L2 norm over all tensors as if concatenated; NaN or inf if any entry is."""
    if not params:
        return 0.0
    if isinstance(params, StackedRow):
        return params.stack.norms()[params.number]
    norms = torch._foreach_norm(list(params.values()), 2, torch.float64)
    return math.hypot(*(norm.item() for norm in norms))


def is_shorter(params: Params, bound: float) -> bool:
    """Return whether the L2 norm is finite and surely below a bound; False decides nothing."""
    if not isinstance(params, StackedRow):
        return l2_norm(params) < bound
    return params.stack.rough_norms()[params.number] < bound * (1 - 1e-3)


def num_bytes(params: Params) -> int:
    """Return the bytes that the tensors hold."""
    if isinstance(params, StackedRow):
        return params.stack.row_bytes
    return sum(tensor.numel() * tensor.element_size() for tensor in params.values())


def model_hash(params: Params) -> str:
    """Return the SHA-256 of a model's bits: equal if and only if names, dtypes, shapes, bytes are.

    For each tensor in order of its name: ``["name","dtype",[shape]]`` as JSON, a line end, and
    the elements in row-major order, little-endian.
    """
    digest = hashlib.sha256()
    for name in sorted(params):
        tensor = params[name].detach().cpu().reshape(-1)
        header = [name, str(tensor.dtype).removeprefix("torch."), list(params[name].shape)]
        digest.update(json.dumps(header, separators=(",", ":")).encode("ascii") + b"\n")
        raw = tensor.contiguous().view(torch.uint8)
        if sys.byteorder == "big":
            raw = raw.reshape(-1, tensor.element_size()).flip(1)
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()


def save_model(params: Params, path: Path) -> None:
    """Write parameters as a ``.safetensors`` file, in the order of their names; atomically."""
    write_atomically(path, save({name: params[name].contiguous() for name in sorted(params)}))


def load_model(path: str, like: Params) -> Params:
    """Return the parameters in a ``.safetensors`` file, checked against a model's.

    Args:
        path: File to read, as ``initial_model=PATH`` names it.
        like: Parameters of the model that the file must fit.

    Raises:
        ConfigError: The file is missing, is not safetensors, or does not fit the model.
    """
    try:
        loaded = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"initial_model={path} cannot be read ({error}): name a .safetensors file, such as "
            "the model.safetensors of an earlier run."
        ) from error
    misfit = describe_misfit(loaded, like)
    if misfit:
        raise ConfigError(
            f"initial_model={path} does not fit the model of this run: {misfit}. "
            "Choose the task and model that the file was trained with."
        )
    # Copies: the tensors are maps of the file, and would change with it.
    return {name: loaded[name].to(tensor.dtype, copy=True) for name, tensor in like.items()}


def describe_misfit(params: Params, like: Params, *, same_types: bool = False) -> str | None:
    """Return in words how names or shapes of ``params`` differ from ``like``'s, or None.

    Args:
        params: Parameters, or a change of them.
        like: A model's.
        same_types: Whether types must be the same, too; else any floating-point type will do.
    """
    if isinstance(params, StackedRow):
        return params.stack.misfit(like, same_types=same_types)
    if missing := sorted(like.keys() - params.keys()):
        return f"missing {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}"
    if extra := sorted(params.keys() - like.keys()):
        return f"unexpected {', '.join(extra[:3])}{' …' if len(extra) > 3 else ''}"
    for name, tensor in like.items():
        if params[name].shape != tensor.shape:
            return f"{name} has shape {tuple(params[name].shape)}, not {tuple(tensor.shape)}"
        if not params[name].is_floating_point():
            return f"{name} has dtype {params[name].dtype}, not a floating-point one"
        if same_types and params[name].dtype != tensor.dtype:
            return f"{name} is {params[name].dtype}, not {tensor.dtype}"
    return None
