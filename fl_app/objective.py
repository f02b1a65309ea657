"""What a client minimises besides its own loss, as a correction of the gradient.

A local objective is a frozen dataclass with one method, named by ``_target_`` under
``strategy.objective``. Gradients are corrected rather than losses extended: the same term, at a
fraction of the time, and the reported training loss stays comparable between objectives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from fl_app.types import ConfigError


class LocalObjective(Protocol):
    """A term that is added to every client's loss.

    One whose gradient at each weight depends on that weight alone may say so by an
    ``is_elementwise = True``. It is then called for many clients at once as well, with local
    parameters ``(clients, *shape)`` beside received ones ``(*shape)``.
    """

    def add_gradient(self, local: Sequence[Tensor], received: Sequence[Tensor]) -> None:
        """Add the term's gradient to ``tensor.grad`` of each local parameter, in place.

        Args:
            local: Trainable parameters of the local model, with gradients.
            received: The global model's, same order and shapes.
        """
        ...


def is_elementwise(objective: LocalObjective) -> bool:
    """Return whether an objective says so; see `LocalObjective`."""
    return bool(getattr(objective, "is_elementwise", False))


@dataclass(frozen=True, kw_only=True)
class OwnLoss:
    """No further term: a client minimises its own loss (FedAvg)."""

    is_elementwise: ClassVar[bool] = True

    def add_gradient(self, local: Sequence[Tensor], received: Sequence[Tensor]) -> None:
        """Leave the gradients as they are."""


@dataclass(frozen=True, kw_only=True)
class Proximal:
    """FedProx's term ``mu/2 ||w - w_t||^2`` (Li et al. 2020, arXiv:1812.06127, Equation 2).

    The norm is squared, as in the paper, and its gradient is ``mu (w - w_t)``. (Flower's FedProx
    page states the squared norm too, but the code it shows beside it does not square.)
    """

    is_elementwise: ClassVar[bool] = True

    mu: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.mu < math.inf:
            raise ConfigError(
                f"strategy.objective.mu={self.mu} must be >= 0: 0 is FedAvg, "
                "larger values hold clients closer to the global model."
            )

    def add_gradient(self, local: Sequence[Tensor], received: Sequence[Tensor]) -> None:
        """Add ``mu (w - w_t)``."""
        if self.mu == 0:
            return
        with torch.no_grad():
            # A parameter the loss does not use has no gradient and has not moved: no pull.
            moved = [(w, w_t) for w, w_t in zip(local, received, strict=True) if w.grad is not None]
            pull = torch._foreach_sub([w for w, _ in moved], [w_t for _, w_t in moved])
            gradients = [w.grad for w in local if w.grad is not None]
            torch._foreach_add_(gradients, pull, alpha=self.mu)
