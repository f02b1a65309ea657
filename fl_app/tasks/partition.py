"""Who owns which records: partitions that deal the records of a task out to simulated clients.

A partition is a function of ``(task, seed)``: any process that is given both deals the same
records to the same clients. Here are the bases and the schemes of one line; those that
flwr-datasets computes are in `fl_app.tasks.flower_partition`. A partition of your own is any
callable with the signature of `Partition`, named by ``_target_`` in a YAML file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from fl_app.tasks.base import GeneratedTask, PooledExamples, PooledTask, Task
from fl_app.tasks.federated import ClientRange, GeneratedData, PartitionedData
from fl_app.types import ClientId, ConfigError, FederatedData, Role, stream


class Partition(Protocol):
    """Makes a task's records those of clients."""

    def __call__(self, task: Task, seed: int) -> FederatedData:
        """Return who the clients are and what each owns; a function of the arguments alone.

        Raises:
            ConfigError: The task does not fit this partition, or its records do not suffice.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class PooledPartition(ABC):
    """Base of the partitions of a `PooledTask`: deals records out, then splits each client's own.

    Attributes:
        test_fraction: Share of each client's records it keeps for its own test, in [0, 1).
        validation_fraction: Share it keeps for its early stopping, in [0, 1). Both shares are
            rounded down to whole records, drawn at random; their sum must be < 1.
    """

    way_out: ClassVar[str]
    """What to change when the records do not suffice; ends the message."""

    test_fraction: float = 0.2
    validation_fraction: float = 0.0

    def __post_init__(self) -> None:
        for key in ("test_fraction", "validation_fraction"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(
                    f"partition.{key}={getattr(self, key)} must lie in [0, 1): it is a share of "
                    "each client's records; 0 keeps none back."
                )
        if self.test_fraction + self.validation_fraction >= 1:
            raise ConfigError(
                f"partition.test_fraction={self.test_fraction} and partition.validation_fraction="
                f"{self.validation_fraction} must add up to less than 1: nothing is left to "
                "train on; lower one of them."
            )

    @property
    def name(self) -> str:
        """Name of the YAML file that holds this partition."""
        return type(self).__name__.lower()

    def __call__(self, task: Task, seed: int) -> PartitionedData:
        """Return who the clients are and what each owns; a function of the arguments alone.

        Raises:
            ConfigError: The task does not fit this partition, or its records do not suffice.
        """
        if not isinstance(task, PooledTask):
            raise ConfigError(
                f"partition={self.name} deals out records that lie in one place, which those "
                f"of task={task.name} do not (it has no load()): use partition=generated."
            )
        pooled = task.load()
        try:
            owned = self.deal(pooled, seed)
        except ConfigError:
            raise
        except (ValueError, ArithmeticError, RuntimeWarning) as error:
            reason = str(error).split(". ")[0].rstrip(".")
            raise self._too_few(task, pooled, reason) from error
        if empty := [client for client, records in owned.items() if not len(records)]:
            named = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
            raise self._too_few(task, pooled, f"{len(empty)} clients get no record ({named})")
        return PartitionedData(
            pooled=pooled,
            owned=owned,
            seed=seed,
            test_fraction=self.test_fraction,
            validation_fraction=self.validation_fraction,
        )

    @abstractmethod
    def deal(self, pooled: PooledExamples, seed: int) -> Mapping[ClientId, Tensor]:
        """Return the numbers of the training records of each client: int64, shape ``(k,)``.

        Raises:
            ValueError: The records do not suffice. The caller adds keys, values and the way out.
        """

    def _too_few(self, task: Task, pooled: PooledExamples, reason: str) -> ConfigError:
        keys = [
            f"partition.{key}={value}"
            for key, value in asdict(self).items()
            if not key.endswith("_fraction")
        ]
        return ConfigError(
            f"{', '.join(keys or [f'partition={self.name}'])} does not fit the "
            f"{len(pooled.train)} training examples of task={task.name}: {reason}. {self.way_out}"
        )


@dataclass(frozen=True, kw_only=True)
class NumberedPartition(PooledPartition):
    """Base of the partitions among clients "0", "1", ...

    Attributes:
        num_clients: Number of clients, >= 1 and at most the number of training examples.
    """

    way_out = "Lower partition.num_clients."

    num_clients: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "num_clients")

    def deal(self, pooled: PooledExamples, seed: int) -> Mapping[ClientId, Tensor]:
        """Return the numbers of the training records of each client: int64, shape ``(k,)``."""
        if self.num_clients > len(pooled.train):
            raise ValueError("there are more clients than examples")
        dealt = self._deal_in_order(pooled, seed)
        return {str(number): records for number, records in enumerate(dealt)}

    @abstractmethod
    def _deal_in_order(self, pooled: PooledExamples, seed: int) -> Sequence[Tensor]:
        """Return the numbers of the records of client 0, of client 1, and so on."""


@dataclass(frozen=True, kw_only=True)
class Iid(NumberedPartition):
    """Records shuffled, then cut into parts whose sizes differ by at most one.

    The same as flwr-datasets' ``IidPartitioner`` on shuffled records, which is one line and not
    worth the second or two that importing flwr-datasets takes.
    """

    def _deal_in_order(self, pooled: PooledExamples, seed: int) -> Sequence[Tensor]:
        return shuffled(pooled, seed).tensor_split(self.num_clients)


@dataclass(frozen=True, kw_only=True)
class Strided(NumberedPartition):
    """Client i of n owns records i, i + n, i + 2n, ... in the data set's own order.

    The ``dataset[partition_id::num_partitions]`` of Flower's tutorials. The seed plays no part
    in who owns what, only in each client's own split.
    """

    def _deal_in_order(self, pooled: PooledExamples, seed: int) -> Sequence[Tensor]:
        everything = torch.arange(len(pooled.train))
        return [everything[first :: self.num_clients] for first in range(self.num_clients)]


@dataclass(frozen=True, kw_only=True)
class Natural(PooledPartition):
    """Each natural owner (hospital, user, device) is a client, known by its own name."""

    way_out = "Give PooledExamples.owners one name per training example, or use partition=iid."

    def deal(self, pooled: PooledExamples, seed: int) -> Mapping[ClientId, Tensor]:
        """Return the numbers of the training records of each owner: int64, shape ``(k,)``."""
        if pooled.owners is None:
            raise ValueError("it does not say who owns them")
        if len(pooled.owners) != len(pooled.train):
            raise ValueError(f"it names {len(pooled.owners)} owners")
        records: defaultdict[ClientId, list[int]] = defaultdict(list)
        for record, owner in enumerate(pooled.owners):
            records[str(owner)].append(record)
        return {owner: torch.tensor(numbers) for owner, numbers in records.items()}


@dataclass(frozen=True, kw_only=True)
class OneOwner(PooledPartition):
    """All records are one client's own: those of a deployed site, which puts this in place.

    They are split in the same way whatever a run's seed is: whoever could choose other splits of
    them, again and again, could tell single records by the difference.

    Attributes:
        client: Its name.
        version: Of the records; another one where these may be others.
    """

    way_out = "Give the site at least one record."

    client: str
    version: str = ""

    def __call__(self, task: Task, seed: int) -> PartitionedData:
        """Return who the client is and what it owns; the seed does not matter."""
        return super().__call__(task, 0)

    def deal(self, pooled: PooledExamples, seed: int) -> Mapping[ClientId, Tensor]:
        """Return the numbers of all training records: int64, shape ``(k,)``."""
        return {self.client: torch.arange(len(pooled.train))}


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Clients "0", "1", ... whose records the task makes when they are first asked for.

    Costs nothing before that, so the population may be of any size. Each client's own split is
    the task's business.

    Attributes:
        num_clients: Number of clients, >= 1.
        cache_clients: Clients whose records are kept in memory, those used last; >= 0.
    """

    num_clients: int
    cache_clients: int = 1000

    def __post_init__(self) -> None:
        check_at_least_one(self, "num_clients")
        if self.cache_clients < 0:
            raise ConfigError(
                f"partition.cache_clients={self.cache_clients} must be >= 0: 0 makes a client's "
                "records anew whenever they are asked for."
            )

    def __call__(self, task: Task, seed: int) -> GeneratedData:
        """Return the clients, and the way to make what each owns.

        Raises:
            ConfigError: The task does not make its records per client.
        """
        if not isinstance(task, GeneratedTask):
            raise ConfigError(
                f"partition=generated needs a task that makes each client's records, which "
                f"task={task.name} does not (it has no generate()): use partition=iid or another."
            )
        return GeneratedData(
            task=task,
            seed=seed,
            clients=ClientRange(self.num_clients),
            cache_clients=self.cache_clients,
        )


def shuffled(pooled: PooledExamples, seed: int) -> Tensor:
    """Return the numbers of all training records in random order, int64."""
    return torch.randperm(len(pooled.train), generator=stream(seed, Role.PARTITION))


def check_at_least_one(partition: Partition, key: str) -> None:
    """Raise `ConfigError` unless the number at ``key`` of a partition is 1 or more."""
    if getattr(partition, key) < 1:
        raise ConfigError(
            f"partition.{key}={getattr(partition, key)} must be >= 1: a whole number from 1 up."
        )
