"""Handwritten digits, bundled with scikit-learn: nothing is downloaded."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch

from fl_app.tasks.base import PooledExamples
from fl_app.tasks.classification import Classification, hold_out
from fl_app.types import Examples


@dataclass(frozen=True, kw_only=True)
class Digits(Classification):
    """1,797 images of 8x8 pixels in ten classes.

    Inputs have shape ``(n, 1, 8, 8)``, float32 in [0, 1]. Source: Alpaydin and Kaynak 1998,
    "Optical Recognition of Handwritten Digits", UCI; the copy in scikit-learn is its test set.
    """

    name: ClassVar[str] = "digits"
    input_shape: ClassVar[tuple[int, ...]] = (1, 8, 8)
    num_classes: ClassVar[int] = 10

    def load(self) -> PooledExamples:
        """Return all records, read once a process."""
        return _load(self.test_fraction)


@functools.cache
def _load(test_fraction: float) -> PooledExamples:
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)  # (1797, 64), in 0..16; (1797,)
    images = torch.from_numpy(pixels).float().div(16).reshape(-1, *Digits.input_shape)
    examples = Examples(inputs=images, targets=torch.from_numpy(classes).long())
    return hold_out(examples, test_fraction)
