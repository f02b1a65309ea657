"""What a task is: data, model, loss and metrics, in two small protocols.

A task of your own is any class with these members, named by ``_target_`` in a YAML file; it need
not inherit from anything here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from fl_app.types import ClientExamples, ClientId, Examples


@dataclass(frozen=True, kw_only=True, slots=True)
class PooledExamples:
    """All records of a task in one place, before a partition deals them out.

    Attributes:
        train: Records to deal out to the clients.
        held_out: Records kept back for the server, or None.
        owners: Natural owner of each training record (hospital, user, device), or None.
    """

    train: Examples
    held_out: Examples | None = None
    owners: Sequence[str] | None = None


@runtime_checkable
class Task(Protocol):
    """Model, loss and metrics of one learning problem."""

    @property
    def name(self) -> str:
        """Short name, as in ``task=digits``."""
        ...

    def build_model(self) -> nn.Module:
        """Return a new model, initialised from torch's global generator (seeded by the caller)."""
        ...

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of every record, shape ``(n,)``, differentiable in ``outputs``."""
        ...

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, float]:
        """Return metrics other than the loss, by name; leave out those undefined here."""
        ...


@runtime_checkable
class PooledTask(Task, Protocol):
    """A task whose records lie in one place, to be dealt out by any partition."""

    def load(self) -> PooledExamples:
        """Return all records; the same ones, in the same order, at every call."""
        ...


@runtime_checkable
class GeneratedTask(Task, Protocol):
    """A task that makes each client's records when they are first asked for."""

    def generate(self, client: ClientId, seed: int) -> ClientExamples:
        """Return the records of ``client``; a function of ``(client, seed)`` alone."""
        ...

    def held_out(self, seed: int) -> Examples | None:
        """Return records of no client, for the server, or None."""
        ...
