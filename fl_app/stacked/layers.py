"""The layers that are computed for all clients at once by a rule of their own.

Per-record gradients are made only where their norm cannot be had for less: for a weight of shape
(p, q) that a record uses at l positions, the norm comes from two l x l Gram matrices, which is
less to compute and to hold if 2 l^2 <= p q ("ghost norms": Li et al. 2022, arXiv:2110.05679,
Section 4; the rule: Bu et al. 2022, arXiv:2205.10683, Equation 3). The backward pass is run once:
what it leaves at each layer gives norms and then clipped sums ("book-keeping": Bu et al. 2023,
arXiv:2210.00038).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fl_app.stacked.layer import NotStackableError, Pass, Reduce, StackedLayer, along


class _Multiplying(StackedLayer):
    """A layer that multiplies what it sees at each position by a matrix, and may add a bias."""

    def _by_record(self, kept: Sequence[Tensor], d: Tensor) -> tuple[Tensor, Tensor]:
        """Return what was seen, ``(n * groups, q, l)``, and pulled, ``(n * groups, p, l)``."""
        raise NotImplementedError

    def per_record(self, kept: Sequence[Tensor], d: Tensor) -> tuple[Tensor, Reduce]:
        """Return squared norms of the products, without making them where that is less."""
        n, has_bias = d.shape[0], len(self.weights) > 1
        inputs, pulled = self._by_record(kept, d)
        squared, made = _squared_norms(inputs, pulled)
        squared = squared.view(n, -1).sum(1)
        if has_bias:
            of_bias = pulled.sum(2).reshape(n, -1)  # (n, p)
            squared = squared + of_bias.square().sum(1)

        def reduce(factors: Tensor) -> Sequence[Tensor]:
            if made is None:
                return self.gradients(kept, d * along(factors, d))
            sums = _weighted_sum(factors, made.view(n, -1), self.clients)
            of_weight = sums.view(self.weights[0].shape)
            if not has_bias:
                return (of_weight,)
            return of_weight, _weighted_sum(factors, of_bias, self.clients)

        return squared, reduce


class StackedLinear(_Multiplying):
    """``nn.Linear``: ``(n, *, q) -> (n, *, p)``."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        return self.apply_to(x)

    def run(self, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """Keep the inputs, as ``(n, l, q)``."""
        weight, *bias = weights
        rows = x.reshape(weight.shape[0], -1, x.shape[-1])  # (a, b * l, q)
        turned = weight.transpose(1, 2)
        if bias:
            outputs = torch.baddbmm(bias[0].unsqueeze(1), rows, turned)
        else:
            outputs = torch.bmm(rows, turned)
        return outputs.view(*x.shape[:-1], weight.shape[1]), (rows,)

    def pull(self, kept: Sequence[Tensor], weights: Sequence[Tensor], d: Tensor) -> Tensor:
        """Return ``d`` times the weights."""
        weight = weights[0]
        rows = d.reshape(weight.shape[0], -1, d.shape[-1])
        return torch.bmm(rows, weight).view(*d.shape[:-1], weight.shape[2])

    def gradients(self, kept: Sequence[Tensor], d: Tensor) -> Sequence[Tensor]:
        """Return sums over records and positions of outer products."""
        rows = d.reshape(self.clients, -1, d.shape[-1])
        of_weight = torch.bmm(rows.transpose(1, 2), kept[0])
        return (of_weight, rows.sum(1)) if len(self.weights) > 1 else (of_weight,)

    def descend(self, kept: Sequence[Tensor], d: Tensor, rate: float) -> None:
        """Step in the product itself: the gradient is as large as the weights, and is not made."""
        weight, *bias = self.weights
        rows = d.reshape(weight.shape[0], -1, d.shape[-1])
        weight.baddbmm_(rows.transpose(1, 2), kept[0], alpha=-rate)
        if bias:
            bias[0].add_(rows.sum(1), alpha=-rate)

    def _by_record(self, kept: Sequence[Tensor], d: Tensor) -> tuple[Tensor, Tensor]:
        n = d.shape[0]
        inputs, pulled = kept[0].view(n, -1, kept[0].shape[-1]), d.reshape(n, -1, d.shape[-1])
        return inputs.transpose(1, 2), pulled.transpose(1, 2)


class StackedConv(_Multiplying):
    """``nn.Conv1d/2d/3d`` padded with zeros, as matrix products over unfolded inputs.

    Args:
        parameter_names: As of `StackedLayer`.
        coming: As of `StackedLayer`.
        layer: The layer to stack.
    """

    def __init__(
        self,
        parameter_names: Sequence[str],
        coming: Pass,
        layer: nn.Conv1d | nn.Conv2d | nn.Conv3d,
    ) -> None:
        super().__init__(parameter_names, coming)
        self._kernel = tuple(layer.kernel_size)
        self._stride = tuple(layer.stride)
        self._dilation = tuple(layer.dilation)
        self._groups = layer.groups
        self._padding = _paddings(layer)  # (before, after) of each dimension

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        if x.dim() != len(self._kernel) + 2:
            raise NotStackableError(f"a convolution got inputs of shape {tuple(x.shape)}")
        padding = [size for pair in reversed(self._padding) for size in pair]
        return self.apply_to(functional.pad(x, padding) if any(padding) else x)

    def run(self, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """Keep the unfolded inputs, as ``(n * groups, q, positions)``."""
        weight, *bias = weights
        columns, sizes = self._unfold(x)
        a, p = weight.shape[:2]
        matrices = self._matrices(weight, x.shape[0])  # (n * groups, p / groups, q)
        if bias:
            start = bias[0].view(a, 1, p, 1).expand(a, x.shape[0] // a, p, 1)
            start = start.reshape(matrices.shape[0], -1, 1)
            outputs = torch.baddbmm(start, matrices, columns)
        else:
            outputs = torch.bmm(matrices, columns)
        shape = x.new_empty(1).expand(x.shape)  # carries the shape, and no memory
        return outputs.view(x.shape[0], p, *sizes), (columns, shape)

    def pull(self, kept: Sequence[Tensor], weights: Sequence[Tensor], d: Tensor) -> Tensor:
        """Return what every output leaves at the inputs it was computed from, added up."""
        n, sizes = d.shape[0], d.shape[2:]
        of_columns = torch.bmm(
            self._matrices(weights[0], n).transpose(1, 2),
            d.reshape(n * self._groups, -1, sizes.numel()),
        )
        total = d.new_zeros(kept[1].shape)
        taps = of_columns.view(n, total.shape[1], *self._kernel, *sizes)
        for tap in itertools.product(*(range(size) for size in self._kernel)):
            window = tuple(
                slice(t * dilation, t * dilation + (size - 1) * stride + 1, stride)
                for t, dilation, size, stride in zip(
                    tap, self._dilation, sizes, self._stride, strict=True
                )
            )
            seen: Any = (..., *window)
            tapped: Any = (slice(None), slice(None), *tap)
            total[seen].add_(taps[tapped])  # += would copy it onto itself, too
        return total

    def gradients(self, kept: Sequence[Tensor], d: Tensor) -> Sequence[Tensor]:
        """Return sums over records of what `_made` gives."""
        a, weight = self.clients, self.weights[0]
        made = self._made(kept, d)
        sums = made.view(a, d.shape[0] // a, -1).sum(1).view(weight.shape)
        if len(self.weights) == 1:
            return (sums,)
        pulled = d.reshape(a, d.shape[0] // a, d.shape[1], -1)
        return sums, pulled.sum((1, 3))

    def _by_record(self, kept: Sequence[Tensor], d: Tensor) -> tuple[Tensor, Tensor]:
        return kept[0], d.reshape(kept[0].shape[0], -1, kept[0].shape[2])

    def blank(self, kept: Sequence[Tensor], records: Tensor) -> Sequence[Tensor]:
        """Return the unfolded inputs with zeros for some records."""
        return [*super().blank(kept[:1], records), kept[1]]

    def _made(self, kept: Sequence[Tensor], d: Tensor) -> Tensor:
        inputs, pulled = self._by_record(kept, d)
        return torch.bmm(pulled, inputs.transpose(1, 2))  # (n * groups, p / groups, q)

    def _matrices(self, weight: Tensor, n: int) -> Tensor:
        a, p = weight.shape[:2]
        matrices = weight.reshape(a, 1, self._groups, p // self._groups, -1)
        expanded = matrices.expand(a, n // a, *matrices.shape[2:])
        return expanded.reshape(n * self._groups, p // self._groups, -1)

    def _unfold(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return for each position what the kernel sees there, and the sizes of the output."""
        x = x.contiguous()
        n, channels, *sizes = x.shape
        steps = x.stride()[2:]
        out = [
            (size - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, dilation in zip(
                sizes, self._kernel, self._stride, self._dilation, strict=True
            )
        ]
        seen = x.as_strided(
            (n, channels, *self._kernel, *out),
            (
                *x.stride()[:2],
                *(step * dilation for step, dilation in zip(steps, self._dilation, strict=True)),
                *(step * stride for step, stride in zip(steps, self._stride, strict=True)),
            ),
        )
        rows = channels // self._groups * math.prod(self._kernel)
        return seen.reshape(n * self._groups, rows, math.prod(out)), tuple(out)


class StackedScale(StackedLayer):
    """The weights of ``nn.GroupNorm`` and ``nn.LayerNorm``: a factor and a shift a feature.

    Args:
        parameter_names: As of `StackedLayer`.
        coming: As of `StackedLayer`.
        layer: The layer to stack.
    """

    def __init__(
        self, parameter_names: Sequence[str], coming: Pass, layer: nn.GroupNorm | nn.LayerNorm
    ) -> None:
        super().__init__(parameter_names, coming)
        self._groups = layer.num_groups if isinstance(layer, nn.GroupNorm) else None
        self._shape = [] if isinstance(layer, nn.GroupNorm) else list(layer.normalized_shape)
        self._eps = layer.eps

    def forward(self, x: Tensor) -> Tensor:
        """Return normalised inputs, scaled and shifted."""
        if self._groups is None:
            return self.apply_to(functional.layer_norm(x, self._shape, eps=self._eps))
        return self.apply_to(functional.group_norm(x, self._groups, eps=self._eps))

    def run(self, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """Keep the normalised inputs."""
        parts, weight = self._split(x), self._broadcast(weights[0])
        if len(weights) > 1:
            outputs = torch.addcmul(self._broadcast(weights[1]), parts, weight)
        else:
            outputs = parts * weight
        return outputs.view(x.shape), (x,)

    def pull(self, kept: Sequence[Tensor], weights: Sequence[Tensor], d: Tensor) -> Tensor:
        """Return ``d`` times the factors."""
        return (self._split(d) * self._broadcast(weights[0])).view(d.shape)

    def gradients(self, kept: Sequence[Tensor], d: Tensor) -> Sequence[Tensor]:
        """Return sums over records and positions."""
        return [
            made.view(self.clients, -1, made.shape[1]).sum(1).view(weight.shape)
            for made, weight in zip(self._made(kept[0], d), self.weights, strict=True)
        ]

    def per_record(self, kept: Sequence[Tensor], d: Tensor) -> tuple[Tensor, Reduce]:
        """Return squared norms; these gradients are small."""
        all_made = self._made(kept[0], d)
        squared = torch.stack([made.square().sum(1) for made in all_made]).sum(0)
        return squared, lambda factors: [
            _weighted_sum(factors, made, self.clients).view(weight.shape)
            for made, weight in zip(all_made, self.weights, strict=True)
        ]

    def _made(self, x: Tensor, d: Tensor) -> list[Tensor]:
        """Return each record's gradients, ``(n, features)``."""
        pulled = self._split(d)
        of_weight = (pulled * self._split(x)).sum((2, 4)).view(d.shape[0], -1)
        if len(self.weights) == 1:
            return [of_weight]
        return [of_weight, pulled.sum((2, 4)).view(d.shape[0], -1)]

    def _split(self, x: Tensor) -> Tensor:
        """Return ``(a, b, positions before, features, positions after)``."""
        a = self.clients
        if self._groups is not None:
            return x.reshape(a, x.shape[0] // a, 1, x.shape[1], -1)
        return x.reshape(a, x.shape[0] // a, -1, math.prod(self._shape), 1)

    def _broadcast(self, weight: Tensor) -> Tensor:
        return weight.reshape(weight.shape[0], 1, 1, -1, 1)


class StackedEmbedding(StackedLayer):
    """``nn.Embedding``: whole numbers ``(n, *)`` -> ``(n, *, width)``.

    Args:
        parameter_names: As of `StackedLayer`.
        coming: As of `StackedLayer`.
        layer: The layer to stack.
    """

    def __init__(self, parameter_names: Sequence[str], coming: Pass, layer: nn.Embedding) -> None:
        super().__init__(parameter_names, coming)
        self._padding = layer.padding_idx

    def forward(self, x: Tensor) -> Tensor:
        """Return the rows that numbers stand for."""
        return self.apply_to(x)

    def run(self, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """Keep the numbers, each client's beginning where its rows do."""
        a, count, width = weights[0].shape
        # Zeros; raises if a number is out of range, which in the stack would mean a row of another
        # client. Added, for else a recording would leave it out.
        in_range = functional.embedding(x, weights[0].new_zeros(count, 1))
        shift = torch.arange(0, a * count, count, device=x.device).repeat_interleave(
            x.shape[0] // a
        )
        rows = x + along(shift, x)
        return weights[0].reshape(a * count, width)[rows] + in_range, (rows,)

    def gradients(self, kept: Sequence[Tensor], d: Tensor) -> Sequence[Tensor]:
        """Return the rows' sums."""
        a, count, width = self.weights[0].shape
        total = d.new_zeros(a * count, width)
        total.index_add_(0, kept[0].reshape(-1), self._counted(kept[0], d).reshape(-1, width))
        return (total.view(a, count, width),)

    def per_record(self, kept: Sequence[Tensor], d: Tensor) -> tuple[Tensor, Reduce]:
        """Return squared norms: those of the rows' sums, over pairs of equal numbers."""
        n = d.shape[0]
        rows, pulled = kept[0].reshape(n, -1), self._counted(kept[0], d).reshape(n, -1, d.shape[-1])
        equal = rows.unsqueeze(1) == rows.unsqueeze(2)
        precise = pulled.double()  # as in `_squared_norms`
        squared = (torch.bmm(precise, precise.transpose(1, 2)) * equal).sum((1, 2)).clamp_min_(0)
        return squared.to(pulled.dtype), lambda factors: self.gradients(kept, d * along(factors, d))

    def blank(self, kept: Sequence[Tensor], records: Tensor) -> Sequence[Tensor]:
        """Return the numbers as they are: they multiply nothing."""
        return kept

    def _counted(self, rows: Tensor, d: Tensor) -> Tensor:
        """Return ``d`` without what the padding row is to ignore."""
        if self._padding is None:
            return d
        padding = rows % self.weights[0].shape[1] == self._padding
        return d.masked_fill(padding.unsqueeze(-1), 0)


def _squared_norms(inputs: Tensor, pulled: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return squared norms of ``pulled @ inputs^T``, and these products if they had to be made.

    Args:
        inputs: ``(n, q, l)``.
        pulled: ``(n, p, l)``.

    Returns:
        ``(n,)``, and ``(n, p, q)`` or None.
    """
    q, positions, p = inputs.shape[1], inputs.shape[2], pulled.shape[1]
    if positions == 1:
        return _squared(inputs) * _squared(pulled), None
    if 2 * positions**2 <= p * q:
        # In double precision: what cancels in this sum can be many times what is left of it, and a
        # norm that came out too small would let a record pass unclipped.
        grams = [torch.bmm(t.transpose(1, 2), t) for t in (inputs.double(), pulled.double())]
        return (grams[0] * grams[1]).sum((1, 2)).clamp_min_(0).to(inputs.dtype), None
    made = torch.bmm(pulled, inputs.transpose(1, 2))
    return _squared(made), made


def _squared(tensor: Tensor) -> Tensor:
    """Return the squared norm of each record's part, in one pass over it."""
    norms: Tensor = torch.linalg.vector_norm(tensor.flatten(1), dim=1)
    return norms.square_()


def _weighted_sum(factors: Tensor, made: Tensor, clients: int) -> Tensor:
    """Return by client the sum of records' gradients ``(n, *shape)`` times factors ``(n,)``."""
    flat = made.reshape(clients, made.shape[0] // clients, -1)
    sums = torch.bmm(factors.view(clients, 1, -1), flat)
    return sums.view(clients, *made.shape[1:])


def _paddings(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[tuple[int, int]]:
    if isinstance(layer.padding, tuple):
        return [(int(size), int(size)) for size in layer.padding]
    if layer.padding == "valid":
        return [(0, 0) for _ in layer.kernel_size]
    totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return [(total // 2, total - total // 2) for total in totals]
