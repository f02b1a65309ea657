"""What a layer with weights of its own for each client is, and how its gradients are had.

Shapes: a *stack* holds ``a`` clients with ``b`` records each. Weights have shape ``(a, *shape)``;
records lie client by client in one dimension of ``n = a * b``, so that whatever has no weights
(activations, pooling, reshapes) is computed on them as on any batch of n records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fl_app.types import FlAppError


class NotStackableError(FlAppError):
    """A model cannot be computed for many clients at once; the message says why."""


Reduce: TypeAlias = Callable[[Tensor], Sequence[Tensor]]
"""``(n,)`` factors of records -> for each weight the sum of its gradients times them, by client."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What one layer keeps of a backward pass, for the gradients of its weights.

    Attributes:
        layer: The layer.
        kept: What it kept of the forward pass.
        pulled: Gradient of the loss with respect to its outputs.
    """

    layer: StackedLayer
    kept: Sequence[Tensor]
    pulled: Tensor

    def per_record(self) -> tuple[Tensor, Reduce]:
        """Return the squared norm of each record's gradient, ``(n,)``, and how to sum them."""
        return self.layer.per_record(self.kept, self.pulled)

    def without(self, records: Tensor) -> Entry:
        """Return the entry with zeros where ``records``, booleans ``(n,)``, is True."""
        return Entry(
            layer=self.layer,
            kept=self.layer.blank(self.kept, records),
            pulled=_blank(self.pulled, records),
        )


def norms(tape: Sequence[Entry]) -> tuple[Tensor, list[tuple[StackedLayer, Reduce]]]:
    """Return the squared norm of each record's gradient over all layers, and how to sum them."""
    had = [(entry.layer, *entry.per_record()) for entry in tape]
    squared = torch.stack([of_layer for _, of_layer, _ in had]).sum(0)
    return squared, [(layer, reduce) for layer, _, reduce in had]


def along(numbers: Tensor, tensor: Tensor) -> Tensor:
    """Return numbers in a shape that goes along the first dimensions of a tensor."""
    return numbers.view(*numbers.shape, *[1] * (tensor.dim() - numbers.dim()))


@dataclass(kw_only=True)
class Pass:
    """What the layers of a model are told of the coming pass.

    Attributes:
        weights: Weights of the clients, by name.
        records: n.
        tape: Where the backward pass leaves entries in place of gradients; None for gradients.
        rate: Rate at which the backward pass steps the weights down their gradients at once, in
            place of leaving these; None for gradients.
    """

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    records: int = 0
    tape: list[Entry] | None = None
    rate: float | None = None


class StackedLayer(nn.Module):
    """A layer of which each client has a copy with weights of its own.

    Subclasses say how outputs, input gradients and weight gradients are computed for all of them.

    Args:
        parameter_names: Names in the model's ``state_dict``.
        coming: What the layer is told of the coming pass.

    Attributes:
        passes: How often the layer has been used.
    """

    def __init__(self, parameter_names: Sequence[str], coming: Pass) -> None:
        super().__init__()
        self.parameter_names = tuple(parameter_names)
        self.coming = coming
        self.passes = 0

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The clients' weights in the coming pass, in the order of their names."""
        weights = self.coming.weights
        return tuple([weights[name] for name in self.parameter_names])

    def apply_to(self, x: Tensor) -> Tensor:
        """Return the layer's outputs, differentiable in ``x`` and in the weights.

        Raises:
            NotStackableError: The first dimension of ``x`` is not that of the records.
        """
        self.__dict__["passes"] += 1  # what torch makes of an assignment takes ten times as long
        if x.shape[0] != self.coming.records:
            raise NotStackableError(
                f"{type(self).__name__.removeprefix('Stacked')} got inputs of shape "
                f"{tuple(x.shape)}: their first dimension is not that of the records"
            )
        outputs: Tensor = _Apply.apply(self, x, *self.weights)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return outputs

    def run(self, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """Return outputs, and what the other methods need to be kept of the pass."""
        raise NotImplementedError

    def pull(self, kept: Sequence[Tensor], weights: Sequence[Tensor], d: Tensor) -> Tensor:
        """Return the gradient with respect to inputs, from ``d``, that to outputs."""
        raise NotImplementedError

    def gradients(self, kept: Sequence[Tensor], d: Tensor) -> Sequence[Tensor]:
        """Return the gradient of each weight, summed over the records of each client."""
        raise NotImplementedError

    def descend(self, kept: Sequence[Tensor], d: Tensor, rate: float) -> None:
        """Step the weights down their gradients."""
        for weight, gradient in zip(self.weights, self.gradients(kept, d), strict=True):
            weight.add_(gradient, alpha=-rate)

    def per_record(self, kept: Sequence[Tensor], d: Tensor) -> tuple[Tensor, Reduce]:
        """Return the squared norm of each record's gradient over all weights, and their sums."""
        raise NotImplementedError

    def blank(self, kept: Sequence[Tensor], records: Tensor) -> Sequence[Tensor]:
        """Return what was kept with zeros for some records."""
        return [_blank(tensor, records) for tensor in kept]

    @property
    def clients(self) -> int:
        """Clients of the coming pass."""
        return self.coming.weights[self.parameter_names[0]].shape[0]


def _blank(tensor: Tensor, records: Tensor) -> Tensor:
    per_record = tensor.reshape(records.shape[0], -1)
    zeroed = per_record.masked_fill(records.unsqueeze(1), 0)
    return zeroed.view(tensor.shape)


class _Apply(torch.autograd.Function):
    """A stacked layer's pass; what becomes of gradients of weights, the layer says."""

    @staticmethod
    def forward(ctx: Any, layer: StackedLayer, x: Tensor, *weights: Tensor) -> Tensor:
        outputs, kept = layer.run(x, weights)
        ctx.layer, ctx.num_kept = layer, len(kept)
        ctx.save_for_backward(*kept, *weights)
        return outputs

    @staticmethod
    def backward(ctx: Any, *pulled: Tensor) -> Any:
        layer: StackedLayer = ctx.layer
        (d,) = pulled
        saved = ctx.saved_tensors
        kept, weights = saved[: ctx.num_kept], saved[ctx.num_kept :]
        of_input = layer.pull(kept, weights, d) if ctx.needs_input_grad[1] else None
        if layer.coming.tape is not None:
            layer.coming.tape.append(Entry(layer=layer, kept=kept, pulled=d))
        elif layer.coming.rate is not None:
            layer.descend(kept, d, layer.coming.rate)
        else:
            return None, of_input, *layer.gradients(kept, d)
        return None, of_input, *(None for _ in weights)
