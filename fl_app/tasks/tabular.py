"""Tables of measurements, bundled with scikit-learn: nothing is downloaded."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fl_app.tasks.base import PooledExamples
from fl_app.tasks.classification import Classification, hold_out
from fl_app.types import Examples


@dataclass(frozen=True, kw_only=True)
class BreastCancer(Classification):
    """569 tumours by 30 measurements of their cell nuclei: 0 malignant, 1 benign.

    Inputs have shape ``(n, 30)``, float32. Each column has mean 0 and standard deviation 1 over
    the training records of *all* clients: a convenience of simulation, in which they lie in one
    place. A deployed site would have to scale by public constants, or by private statistics
    that are charged to its budget. Source: Street, Wolberg and Mangasarian 1993, "Nuclear
    feature extraction for breast tumor diagnosis", UCI.
    """

    name: ClassVar[str] = "breast_cancer"
    input_shape: ClassVar[tuple[int, ...]] = (30,)
    num_classes: ClassVar[int] = 2

    def load(self) -> PooledExamples:
        """Return all records, read once a process."""
        return _load(self.test_fraction)


@functools.cache
def _load(test_fraction: float) -> PooledExamples:
    from sklearn.datasets import load_breast_cancer

    columns, classes = load_breast_cancer(return_X_y=True)  # (569, 30), (569,)
    examples = Examples(inputs=torch.from_numpy(columns), targets=torch.from_numpy(classes).long())
    return standardise(hold_out(examples, test_fraction))


def standardise(pooled: PooledExamples) -> PooledExamples:
    """Return the records as float32 with columns of mean 0 and standard deviation 1.

    Mean and (population) standard deviation are those of the training part: held-out records
    must not shape the scale that they are measured on. A constant column becomes 0.

    Args:
        pooled: Inputs of shape ``(n, columns)``, any floating type.
    """
    inputs = pooled.train.inputs.double()
    mean, std = inputs.mean(dim=0), inputs.std(dim=0, correction=0)
    std[std == 0] = 1.0

    def scale(examples: Examples) -> Examples:
        return replace(examples, inputs=((examples.inputs - mean) / std).float())

    held_out = None if pooled.held_out is None else scale(pooled.held_out)
    return replace(pooled, train=scale(pooled.train), held_out=held_out)
