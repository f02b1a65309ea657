"""Records in a CSV file: a site's own, or a table of yours in a simulation."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from fl_app.tasks import classification
from fl_app.tasks.base import PooledExamples
from fl_app.types import ConfigError, Examples


@dataclass(frozen=True, kw_only=True)
class Table:
    """Classes of vectors of numbers, read from a file; satisfies `fl_app.tasks.base.PooledTask`.

    At a deployed site `SITE_KEYS`, which say what the columns mean, are the owner's to say.

    Attributes:
        path: The file; see `read_table`. At a deployed site its owner's policy says which.
        target: Name of the column with the class numbers 0, 1, ...
        inputs: Columns besides that one, >= 1.
        classes: Number of classes, >= 2.
        hidden: Width of the model's hidden layer, or 0 for a linear model.
        test_fraction: Share of the records held out for the server, in [0, 1).
        extra_metrics: Further figures by name.
    """

    name: ClassVar[str] = "table"
    SITE_KEYS: ClassVar[tuple[str, ...]] = ("target", "inputs", "classes")

    path: str | None = None
    target: str = "target"
    inputs: int = 30
    classes: int = 2
    hidden: int = 0
    test_fraction: float = 0.2
    extra_metrics: Mapping[str, classification.Metric] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, least in (("inputs", 1), ("classes", 2), ("hidden", 0)):
            if getattr(self, key) < least:
                raise ConfigError(f"task.{key}={getattr(self, key)} must be >= {least}.")
        if not 0 <= self.test_fraction < 1:
            raise ConfigError(f"task.test_fraction={self.test_fraction} must lie in [0, 1).")

    def build_model(self) -> nn.Module:
        """Return a linear classifier, or one with a hidden layer and ReLU."""
        if not self.hidden:
            return nn.Linear(self.inputs, self.classes)
        first, last = nn.Linear(self.inputs, self.hidden), nn.Linear(self.hidden, self.classes)
        return nn.Sequential(first, nn.ReLU(), last)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of every record, shape ``(n,)``."""
        return classification.losses(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, float]:
        """Return the metrics of `classification.metrics`, and the further ones."""
        own = classification.metrics(outputs, targets)
        return own | classification.measured(self.extra_metrics, outputs, targets)

    def load(self) -> PooledExamples:
        """Return all records, those of the server split off.

        Raises:
            ConfigError: The file cannot be used, or holds something else than was said.
        """
        examples = read_table(self.path, target=self.target)
        columns, largest = examples.inputs.shape[1], int(examples.targets.max())
        if columns != self.inputs:
            raise ConfigError(
                f"task.inputs={self.inputs}, but {self.path} has {columns} columns besides "
                f"{self.target}: set task.inputs to that."
            )
        if not 0 <= int(examples.targets.min()) <= largest < self.classes:
            raise ConfigError(
                f"task.classes={self.classes}, but column {self.target} of {self.path} holds other "
                "numbers than 0 to one below that."
            )
        return classification.hold_out(examples, self.test_fraction)


def read_table(path: str | None, *, target: str) -> Examples:
    """Return the records of a CSV file whose first line names the columns.

    Every column but the target's is an input, in the order of the file. Nothing is scaled: the
    sites of a federation must agree on units, and a mean over one site's records is no unit.

    Args:
        path: The file.
        target: Name of the column with the class numbers 0, 1, ...

    Returns:
        Inputs: float32, shape ``(n, columns - 1)``; targets: int64, shape ``(n,)``.

    Raises:
        ConfigError: The file cannot be read, or holds what is no finite number.
    """
    if not path:
        raise ConfigError(
            "task.path=null names no file: set it to a CSV file; at a deployed site, "
            "data: in the owner's policy names the site's own."
        )
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"task.path={path} cannot be read ({error}).") from error
    except ValueError:
        header, rows = [], []
    if target not in header or not rows:
        raise ConfigError(
            f"task.path={path} must begin with a line of column names, {target} "
            "(task.target) among them, and hold at least one record."
        )
    position = header.index(target)
    records = [_numbers(row, header, line, path) for line, row in enumerate(rows, start=2)]
    table = torch.tensor(records, dtype=torch.float64)
    inputs = torch.cat([table[:, :position], table[:, position + 1 :]], dim=1)
    return Examples(inputs=inputs.float(), targets=table[:, position].long())


def _numbers(row: list[str], header: list[str], line: int, path: str) -> list[float]:
    """Return the numbers in a line; the message of an error names the place, and no value."""
    if len(row) != len(header):
        raise ConfigError(f"{path}, line {line}: {len(row)} values for {len(header)} columns.")
    numbers = []
    for name, value in zip(header, row, strict=True):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ConfigError(f"{path}, line {line}: {name} is no finite number.")
        numbers.append(number)
    return numbers
