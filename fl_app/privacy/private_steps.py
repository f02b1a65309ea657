"""Private steps, by Opacus; who trains without privacy does not import this, nor Opacus.

What a model keeps of all this is nothing: hooks and attributes are taken off again, and names carry
no ``_module.`` prefix, because Opacus' hooks are attached without its wrapper module.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
    GradSampleHooksFastGradientClipping,
)
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor, nn
from torch.optim import Optimizer

from fl_app.privacy.dp_sgd import DpSgd, GradientMode
from fl_app.privacy.randomness import PrivacyRandomness

logging.getLogger("opacus").setLevel(logging.WARNING)


class PrivateStepper:
    """Takes DP-SGD steps on a model; made by `private_steps`.

    Args:
        model: In training mode, with hooks attached.
        hooks: Opacus' hooks on it.
        optimizer: Opacus' wrapper of the local optimizer.
        losses: (outputs, targets) -> loss of each record.
        mechanism: Bounds and noise.
    """

    def __init__(
        self,
        model: nn.Module,
        hooks: GradSampleHooks,
        optimizer: DPOptimizer,
        losses: Callable[[Tensor, Tensor], Tensor],
        mechanism: DpSgd,
    ) -> None:
        self._model = model
        self._hooks = hooks
        self._optimizer = optimizer
        self._losses = losses
        self._mechanism = mechanism

    def step(
        self, inputs: Tensor, targets: Tensor, *, then: Callable[[], None] = lambda: None
    ) -> None:
        """Take one step on a batch, which may be empty: then it is a step of noise alone.

        Args:
            inputs: ``(b, *features)``; b >= 0.
            targets: ``(b,)``.
            then: Called once ``parameter.grad`` holds the private gradient, before the local
                optimizer's step; may add to it what does not depend on the records.
        """
        optimizer = self._optimizer
        size = self._mechanism.max_physical_batch or max(len(targets), 1)
        parts = list(zip(torch.split(inputs, size), torch.split(targets, size), strict=True))
        for number, (part_inputs, part_targets) in enumerate(parts, start=1):
            optimizer.signal_skip_step(do_skip=number < len(parts))
            optimizer.zero_grad(set_to_none=True)
            if len(part_targets):
                self._backward(part_inputs, part_targets)
            self._fill_gaps(len(part_targets))
            if optimizer.pre_step():
                then()
                optimizer.original_optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _backward(self, inputs: Tensor, targets: Tensor) -> None:
        """Have each record's gradient, one that is not finite as zero.

        It cannot be clipped, and would make the whole sum NaN: that the record is there would show.
        """
        losses = self._losses(self._model(inputs), targets)
        if self._mechanism.gradients == GradientMode.GHOST:
            for parameter in self._optimizer.params:  # of those that the loss does not reach
                parameter._norm_sample = losses.new_zeros(len(losses))
            DPTensorFastGradientClipping(
                self._hooks, self._optimizer, losses, loss_reduction="sum"
            ).backward()
            finite = self._hooks.per_sample_gradient_norms.isfinite()
            if not bool(finite.all()):
                self._optimizer.original_optimizer.zero_grad(set_to_none=True)
                if bool(finite.any()):
                    self._backward(inputs[finite], targets[finite])
        else:
            losses.sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            gradients = [p.grad_sample for p in self._optimizer.params if p.grad_sample is not None]
            sums = torch.stack([g.flatten(1).sum(dim=1) for g in gradients])  # (parameters, b)
            finite = sums.isfinite().all(dim=0)
            if not bool(finite.all()):
                for gradient in gradients:
                    gradient[~finite] = 0.0

    def _fill_gaps(self, count: int) -> None:
        """Give parameters that the loss did not reach gradients of zero: they get noise too."""
        for parameter in self._optimizer.params:
            if self._mechanism.gradients == GradientMode.GHOST:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            elif parameter.grad_sample is None:
                parameter.grad_sample = parameter.new_zeros((count, *parameter.shape))


@contextmanager
def private_steps(
    model: nn.Module,
    optimizer: Optimizer,
    losses: Callable[[Tensor, Tensor], Tensor],
    mechanism: DpSgd,
    randomness: PrivacyRandomness,
) -> Iterator[PrivateStepper]:
    """Make a model's steps private for the block; after it the model is as it was but for values.

    Args:
        model: In training mode; must pass `fl_app.private_preflight`.
        optimizer: The local optimizer over its trainable parameters.
        losses: (outputs, targets) -> loss of each record, shape ``(b,)``.
        mechanism: Bounds and noise.
        randomness: Where the noise comes from.
    """
    ghost = mechanism.gradients == GradientMode.GHOST
    options: dict[str, Any] = {
        "loss_reduction": "sum",
        "force_functorch": mechanism.gradients == GradientMode.FUNCTORCH,
    }
    if ghost:
        options["max_grad_norm"] = mechanism.max_grad_norm
    hooks = (GradSampleHooksFastGradientClipping if ghost else GradSampleHooks)(model, **options)
    made = (_GhostOptimizer if ghost else _NoisyOptimizer)(
        optimizer,
        noise_multiplier=mechanism.noise_multiplier,
        max_grad_norm=mechanism.max_grad_norm,
        expected_batch_size=mechanism.expected_batch_size,
    )
    made.randomness = randomness
    try:
        with warnings.catch_warnings():
            # Of torch, that hooks fire although no input needs a gradient: that is how they work.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield PrivateStepper(model, hooks, made, losses, mechanism)
    finally:
        hooks.cleanup()
        for parameter in model.parameters():
            if hasattr(parameter, "summed_grad"):
                del parameter.summed_grad
        for module in model.modules():
            for name in ("activations", "max_batch_len"):
                if hasattr(module, name):
                    delattr(module, name)


class _OurNoise:
    """Opacus' optimizers with noise from where we say; theirs is torch's."""

    randomness: PrivacyRandomness

    def add_noise(self: Any) -> None:
        """Set ``grad`` of each parameter to the noisy sum of clipped gradients."""
        std = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            noise = self.randomness.normal(parameter.summed_grad, std=std)
            parameter.grad = (parameter.summed_grad + noise).view_as(parameter)


class _NoisyOptimizer(_OurNoise, DPOptimizer):  # type: ignore[misc]  # opacus has no types
    pass


class _GhostOptimizer(_OurNoise, DPOptimizerFastGradientClipping):  # type: ignore[misc]
    pass
