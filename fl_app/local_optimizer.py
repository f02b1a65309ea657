"""The optimizer a client steps with: torch's, or for plain SGD the same arithmetic without it.

A step of a small model takes a tenth of a millisecond, and half as much again goes into what
``torch.optim`` does around its arithmetic (hooks, profiler ranges, argument checks). Federated
simulations take such steps by the million, nearly all of them plain SGD's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fl_app.server_optimizer import OptimizerFactory


class LocalOptimizer(Protocol):
    """Steps parameters along the gradients they hold."""

    def step(self) -> None:
        """Take one step."""
        ...

    def state_dict(self) -> Mapping[str, Any]:
        """Return what it remembers; a tree of tensors and plain values."""
        ...


class PlainSgd:
    """``w = w - lr (g + weight_decay w)``: the bits of ``torch.optim.SGD`` without momentum.

    Parameters without a gradient stay as they are.
    """

    def __init__(self, parameters: Sequence[Tensor], *, lr: float, weight_decay: float):
        self._parameters = parameters
        self._lr = lr
        self._weight_decay = weight_decay

    @torch.no_grad()
    def step(self) -> None:
        """Take one step."""
        moved: list[Tensor] = []
        gradients: list[Tensor] = []
        for parameter in self._parameters:
            if parameter.grad is not None:
                moved.append(parameter)
                gradients.append(parameter.grad)
        if self._weight_decay:
            decayed = torch._foreach_add(gradients, moved, alpha=self._weight_decay)
            gradients = list(decayed)
        torch._foreach_add_(moved, gradients, alpha=-self._lr)

    def state_dict(self) -> Mapping[str, Any]:
        """Return nothing: it remembers nothing."""
        return {}


def make_local_optimizer(
    factory: OptimizerFactory,
    parameters: Sequence[Tensor],
    state: Mapping[str, Any] | None = None,
) -> LocalOptimizer:
    """Return the optimizer that a factory describes, over these parameters.

    Args:
        factory: Such as ``partial(torch.optim.SGD, lr=0.1)``.
        parameters: What it steps.
        state: State to continue from, or None to start afresh.
    """
    if state is None and isinstance(factory, partial) and factory.func is torch.optim.SGD:
        options = {name: value for name, value in factory.keywords.items() if value}
        if not factory.args and options.keys() <= {"lr", "weight_decay"}:
            return PlainSgd(
                parameters,
                lr=options.get("lr", 0.0 if "lr" in factory.keywords else 1e-3),
                weight_decay=options.get("weight_decay", 0.0),
            )
    optimizer = factory(parameters)
    if state:
        # A copy: torch keeps the given tensors, and steps them in place.
        optimizer.load_state_dict(deepcopy(dict(state)))
    return optimizer
