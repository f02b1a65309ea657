"""What all classification tasks share: loss, metrics, and the base they may inherit them from.

Outputs are logits of shape ``(n, classes)`` with at least two classes, also for a yes-or-no
question; targets are int64 class numbers of shape ``(n,)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from fl_app.tasks.base import PooledExamples
from fl_app.tasks.models import ModelBuilder
from fl_app.types import ConfigError, Examples

_SPLIT_SEED = 0  # of the held-out split, which belongs to the data set and not to the run


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of every record in nats, shape ``(n,)``.

    Raises:
        ConfigError: There is no record, or the shapes do not fit.
    """
    _check_shapes(outputs, targets)
    return functional.cross_entropy(outputs, targets, reduction="none")


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Return the share of records whose largest logit is that of their class.

    The cheap part of `metrics`: it imports nothing and takes some ten microseconds. The first of
    several equal logits counts as the largest.

    Raises:
        ConfigError: There is no record, or the shapes do not fit.
    """
    _check_shapes(outputs, targets)
    return int((outputs.argmax(dim=1) == targets).sum()) / len(targets)


def metrics(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Return accuracy, precision, recall, f1 and, where it is defined, auroc; all in [0, 1].

    Precision, recall and f1 are macro averages: plain means over the classes that occur in the
    targets or in the predictions. A class in neither is left out of the mean. A class in one of
    the two alone counts as 0: it is either never found or wrongly claimed. (torchmetrics and
    scikit-learn agree on both.) With two classes both of them enter, not the positive one alone.

    AUROC is the plain mean of the one-versus-rest areas of the softmax probabilities. It is
    absent unless every class occurs in the targets and every probability is a finite number.

    Raises:
        ConfigError: There is no record, or the shapes do not fit.
    """
    _check_shapes(outputs, targets)
    from torchmetrics.functional import classification as tm  # 0.7 to 2 s: on first use only

    outputs = outputs.detach()
    num_classes = outputs.shape[1]
    predicted = outputs.argmax(dim=1)
    values = {"accuracy": accuracy(outputs, targets)}
    for name, score in (
        ("precision", tm.multiclass_precision),
        ("recall", tm.multiclass_recall),
        ("f1", tm.multiclass_f1_score),
    ):
        values[name] = float(
            score(predicted, targets, num_classes, average="macro", validate_args=False)
        )
    # In double precision: float32 rounds confident predictions to 1, which ties their ranks.
    # Handed over as probabilities: torchmetrics takes logits that all lie in [0, 1] for such.
    probabilities = outputs.double().softmax(dim=1)
    all_classes_occur = bool(torch.bincount(targets, minlength=num_classes).all())
    if all_classes_occur and bool(probabilities.isfinite().all()):
        values["auroc"] = float(
            tm.multiclass_auroc(probabilities, targets, num_classes, validate_args=False)
        )
    return values


class Metric(Protocol):
    """One more figure of a model on a set of records, named by ``_target_``."""

    def __call__(self, outputs: Tensor, targets: Tensor) -> float:
        """Return the figure.

        Args:
            outputs: What the model gives, ``(n, *)``.
            targets: One a record, ``(n,)``.
        """
        ...


def measured(metrics: Mapping[str, Metric], outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Return the figures of several metrics by name.

    Raises:
        ConfigError: One raises, or gives no number.
    """
    figures = {}
    for name, metric in metrics.items():
        try:
            figures[name] = float(metric(outputs, targets))
        except Exception as error:  # a metric of anybody's
            raise ConfigError(
                f"task.extra_metrics.{name} gives no number: {type(error).__name__} "
                f"({' '.join(str(error).split())[:200]}). It must return a float of (outputs, "
                "targets); mend it or leave it out."
            ) from error
    return figures


@dataclass(frozen=True, kw_only=True)
class Classification(ABC):
    """Base of the classification tasks whose records lie in one place.

    A subclass gives the three class attributes and `load`. See `fl_app.tasks.base.PooledTask`
    for what each member promises.

    Attributes:
        name: Short name, as in ``task=digits``.
        input_shape: Shape of one record.
        num_classes: Number of classes, >= 2.
        model: Recipe of the model.
        test_fraction: Share of the records held out for the server, in [0, 1). The split is
            stratified by class and always the same, so runs of any seed are comparable.
        extra_metrics: Further figures by name, beside those of `metrics`.
    """

    name: ClassVar[str]
    input_shape: ClassVar[tuple[int, ...]]
    num_classes: ClassVar[int]

    model: ModelBuilder
    test_fraction: float = 0.2
    extra_metrics: Mapping[str, Metric] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.test_fraction < 1:
            raise ConfigError(
                f"task.test_fraction={self.test_fraction} must lie in [0, 1): it is the share of "
                "all records held out for the server; 0 holds none out."
            )

    def build_model(self) -> nn.Module:
        """Return a new model, initialised from torch's global generator."""
        return self.model(self.input_shape, self.num_classes)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of every record, shape ``(n,)``; see `losses`."""
        return losses(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, float]:
        """Return the figures of `metrics`, and the further ones."""
        return metrics(outputs, targets) | measured(self.extra_metrics, outputs, targets)

    @abstractmethod
    def load(self) -> PooledExamples:
        """Return all records; the same ones, in the same order, at every call."""


def hold_out(examples: Examples, test_fraction: float) -> PooledExamples:
    """Split off the records of the server, the same share of each class to within one record.

    The split is a function of the arguments alone, and both parts keep the order of the records.

    Args:
        examples: All records, with int64 class numbers for targets.
        test_fraction: Share to hold out, in [0, 1).

    Returns:
        Both parts; nothing is held out for 0.

    Raises:
        ConfigError: The share leaves one of the parts with fewer records than classes.
    """
    if test_fraction == 0:
        return PooledExamples(train=examples)
    from sklearn.model_selection import train_test_split

    try:
        train, test = train_test_split(
            range(len(examples)),
            test_size=test_fraction,
            stratify=examples.targets.numpy(),
            random_state=_SPLIT_SEED,
        )
    except ValueError as error:
        raise ConfigError(
            f"task.test_fraction={test_fraction} does not split {len(examples)} records so that "
            f"both parts hold every class: use 0, or something near 0.2. ({error})"
        ) from error
    return PooledExamples(
        train=examples.take(torch.tensor(sorted(train))),
        held_out=examples.take(torch.tensor(sorted(test))),
    )


def _check_shapes(outputs: Tensor, targets: Tensor) -> None:
    """Raise unless outputs are ``(n, classes >= 2)`` and targets ``(n,)`` with n > 0."""
    if (
        outputs.ndim != 2
        or outputs.shape[1] < 2
        or outputs.shape[:1] != targets.shape
        or not len(outputs)
    ):
        raise ConfigError(
            f"outputs of shape {tuple(outputs.shape)} and targets of shape "
            f"{tuple(targets.shape)} must have shapes (n, classes) and (n,) with n >= 1 and "
            "classes >= 2: hand over one row of logits per record, and no empty set of records."
        )
