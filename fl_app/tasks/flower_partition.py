"""Partitions that flwr-datasets computes: by class (label skew) and by size (quantity skew).

Its partitioners see one column of record numbers and one of labels, never a tensor. The only
home of flwr-datasets, whose import takes 1.5 to 3 s and so waits until a partition is dealt.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fl_app.tasks.base import PooledExamples
from fl_app.tasks.partition import NumberedPartition, check_at_least_one, shuffled
from fl_app.types import ConfigError, Role, stream_seed


@dataclass(frozen=True, kw_only=True)
class FlowerPartition(NumberedPartition):
    """Base: records in random order, dealt out by a class of ``flwr_datasets.partitioner``."""

    scheme: ClassVar[str]
    """Name of that class."""

    def options(self, seed: int) -> dict[str, Any]:
        """Return its arguments besides ``num_partitions``; labels are in the column ``label``."""
        return {}

    def _deal_in_order(self, pooled: PooledExamples, seed: int) -> Sequence[Tensor]:
        import datasets
        import flwr_datasets.partitioner

        options = self.options(seed)
        # These schemes cut each class, or all records, in the order they find them in.
        order = shuffled(pooled, seed)
        columns = {"record": order.numpy()}
        if "partition_by" in options:
            columns["label"] = self._labels(pooled)[order].numpy()
        scheme = getattr(flwr_datasets.partitioner, self.scheme)
        partitioner = scheme(num_partitions=self.num_clients, **options)
        partitioner.dataset = datasets.Dataset.from_dict(columns)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a failed draw is tried again: the last one raises
            warnings.simplefilter("error", RuntimeWarning)  # numpy: 0 / 0 or an overflow
            return [
                torch.tensor(partitioner.load_partition(number)["record"][:], dtype=torch.int64)
                for number in range(self.num_clients)
            ]

    def _labels(self, pooled: PooledExamples) -> Tensor:
        targets = pooled.train.targets
        if targets.is_floating_point():
            raise ConfigError(
                f"partition={self.name} deals by class, but the targets of the task are of type "
                f"{targets.dtype}: use partition=iid, or one that goes by size."
            )
        return targets


@dataclass(frozen=True, kw_only=True)
class Dirichlet(FlowerPartition):
    """Each class is shared out in proportions drawn from a Dirichlet distribution.

    Scheme: Yurochkin et al. 2019, arXiv:1905.12022, Section 4: for every class one draw of the
    *clients'* shares of it. It differs from Hsu et al. 2019, arXiv:1909.06335, Section 3, who
    draw for every client the shares of the *classes* in it; ``alpha`` plays the same part in
    both. Here sizes differ between clients as well as classes.

    Attributes:
        alpha: Concentration, > 0: towards 0 each class has one owner, towards infinity every
            client has the mix of the whole.
        min_partition_size: Fewest records a client may get, >= 1. All is drawn again, ten times
            at most, until every client has as many.
        self_balancing: A client that has more than the mean number of records gets none of the
            classes still to be shared out.
    """

    scheme = "DirichletPartitioner"
    way_out = (
        "Raise partition.alpha, or lower partition.num_clients or partition.min_partition_size."
    )

    alpha: float = 0.5
    min_partition_size: int = 1
    self_balancing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha < float("inf"):
            raise ConfigError(
                f"partition.alpha={self.alpha} must be > 0 and finite: use 0.1 for clients with "
                "few classes each, 100 for clients that are nearly alike."
            )
        check_at_least_one(self, "min_partition_size")

    def options(self, seed: int) -> dict[str, Any]:
        """Return the arguments of ``DirichletPartitioner``."""
        return {
            "partition_by": "label",
            "alpha": float(self.alpha),
            "min_partition_size": self.min_partition_size,
            "self_balancing": self.self_balancing,
            "seed": stream_seed(seed, Role.PARTITION),
        }


@dataclass(frozen=True, kw_only=True)
class Pathological(FlowerPartition):
    """Each client gets a fixed number of classes, each class in equal parts by its owners.

    Scheme: Li et al. 2021, arXiv:2102.02079, Section IV ("quantity-based label imbalance"):
    client i owns class i modulo the number of classes, the rest of its classes are drawn. With
    fewer clients than classes a class may have no owner; its records are then in no client.

    Attributes:
        num_classes_per_client: Classes each client has records of, >= 1.
    """

    scheme = "PathologicalPartitioner"
    way_out = "Lower partition.num_clients or partition.num_classes_per_client."

    num_classes_per_client: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "num_classes_per_client")

    def options(self, seed: int) -> dict[str, Any]:
        """Return the arguments of ``PathologicalPartitioner``."""
        return {
            "partition_by": "label",
            "num_classes_per_partition": self.num_classes_per_client,
            "class_assignment_mode": "first-deterministic",
            "seed": stream_seed(seed, Role.PARTITION),
        }


@dataclass(frozen=True, kw_only=True)
class Shard(FlowerPartition):
    """Records sorted by class and cut into equal shards, of which each client draws a few.

    Scheme: McMahan et al. 2017, arXiv:1602.05629, Section 3 (200 shards of MNIST, two a client).
    Shards have ``n // (num_clients * num_shards_per_client)`` records; what the division leaves
    over is in no client.

    Attributes:
        num_shards_per_client: Shards each client gets, >= 1.
    """

    scheme = "ShardPartitioner"
    way_out = "Lower partition.num_clients or partition.num_shards_per_client."

    num_shards_per_client: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "num_shards_per_client")

    def _deal_in_order(self, pooled: PooledExamples, seed: int) -> Sequence[Tensor]:
        if (shards := self.num_clients * self.num_shards_per_client) > len(pooled.train):
            raise ValueError(f"they cannot be cut into {shards} shards")
        return super()._deal_in_order(pooled, seed)

    def options(self, seed: int) -> dict[str, Any]:
        """Return the arguments of ``ShardPartitioner``."""
        return {
            "partition_by": "label",
            "num_shards_per_partition": self.num_shards_per_client,
            "seed": stream_seed(seed, Role.PARTITION),
        }


@dataclass(frozen=True, kw_only=True)
class Linear(FlowerPartition):
    """Sizes in proportion to 1, 2, 3, ...; the last client also gets what rounding leaves."""

    scheme = "LinearPartitioner"


@dataclass(frozen=True, kw_only=True)
class Square(FlowerPartition):
    """Sizes in proportion to 1, 4, 9, ...; the last client also gets what rounding leaves."""

    scheme = "SquarePartitioner"


@dataclass(frozen=True, kw_only=True)
class Exponential(FlowerPartition):
    """Sizes in proportion to e, e^2, e^3, ...; the last client also gets what rounding leaves."""

    scheme = "ExponentialPartitioner"
