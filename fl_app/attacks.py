"""Hostile clients, simulated: fault injection for experiments, like ``client.failure_fraction``.

An attack is a frozen dataclass named by ``_target_`` under ``client.attack``. Who is hostile is
drawn from the run's seed. Hostile clients know what is theirs (their records, the model they are
sent, what they were told to do) and one another's, and nothing of the honest ones.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TypeAlias

import torch

from fl_app.types import (
    ClientExamples,
    ClientId,
    ConfigError,
    Examples,
    Params,
    Role,
    stream_seed,
)

Accomplices: TypeAlias = Callable[[int], Sequence[Params]]


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """Base of attacks.

    Attributes:
        fraction: Share of all clients that are hostile, in [0, 1]; rounded to whole clients.
    """

    fraction: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise ConfigError(
                f"client.attack.fraction={self.fraction} must lie in [0, 1]: it is the share of "
                "all clients that are hostile."
            )

    def hostile(self, clients: Sequence[ClientId], seed: int) -> frozenset[ClientId]:
        """Return the hostile clients; the same ones in every round and process."""
        count = round(self.fraction * len(clients))
        generator = random.Random(stream_seed(seed, Role.HOSTILE))
        return frozenset(clients[k] for k in generator.sample(range(len(clients)), count))

    def poison(self, examples: ClientExamples, num_classes: int) -> ClientExamples:
        """Return what a hostile client trains on.

        Args:
            examples: What it owns.
            num_classes: Outputs of the model, for a classifier.
        """
        return examples

    @abstractmethod
    def forge(self, own: Params, accomplices: Accomplices, num: Counts) -> Params:
        """Return the delta that a hostile client sends.

        Args:
            own: What its training gave.
            accomplices: Returns what the training of that many hostile clients, the first in
                client order, would give in this round.
            num: How many clients there are.
        """


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Clients of the population, and the hostile ones among them."""

    clients: int
    hostile: int


@dataclass(frozen=True, kw_only=True)
class NoAttack(Attack):
    """Nobody is hostile."""

    fraction: float = 0.0

    def forge(self, own: Params, accomplices: Accomplices, num: Counts) -> Params:
        """Return the honest delta."""
        return own


@dataclass(frozen=True, kw_only=True)
class Scaled(Attack):
    """The honest delta times a factor: -1 flips its sign, 100 drowns the others, 0 idles.

    Attributes:
        factor: Any number.
    """

    factor: float

    def forge(self, own: Params, accomplices: Accomplices, num: Counts) -> Params:
        """Return ``factor * delta``."""
        return {name: tensor * self.factor for name, tensor in own.items()}


@dataclass(frozen=True, kw_only=True)
class NotANumber(Attack):
    """NaN alone, which makes every mean it enters NaN."""

    def forge(self, own: Params, accomplices: Accomplices, num: Counts) -> Params:
        """Return NaN in the model's shapes."""
        return {name: torch.full_like(tensor, math.nan) for name, tensor in own.items()}


@dataclass(frozen=True, kw_only=True)
class LabelFlip(Attack):
    """Honest training on false labels: class c becomes the last class minus c; floats, minus them.

    The false labels are in training and validation records alone: the client measures models as
    the others do.
    """

    def poison(self, examples: ClientExamples, num_classes: int) -> ClientExamples:
        """Return the records with false labels."""
        return replace(
            examples,
            train=_flipped(examples.train, num_classes),
            validation=examples.validation and _flipped(examples.validation, num_classes),
        )

    def forge(self, own: Params, accomplices: Accomplices, num: Counts) -> Params:
        """Return the delta of the poisoned training."""
        return own


@dataclass(frozen=True, kw_only=True)
class LittleIsEnough(Attack):
    """Inside the spread of good updates (Baruch et al. 2019, arXiv:1902.06156, Algorithm 3).

    All hostile clients send the mean less z standard deviations, coordinate by coordinate. As in
    the paper they do not see the honest updates: mean and deviation are those of the updates that
    the hostile clients would have sent, had they been honest (without what their optimizers
    remember). One alone has no spread to hide in and sends its honest update.

    Attributes:
        accomplices: Hostile clients, at most, whose updates are looked at, >= 2. Each of them is
            trained once more a round, in every process.
        z: Strength; None takes the largest that the paper holds safe, `safest_z`.
    """

    z: float | None = None
    accomplices: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accomplices < 2:
            raise ConfigError(
                f"client.attack.accomplices={self.accomplices} must be >= 2: one update has no "
                "spread."
            )

    def forge(self, own: Params, accomplices: Accomplices, num: Counts) -> Params:
        """Return the forged delta, the same for all accomplices."""
        z = safest_z(num.clients, num.hostile) if self.z is None else self.z
        return within_the_spread(accomplices(self.accomplices), z)


def safest_z(clients: int, hostile: int) -> float:
    """Return the largest safe z of "a little is enough" (arXiv:1902.06156, Algorithm 3).

    With n clients, m of them hostile, ``s = floor(n / 2 + 1) - m`` honest ones are to be further
    from the mean than the forged update: ``Phi(z) = (n - m - s) / (n - m)``. Never below 0; a
    majority needs no supporters and gets 4, beyond any honest update.
    """
    supporters = clients // 2 + 1 - hostile
    if supporters <= 0 or clients == hostile:
        return 4.0
    return max(0.0, NormalDist().inv_cdf((clients - hostile - supporters) / (clients - hostile)))


def within_the_spread(updates: Sequence[Params], z: float) -> Params:
    """Return the updates' mean less z of their (unbiased) standard deviations, per coordinate."""
    forged = {}
    for name in updates[0]:
        stacked = torch.stack([update[name] for update in updates])
        spread = stacked.std(dim=0) if len(updates) > 1 else torch.zeros_like(stacked[0])
        forged[name] = stacked.mean(dim=0) - z * spread
    return forged


def _flipped(examples: Examples, num_classes: int) -> Examples:
    if examples.targets.is_floating_point():
        return replace(examples, targets=-examples.targets)
    return replace(examples, targets=num_classes - 1 - examples.targets)
