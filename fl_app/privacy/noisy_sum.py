"""The Gaussian mechanism on whole updates: clip each, add them up, add noise to the sum.

Everything is computed in double precision, where rounding moves a norm by some 1e-16 of itself;
whoever wants another type rounds what came out, noise and all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from fl_app.params import l2_norm
from fl_app.privacy.randomness import PrivacyRandomness
from fl_app.types import Params


def clipped_sum(deltas: Iterable[Params], *, like: Params, max_norm: float) -> Params:
    """Return the sum of updates, each scaled so that its L2 norm is at most ``max_norm``.

    Guarantee: whatever is sent, one more or one less of ``deltas`` changes the sum by at most
    ``max_norm`` in L2 norm, up to rounding in double precision. The norm runs over all tensors as
    if concatenated. Edge cases: a zero update stays zero; one with a norm of ``max_norm`` or less
    stays as it is, to the bit; one with NaN, infinities, or numbers whose squares overflow a double
    counts as zero; no update at all gives zeros.

    Args:
        deltas: Updates with the names and shapes of ``like``.
        like: Names, shapes and devices.
        max_norm: L2 bound C > 0, in units of parameter change.

    Returns:
        Tensors in double precision, in the order of ``like``.
    """
    total = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in like.items()}
    for delta in deltas:
        norm = l2_norm(delta)
        if not math.isfinite(norm):
            continue
        scale = 1.0 if norm <= max_norm else max_norm / norm
        for name, tensor in total.items():
            tensor.add_(delta[name].to(torch.float64), alpha=scale)
    return total


def with_noise(total: Params, *, std: float, randomness: PrivacyRandomness) -> Params:
    """Return tensors plus independent Gaussian noise of standard deviation ``std`` an entry."""
    return {name: t + randomness.normal(t, std=std) for name, t in total.items()}


def rounded_like(params: Params, like: Params, *, divisor: float = 1.0) -> Params:
    """Return tensors over a divisor, in the types of ``like``."""
    return {name: (t / divisor).to(like[name].dtype) for name, t in params.items()}
