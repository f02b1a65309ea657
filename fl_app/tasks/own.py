"""A task of your own without a task class: a function that loads tensors, and a torch module.

Name both in a YAML; see "Your own data and model" in README.md. What this does not cover (several
outputs, sequences, records made on demand) takes a class with the members in
`fl_app.tasks.base`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from fl_app.tasks import classification
from fl_app.tasks.base import PooledExamples
from fl_app.types import ConfigError, Examples

_SEED = 0  # of what load() draws and of the held-out split: both belong to the data set


@dataclass(frozen=True, kw_only=True)
class OwnTask:
    """Your records and your model.

    Attributes:
        records: Returns all records: a pair ``(inputs, targets)`` of tensors or arrays, a torch
            ``Dataset`` of such pairs, or a `PooledExamples` (for owners, or a split of your own).
            What it draws from torch's global generator is the same at every call.
        model: Returns a new ``nn.Module`` that maps inputs ``(n, *features)`` to outputs: one a
            class where targets are class numbers, one in all where they are floats.
        loss: Returns the loss of every record, shape ``(n,)``, of (outputs, targets); None takes
            the cross-entropy for class numbers and the squared error for floats.
        extra_metrics: Further figures by name, beside accuracy, precision, recall, f1 and auroc
            for class numbers, or the mean absolute error (``mae``) for floats.
        name: Short name, for the records.
        test_fraction: Share of the records held out for the server, in [0, 1).
    """

    records: Callable[[], Any]
    model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    extra_metrics: Mapping[str, classification.Metric] = field(default_factory=dict)
    name: str = "own"
    test_fraction: float = 0.2

    def __post_init__(self) -> None:
        # A module is callable too: left so, all of a run would train one and the same.
        for key, what in (("records", "a function"), ("model", "a class or function")):
            value = getattr(self, key)
            if isinstance(value, nn.Module) or not callable(value):
                raise ConfigError(
                    f"task.{key} is a {type(value).__name__} that has been made already, and must "
                    f"be {what} that makes one: add `_partial_: true` under its _target_."
                )
        if not 0 <= self.test_fraction < 1:
            raise ConfigError(
                f"task.test_fraction={self.test_fraction} must lie in [0, 1): it is the share of "
                "all records held out for the server; 0 holds none out."
            )

    def build_model(self) -> nn.Module:
        """Return a new model, initialised from torch's global generator."""
        return self.model()

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of every record, shape ``(n,)``."""
        if self.loss is not None:
            return self.loss(outputs, targets)
        if targets.is_floating_point():
            return functional.mse_loss(_column(outputs, targets), targets, reduction="none")
        return classification.losses(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, float]:
        """Return the metrics of `classification.metrics`, or ``mae``, and the further ones."""
        if not targets.is_floating_point():
            own: dict[str, float] = classification.metrics(outputs, targets)
        elif self.loss is None:
            own = {"mae": float((_column(outputs, targets) - targets).abs().mean())}
        else:
            own = {}
        return own | classification.measured(self.extra_metrics, outputs, targets)

    def load(self) -> PooledExamples:
        """Return all records, those of the server split off."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            loaded = self.records()
        if isinstance(loaded, PooledExamples):
            return loaded
        examples = _examples_of(loaded)
        if not examples.targets.is_floating_point():
            return classification.hold_out(examples, self.test_fraction)
        size = int(self.test_fraction * len(examples))
        if not size:
            return PooledExamples(train=examples)
        drawn = torch.randperm(len(examples), generator=torch.Generator().manual_seed(_SEED))
        test, train = drawn[:size].sort().values, drawn[size:].sort().values
        return PooledExamples(train=examples.take(train), held_out=examples.take(test))


def _examples_of(loaded: Any) -> Examples:
    """Return records as float inputs and int64 or float targets of shape ``(n,)``.

    Raises:
        ConfigError: They are neither a pair nor a Dataset of pairs.
    """
    if isinstance(loaded, Dataset):
        loaded = next(iter(DataLoader(loaded, batch_size=len(cast(Any, loaded)))), None)
    if not isinstance(loaded, tuple | list) or len(loaded) != 2:
        raise ConfigError(
            f"task.records gave a {type(loaded).__name__}: it must return (inputs, targets) as two "
            "tensors or arrays, or a torch Dataset of such pairs."
        )
    inputs, targets = (torch.as_tensor(part) for part in loaded)
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    kind = torch.float32 if targets.is_floating_point() else torch.int64
    return Examples(inputs=inputs.to(torch.float32), targets=targets.to(kind))


def _column(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the one output a record, ``(n,)``; subtracting ``(n,)`` of ``(n, 1)`` gives (n, n)."""
    if outputs.numel() != len(targets):
        raise ConfigError(
            f"outputs of shape {tuple(outputs.shape)} for {len(targets)} float targets: the model "
            "of a regression gives one number a record; or set task.loss."
        )
    return outputs.reshape(-1)
