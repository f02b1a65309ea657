"""One step of a stack of clients: from their batch to the gradients of their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from fl_app.privacy.dp_sgd import DpSgd
from fl_app.stacked.batches import Batch
from fl_app.stacked.draws import Draws
from fl_app.stacked.layer import along, norms
from fl_app.stacked.model import StackedModel
from fl_app.stacked.program import Programs
from fl_app.types import Examples

_OPACUS_EPSILON = 1e-6
"""What Opacus adds to norms before it divides by them."""


class _Steps:
    """What plain and private steps share.

    Args:
        model: The architecture.
        losses: (outputs, targets) -> loss of each record.
    """

    def __init__(self, model: StackedModel, losses: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._model = model
        self._losses = losses
        self._programs: dict[float | None, Programs] = {}

    def _program(self, constant: float | None, step: Callable[..., Sequence[Tensor]]) -> Programs:
        """Return the recordings of a step: of a constant, three tensors by record, and weights."""
        if constant not in self._programs:
            self._programs[constant] = Programs(partial(step, constant), by_record=3)
        return self._programs[constant]

    def _bound(self, weights: Sequence[Tensor], records: int) -> list[Tensor]:
        """Return weights that gradients can be had of, once the model is bound to them."""
        local = [weight.detach().requires_grad_() for weight in weights]
        self._model.bind(local, records)
        return local


class PlainSteps(_Steps):
    """Steps on mean losses; arguments as of `_Steps`."""

    _reached: Sequence[bool] = ()

    def __call__(
        self, records: Examples, weights: Sequence[Tensor], batch: Batch, *, rate: float | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return losses ``(n,)``, and each client's gradient; None where losses do not reach.

        Args:
            records: Records of the batch, ``(n, *)``.
            weights: Each ``(a, *shape)``.
            batch: Their shares in the mean losses.
            rate: Step the weights down their gradients at this rate, in place of returning any.
        """
        program = self._program(rate, self._step)
        losses, *present = program(records.inputs, records.targets, batch.shares, *weights)
        gradients = iter(present)
        return losses, [next(gradients) if reached else None for reached in self._reached]

    def _step(
        self, rate: float | None, inputs: Tensor, targets: Tensor, shares: Tensor, *weights: Tensor
    ) -> Sequence[Tensor]:
        local = self._bound(weights, targets.shape[0])
        with nullcontext() if rate is None else self._model.descending(rate):
            losses = self._losses(self._model(inputs), targets)
            gradients = torch.autograd.grad(
                losses, local, shares.to(losses.dtype), allow_unused=True
            )
        self._reached = [gradient is not None for gradient in gradients]
        return losses.detach(), *(gradient for gradient in gradients if gradient is not None)


class PrivateSteps(_Steps):
    """Steps on clipped and noisy gradients: what Opacus computes for one client, for a stack.

    Each record's gradient is clipped, the clipped ones are summed by client, noise is added, and
    the sum is divided by the expected batch size (Abadi et al. 2016, arXiv:1607.00133,
    Algorithm 1). Arguments as of `_Steps`.
    """

    def __call__(
        self,
        records: Examples,
        weights: Sequence[Tensor],
        batch: Batch,
        mechanisms: Sequence[DpSgd],
        draws: Draws,
    ) -> list[Tensor]:
        """Return each client's noisy mean gradient.

        A record whose gradient is not finite counts as zero: it cannot be clipped, and would make
        the client's sum NaN, which shows that it is there. A client whose batch is empty gets
        noise alone.

        Args:
            records: Records of the batch, ``(n, *)``.
            weights: Each ``(a, *shape)``.
            batch: Which of the records are padding.
            mechanisms: Bounds and noise of each client; the same bound for all.
            draws: Where the noise comes from.
        """
        bound = mechanisms[0].max_grad_norm
        given = (records.inputs, records.targets, batch.real, *weights)
        squared, *sums = self._program(bound, self._sums)(*given)
        if not bool(squared.isfinite().all()):
            _, *sums = self._sums(bound, *given, finite_only=True)
        deviations = [mechanism.noise_multiplier * bound for mechanism in mechanisms]
        expected = [mechanism.expected_batch_size for mechanism in mechanisms]
        of_client = torch.tensor([deviations, expected], dtype=torch.float64, device=squared.device)
        for summed, drawn in zip(sums, draws.noise(sums), strict=True):
            deviation, size = (along(row, summed) for row in of_client)
            # Scaled before it is rounded: in a short type sigma times C could come out smaller.
            summed.add_(drawn.mul_(deviation).to(summed.dtype)).div_(size.to(summed.dtype))
        return sums

    def _sums(
        self,
        bound: float,
        inputs: Tensor,
        targets: Tensor,
        real: Tensor,
        *weights: Tensor,
        finite_only: bool = False,
    ) -> Sequence[Tensor]:
        """Return squared norms of records' gradients ``(n,)``, and sums of the clipped ones."""
        local = self._bound(weights, targets.shape[0])
        with self._model.taping() as tape:
            total = (self._losses(self._model(inputs), targets) * real).sum()
            torch.autograd.grad(total, local, allow_unused=True)
        with torch.no_grad():
            squared, reduced = norms(tape)
            if finite_only:
                excluded = ~squared.isfinite()
                squared, reduced = norms([entry.without(excluded) for entry in tape])
            factors = (bound / (squared.sqrt() + _OPACUS_EPSILON)).clamp(max=1.0) * real
            sums = self._model.by_name([(layer, reduce(factors)) for layer, reduce in reduced])
            filled = [
                torch.zeros_like(w) if s is None else s for s, w in zip(sums, local, strict=True)
            ]
        return squared, *filled
