"""Models that fit any task whose records have one shape: each is a recipe that builds a module.

A recipe is told the shape of one record and the number of outputs by its task, so the same
``task/model`` YAML serves every task. No layer mixes the records of a batch (GroupNorm, never
BatchNorm) and no activation works in place: per-example gradients and a stack of client models
need both. A model of your own is any callable with this signature, named by ``_target_``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from fl_app.types import ConfigError

_MAX_GROUPS = 4  # most groups of channels that one GroupNorm normalises apart


class ModelBuilder(Protocol):
    """Builds a new model for records of one shape."""

    def __call__(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        """Return a module from ``(n, *input_shape)`` to ``(n, num_outputs)``.

        Its parameters are drawn from torch's global generator, which the caller seeds.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Logistic:
    """Multinomial logistic regression: one linear layer on the flattened record."""

    def __call__(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        """Return a module from ``(n, *input_shape)`` to logits ``(n, num_outputs)``."""
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), num_outputs))


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """Multilayer perceptron: Flatten, then Linear and ReLU per hidden layer, then Linear.

    Attributes:
        hidden: Units of each hidden layer, each >= 1; empty is `Logistic`.
        dropout: Share of hidden units dropped in training, in [0, 1).
    """

    hidden: Sequence[int] = (10,)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check_sizes("hidden", self.hidden)
        _check_dropout(self.dropout)

    def __call__(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        """Return a module from ``(n, *input_shape)`` to logits ``(n, num_outputs)``."""
        layers: list[nn.Module] = [nn.Flatten()]
        width = math.prod(input_shape)
        for units in self.hidden:
            layers += [nn.Linear(width, units), nn.ReLU(), *_dropout(self.dropout)]
            width = units
        return nn.Sequential(*layers, nn.Linear(width, num_outputs))


@dataclass(frozen=True, kw_only=True)
class SmallCnn:
    """Small convolutional network: blocks of 3x3 convolution, GroupNorm, ReLU, 2x2 max pooling.

    Each block halves height and width (rounding down), so images need at least
    ``2 ** len(channels)`` pixels a side: (1, 8, 8), (1, 28, 28) and (3, 32, 32) all fit the two
    blocks of the defaults. GroupNorm: Wu and He 2018, arXiv:1803.08494.

    Attributes:
        channels: Channels of each block, each >= 1; at least one block.
        hidden: Units of the one hidden layer after the blocks, >= 1.
        dropout: Share of those units dropped in training, in [0, 1).
    """

    channels: Sequence[int] = (16, 32)
    hidden: int = 64
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not self.channels:
            raise ConfigError(
                f"task.model.channels={self.channels} must name at least one block, such as "
                "[16, 32]: without any, use task/model=mlp."
            )
        _check_sizes("channels", self.channels)
        _check_sizes("hidden", [self.hidden])
        _check_dropout(self.dropout)

    def __call__(self, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        """Return a module from ``(n, *input_shape)`` to logits ``(n, num_outputs)``.

        Args:
            input_shape: ``(colours, height, width)``.
            num_outputs: Length of the output.

        Raises:
            ConfigError: The records are no images, or too small for this many blocks.
        """
        if len(input_shape) != 3:
            raise ConfigError(
                f"task.model={type(self).__name__} needs records of shape (colours, height, "
                f"width), but those of the task have shape {input_shape}: use task/model=mlp."
            )
        colours, height, width = input_shape
        shrink = 2 ** len(self.channels)
        if min(height, width) < shrink:
            raise ConfigError(
                f"task.model.channels={list(self.channels)} halves an image {len(self.channels)} "
                f"times, which one of {height}x{width} pixels does not bear: name fewer blocks."
            )
        layers: list[nn.Module] = []
        for channels in self.channels:
            layers += [
                nn.Conv2d(colours, channels, kernel_size=3, padding=1),
                nn.GroupNorm(math.gcd(channels, _MAX_GROUPS), channels),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
            colours = channels
        flat = colours * (height // shrink) * (width // shrink)
        layers += [nn.Flatten(), nn.Linear(flat, self.hidden), nn.ReLU(), *_dropout(self.dropout)]
        return nn.Sequential(*layers, nn.Linear(self.hidden, num_outputs))


def _dropout(share: float) -> list[nn.Module]:
    """Return a dropout layer, or none for share 0: a layer that does nothing still costs time."""
    return [nn.Dropout(share)] if share else []


def _check_sizes(key: str, sizes: Sequence[int]) -> None:
    if any(size < 1 for size in sizes):
        shown = sizes[0] if len(sizes) == 1 else list(sizes)
        raise ConfigError(
            f"task.model.{key}={shown} must be >= 1 throughout: a layer without a unit passes "
            "nothing on; leave the layer out instead."
        )


def _check_dropout(dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ConfigError(
            f"task.model.dropout={dropout} must lie in [0, 1): it is the share of hidden units "
            "dropped at random in training; 0 turns it off."
        )
