"""The mechanism of DP-SGD (Abadi et al. 2016, arXiv:1607.00133, Algorithm 1).

A step sums the clipped gradients of a Poisson batch, adds noise to the sum, and divides by the
*expected* batch size. `fl_app.privacy.private_steps` takes such steps, by Opacus.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from fl_app.privacy.checks import LEAST_BOUND
from fl_app.types import ConfigError


class GradientMode(StrEnum):
    """How the gradient of each record is had; all give the same, to rounding.

    HOOKS materialises them layer by layer, FUNCTORCH the same by ``vmap`` for layers that Opacus
    has no rule for, GHOST computes their norms without them (Li et al. 2022, arXiv:2110.05679) in
    two backward passes: slower for small models, much less memory for large ones.
    """

    HOOKS = "hooks"
    FUNCTORCH = "functorch"
    GHOST = "ghost"


@dataclass(frozen=True, kw_only=True)
class DpSgd:
    """The mechanism of one step.

    Attributes:
        noise_multiplier: Standard deviation of the noise over ``max_grad_norm`` (sigma), >= 0; 0
            is for tests and promises nothing.
        max_grad_norm: L2 bound C on each record's gradient, >= `LEAST_BOUND`.
        expected_batch_size: What the noisy sum is divided by, > 0; not the size that a batch
            happens to have, which is private.
        gradients: One of `GradientMode`.
        max_physical_batch: Records whose gradients are held at once, or None for a whole batch.
            Changes memory, and rounding.
    """

    noise_multiplier: float
    max_grad_norm: float
    expected_batch_size: float
    gradients: str = GradientMode.HOOKS
    max_physical_batch: int | None = None

    def __post_init__(self) -> None:
        if self.gradients not in list(GradientMode):
            raise ConfigError(
                f"privacy.gradients={self.gradients} is not known: choose one of "
                f"{', '.join(GradientMode)}."
            )
        if not LEAST_BOUND <= self.max_grad_norm < math.inf:
            raise ConfigError(
                f"privacy.max_grad_norm={self.max_grad_norm} must be finite and >= "
                f"{LEAST_BOUND:g}, below which rounding makes gradients longer than it."
            )
        if self.max_physical_batch is not None and self.max_physical_batch < 1:
            raise ConfigError(
                f"privacy.max_physical_batch={self.max_physical_batch} must be >= 1, or null."
            )
