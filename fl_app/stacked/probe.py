"""Whether a model may be computed for many clients at once: found out by doing both.

What a stack computes is compared with the model itself, in double precision, on records of the
task, for stacks of two sizes and clients with different weights: outputs, gradients, and under
privacy the gradients of single records. So a layer that mixes records, remembers something or
does arithmetic of its own is found whatever it is called. Code that asks a tensor for its value
may go another way tomorrow, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fl_app.stacked.layer import NotStackableError, norms
from fl_app.stacked.model import StackedModel
from fl_app.types import Examples

SHAPES = ((2, 3), (3, 5))
"""Clients and records of the stacks that are compared: no dimension can pass for another twice.

The last record of each client is padding, which must count for nothing.
"""
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}
"""Largest difference, relative to the largest number of a tensor; rounding is far below."""

_DROPOUTS = frozenset(
    (
        functional.dropout,
        functional.dropout1d,
        functional.dropout2d,
        functional.dropout3d,
        functional.alpha_dropout,
        functional.feature_alpha_dropout,
    )
)
_VALUES = {
    Tensor.item: "asks a tensor for its value (.item())",
    Tensor.tolist: "asks a tensor for its values (.tolist())",
    Tensor.numpy: "asks a tensor for its values (.numpy())",
    Tensor.__bool__: "decides by the value of a tensor",
    Tensor.__int__: "asks a tensor for its value (int())",
    Tensor.__float__: "asks a tensor for its value (float())",
    Tensor.__index__: "asks a tensor for its value",
}


class _Watch(TorchFunctionMode):
    """Has nothing dropped out, and refuses code that asks for values."""

    def __init__(self) -> None:
        super().__init__()
        self.dropped = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _DROPOUTS:
            self.dropped = self.dropped or _drops(*args, **(kwargs or {}))
            return args[0] if args else (kwargs or {})["input"]
        if func in _VALUES:
            raise NotStackableError(f"its code {_VALUES[func]}")
        if func is functional.scaled_dot_product_attention and kwargs and kwargs.get("dropout_p"):
            self.dropped = True
            kwargs = {**kwargs, "dropout_p": 0.0}
        return func(*args, **(kwargs or {}))


Losses = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Stackable:
    """A model that may be computed for many clients at once.

    Attributes:
        model: The model.
        whole: Whether it has to be mapped as a whole.
        record_bytes: Bytes that a record takes in a pass, about.
        once: Whether it uses each of its weights once in a pass, by a rule.
        signatures: Which arguments of its mapped layers have a dimension of records.
    """

    model: nn.Module
    whole: bool
    record_bytes: int
    once: bool
    signatures: Sequence[tuple[bool, ...] | None]

    def stacked(self) -> StackedModel:
        """Return a stacked model."""
        made = StackedModel(self.model, whole=self.whole)
        made.settle(self.signatures)
        return made


def stackable(model: nn.Module, losses: Losses, examples: Examples, *, private: bool) -> Stackable:
    """Return how a model is computed for many clients at once, once it is known to be right.

    Args:
        model: The model, with parameters of the type and on the device to train with.
        losses: (outputs, targets) -> loss of each record.
        examples: Some records of the task, different ones.
        private: Whether gradients of single records are wanted.

    Raises:
        NotStackableError: There is none; the message says why.
    """
    if len(examples) < 2:
        raise NotStackableError("a single record cannot show that it is independent of others")
    reasons: list[NotStackableError] = []
    for whole in (False, True):
        try:
            for dtype in (torch.float64, torch.float32):
                try:
                    return _compare(model, losses, examples, dtype, whole, private)
                except NotStackableError:
                    raise
                except Exception:  # code that insists on its own type fails in double precision
                    if dtype == torch.float32:
                        raise
        except NotStackableError as error:
            reasons.append(error)
        except Exception as error:
            reasons.append(NotStackableError(_in_short(error)))
    raise reasons[0]


def _compare(
    model: nn.Module,
    losses: Losses,
    examples: Examples,
    dtype: torch.dtype,
    whole: bool,
    private: bool,
) -> Stackable:
    """Compare a stack with the model itself.

    Raises:
        NotStackableError: They differ.
    """
    alone = deepcopy(model).to(dtype).train()
    stacked = StackedModel(alone, whole=whole)
    if private and stacked.shares_weights:
        raise NotStackableError("some of its layers share weights")
    generator = torch.Generator().manual_seed(0)
    record_bytes, once = 0, False
    for clients, width in SHAPES:
        n = clients * width
        wanted = torch.arange(n) % len(examples)
        batch = examples.take(wanted.to(examples.targets.device))
        inputs, targets = _cast(batch.inputs, dtype), _cast(batch.targets, dtype)
        weights = [
            _varied(tensor.detach(), clients, generator).requires_grad_()
            for name, tensor in alone.state_dict(keep_vars=True).items()
            if name in stacked.names
        ]
        factors = (0.5 + torch.rand(n, generator=generator, dtype=torch.float64)).to(
            inputs.device, dtype
        )
        real = (torch.arange(n) % width < width - 1).to(inputs.device)
        factors = factors * real
        with torch.random.fork_rng(devices=[]), _Watch():
            torch.default_generator.manual_seed(1)
            expected = _one_by_one(
                *(alone, losses, stacked.names, weights),
                *(inputs[real], targets[real], factors[real]),
            )
        with torch.random.fork_rng(devices=[]), _Watch() as watch:
            torch.default_generator.manual_seed(2)  # what is drawn must not pass for computed
            stacked.bind(weights, n)
            with _counting_bytes(weights) as counted:
                outcome = losses(stacked(inputs), targets)
            if outcome.shape != (n,):
                raise NotStackableError(f"losses of {n} records have shape {tuple(outcome.shape)}")
            made = torch.autograd.grad(
                outcome, weights, factors.to(outcome.dtype), allow_unused=True
            )
        same = [_same(made[k], gradient, dtype) for k, gradient in enumerate(expected.gradients)]
        if not _same(outcome.detach()[real], expected.losses, dtype) or not all(same):
            raise NotStackableError(
                "computed for several clients at once it gives other numbers: records of a batch "
                "are not independent of one another, or it draws random numbers of its own"
            )
        if (clients, width) == SHAPES[0]:
            once = stacked.uses_weights_once
        if private:
            if watch.dropped and stacked.has_mapped_layers:
                raise NotStackableError("it drops out within a layer that has no rule")
            _compare_records(alone, losses, stacked, weights, inputs, targets, dtype)
        record_bytes = max(record_bytes, sum(counted.values()) // n)
    bits = torch.finfo(_type_of(model)).bits
    return Stackable(
        model=model,
        whole=whole,
        record_bytes=record_bytes * bits // torch.finfo(dtype).bits,
        once=once,
        signatures=stacked.signatures(),
    )


class _Expected:
    """What the model itself gives."""

    def __init__(self, losses: Tensor, gradients: Sequence[Tensor | None]) -> None:
        self.losses = losses
        self.gradients = gradients


def _one_by_one(
    model: nn.Module,
    losses: Losses,
    names: Sequence[str],
    weights: Sequence[Tensor],
    inputs: Tensor,
    targets: Tensor,
    factors: Tensor,
) -> _Expected:
    clients = len(weights[0])
    own = dict(model.named_parameters(remove_duplicate=False))
    local = [own[name] for name in names]
    parts, gradients = [], []
    for client, (x, y, f) in enumerate(
        zip(inputs.chunk(clients), targets.chunk(clients), factors.chunk(clients), strict=True)
    ):
        with torch.no_grad():
            for tensor, values in zip(local, weights, strict=True):
                tensor.copy_(values[client])
        before = [buffer.clone() for buffer in model.buffers()]
        remembered = _attributes(model)
        own_losses = losses(model(x), y)
        if _attributes(model) != remembered:
            raise NotStackableError("its code counts, or remembers something, from call to call")
        if any(not torch.equal(b, after) for b, after in zip(before, model.buffers(), strict=True)):
            raise NotStackableError("its buffers change in training, as BatchNorm's do")
        if own_losses.shape != (len(y),):
            raise NotStackableError(
                f"losses of {len(y)} records have shape {tuple(own_losses.shape)}"
            )
        gradients.append(
            torch.autograd.grad(own_losses, local, f.to(own_losses.dtype), allow_unused=True)
        )
        parts.append(own_losses.detach())
    stacks = [
        None
        if any(g is None for g in column)
        else torch.stack([g for g in column if g is not None])
        for column in zip(*gradients, strict=True)
    ]
    return _Expected(torch.cat(parts), stacks)


def _compare_records(
    model: nn.Module,
    losses: Losses,
    stacked: StackedModel,
    weights: Sequence[Tensor],
    inputs: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
) -> None:
    """Compare the gradients of single records: their norms, and a weighted sum."""
    n, clients = len(targets), len(weights[0])
    factors = torch.linspace(0.5, 2.0, n, dtype=dtype, device=inputs.device)
    with torch.random.fork_rng(devices=[]), _Watch():
        singles = [
            _one_by_one(
                model,
                losses,
                stacked.names,
                [w[k * clients // n, None] for w in weights],
                inputs[k : k + 1],
                targets[k : k + 1],
                factors.new_ones(1),
            ).gradients
            for k in range(n)
        ]
        squared, sums = per_record(
            stacked, lambda: losses(stacked(inputs), targets), weights, factors
        )
    flat = torch.stack(
        [
            torch.cat(
                [
                    (g if g is not None else w[:1] * 0).reshape(-1)
                    for g, w in zip(row, weights, strict=True)
                ]
            )
            for row in singles
        ]
    )
    expected = (flat * factors.unsqueeze(1)).view(clients, n // clients, -1).sum(1)
    made = torch.cat(
        [
            (s if s is not None else w.detach() * 0).reshape(clients, -1)
            for s, w in zip(sums, weights, strict=True)
        ],
        1,
    )
    if not (_same(squared, flat.square().sum(1), dtype) and _same(made, expected, dtype)):
        raise NotStackableError("gradients of its single records are not computed right")


def per_record(
    stacked: StackedModel,
    losses: Callable[[], Tensor],
    weights: Sequence[Tensor],
    factors: Tensor,
) -> tuple[Tensor, list[Tensor | None]]:
    """Return squared norms of records' gradients ``(n,)``, and sums of these times factors."""
    with stacked.taping() as tape:  # the forward pass as well: mapped layers go another way then
        torch.autograd.grad(losses().sum(), weights, allow_unused=True)
    squared, reduced = norms(tape)
    return squared, stacked.by_name([(layer, reduce(factors)) for layer, reduce in reduced])


def _same(made: Tensor | None, expected: Tensor | None, dtype: torch.dtype) -> bool:
    if made is None or expected is None:
        others = [t for t in (made, expected) if t is not None]
        return all(not bool(t.any()) for t in others)
    scale = expected.abs().max() if expected.numel() else torch.zeros(())
    return made.shape == expected.shape and bool(
        ((made - expected).abs().max() if made.numel() else torch.zeros(()))
        <= TOLERANCE[dtype] * scale.clamp_min(1e-9)
    )


def _attributes(model: nn.Module) -> list[Any]:
    """Return the plain values that a model's modules hold, in order."""
    plain = (bool, int, float, str, bytes)
    return [
        (name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, plain)
    ]


@contextmanager
def _counting_bytes(weights: Sequence[Tensor]) -> Iterator[dict[int, int]]:
    """Give the bytes of what a pass keeps for its gradients besides weights, by where it lies."""
    counted: dict[int, int] = {}
    own = {weight.untyped_storage().data_ptr() for weight in weights}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in own:
            return tensor
        counted[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        yield counted


def _varied(tensor: Tensor, clients: int, generator: torch.Generator) -> Tensor:
    noise = torch.randn(clients, *tensor.shape, generator=generator, dtype=torch.float64)
    noise = noise.to(tensor)
    return tensor * (1 + 0.1 * noise) + 0.01 * noise


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _drops(input: Tensor, p: float = 0.5, training: bool = True, *_: Any, **__: Any) -> bool:
    return training and p > 0


def _type_of(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _in_short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200].rstrip('.')}"
