"""Partitions: who owns what is a function of (task, seed), and no record has two owners."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import flwr_datasets.partitioner
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fl_app.tasks.base import PooledExamples
from fl_app.tasks.classification import losses, metrics
from fl_app.tasks.federated import PartitionedData
from fl_app.tasks.flower_partition import (
    Dirichlet,
    Exponential,
    Linear,
    Pathological,
    Shard,
    Square,
)
from fl_app.tasks.partition import Generated, Iid, Natural, Partition, Strided, shuffled
from fl_app.types import ConfigError, Examples, FederatedData

ALL = [
    Iid(num_clients=4),
    Strided(num_clients=4),
    Dirichlet(num_clients=4, alpha=1.0),
    Pathological(num_clients=4),
    Shard(num_clients=4),
    Linear(num_clients=4),
    Square(num_clients=4),
    Exponential(num_clients=4),
]
DROPS = (Pathological, Shard)  # by design some records may be in no client


@dataclass(frozen=True, kw_only=True)
class Numbered:
    """A pooled task whose inputs are the numbers of its records."""

    n: int = 200
    classes: int = 4
    owners: Sequence[str] | None = None
    regression: bool = False
    name: str = "numbered"

    def build_model(self) -> nn.Module:
        return nn.Linear(1, self.classes)

    losses = staticmethod(losses)
    metrics = staticmethod(metrics)

    def load(self) -> PooledExamples:
        targets = torch.arange(self.n) * 7919 % self.classes
        train = Examples(
            inputs=torch.arange(self.n, dtype=torch.float32)[:, None],
            targets=targets.float() if self.regression else targets,
        )
        return PooledExamples(train=train, owners=self.owners)


def kind(partition: Partition) -> str:
    return type(partition).__name__


def records(examples: Examples | None) -> list[int]:
    return [] if examples is None else examples.inputs[:, 0].int().tolist()


def owned(data: FederatedData, client: str) -> list[int]:
    mine = data.examples_of(client)
    return sorted(records(mine.train) + records(mine.validation) + records(mine.test))


def everything(data: FederatedData) -> dict[str, tuple[list[int], ...]]:
    """Return client -> numbers of its train, validation and test records."""
    result = {}
    for client in data.clients:
        mine = data.examples_of(client)
        result[client] = (records(mine.train), records(mine.validation), records(mine.test))
    return result


# Who owns what ------------------------------------------------------------------------------


@pytest.mark.parametrize("partition", ALL, ids=kind)
@given(n=st.integers(120, 300), num_clients=st.integers(1, 5), seed=st.integers(0, 2**62))
@settings(max_examples=8, deadline=None)
def test_no_record_has_two_owners_and_none_is_lost_unless_by_design(
    partition, n, num_clients, seed
):
    data = replace(partition, num_clients=num_clients)(Numbered(n=n), seed)
    assert list(data.clients) == [str(number) for number in range(num_clients)]
    dealt = sorted(record for client in data.clients for record in owned(data, client))
    assert len(set(dealt)) == len(dealt)
    if isinstance(partition, DROPS):
        assert set(dealt) <= set(range(n))
    else:
        assert dealt == list(range(n))


@given(
    n=st.integers(1, 40),
    test=st.sampled_from([0.0, 0.1, 0.29, 0.5]),
    validation=st.sampled_from([0.0, 0.2, 0.49]),
    seed=st.integers(0, 2**62),
)
@settings(max_examples=60, deadline=None)
def test_the_parts_of_a_client_are_disjoint_and_of_the_sizes_asked_for(n, test, validation, seed):
    partition = Strided(num_clients=1, test_fraction=test, validation_fraction=validation)
    data = partition(Numbered(n=n), seed)
    mine = data.examples_of("0")
    assert owned(data, "0") == list(range(n))
    for part, share in ((mine.test, test), (mine.validation, validation)):
        size = int(n * round(share * 100) // 100)
        assert len(records(part)) == size
        assert (part is None) == (size == 0)
    assert len(mine.train) >= 1
    assert records(mine.train) == sorted(records(mine.train))


@pytest.mark.parametrize("partition", ALL, ids=kind)
def test_the_same_seed_deals_the_same_and_another_seed_another(partition):
    partition = replace(partition, validation_fraction=0.2)
    first = everything(partition(Numbered(), 1))
    assert first == everything(partition(Numbered(), 1))
    other = partition(Numbered(), 2)
    assert first != everything(other)
    if not isinstance(partition, Strided):
        assert [set(sum(mine, [])) for mine in first.values()] != [
            set(owned(other, client)) for client in other.clients
        ]


@pytest.mark.parametrize("partition", ALL[2:5], ids=kind)
def test_the_seed_also_decides_who_owns_which_classes(partition):
    task = Numbered(classes=8)
    assert len({tuple((shares(partition, task, seed) > 0.2).flatten()) for seed in range(5)}) > 1


@pytest.mark.slow
def test_all_processes_deal_the_same_whatever_their_hash_seed():
    code = "import test_partition as t; print(t.fingerprint())"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={
            "PYTHONHASHSEED": "1",
            "PYTHONPATH": ":".join([str(Path(__file__).parent), *sys.path]),
        },
    )
    assert ran.stdout.strip() == fingerprint()


def fingerprint() -> str:
    """Return a digest of what every partition deals."""
    dealt = [everything(partition(Numbered(), 5)) for partition in ALL]
    return hashlib.sha256(repr(dealt).encode()).hexdigest()


@pytest.mark.parametrize(("share", "size"), [(0.29, 29), (0.57, 57), (0.999, 99)])
def test_a_share_is_that_many_records_in_a_hundred_despite_binary_fractions(share, size):
    data = Strided(num_clients=1, test_fraction=share)(Numbered(n=100), 0)
    assert len(data.examples_of("0").test) == size


def test_clients_of_one_size_split_their_records_differently():
    data = Strided(num_clients=2)(Numbered(), 0)
    first, second = (records(data.examples_of(client).test) for client in data.clients)
    assert [record // 2 for record in first] != [record // 2 for record in second]


def test_the_split_of_a_client_does_not_depend_on_who_was_asked_before():
    forward, backward = (Iid(num_clients=4)(Numbered(), 3) for _ in range(2))
    for client in reversed(backward.clients):
        backward.examples_of(client)
    assert everything(forward) == everything(backward)


def test_asking_again_gives_the_same_tensors():
    data = Iid(num_clients=4)(Numbered(), 3)
    assert data.examples_of("2") is data.examples_of("2")


# Each scheme --------------------------------------------------------------------------------


def test_strided_is_the_slice_of_the_flower_tutorials():
    data = Strided(num_clients=10, test_fraction=0.0)(Numbered(), 0)
    for client in range(10):
        assert records(data.examples_of(str(client)).train) == list(range(200))[client::10]


@pytest.mark.parametrize("num_clients", [1, 3, 7, 200])
def test_iid_is_the_partitioner_of_flwr_datasets_on_shuffled_records(num_clients):
    pooled = Numbered().load()
    reference = flwr_datasets.partitioner.IidPartitioner(num_partitions=num_clients)
    reference.dataset = datasets.Dataset.from_dict({"record": shuffled(pooled, 9).tolist()})
    dealt = Iid(num_clients=num_clients).deal(pooled, 9)
    for number in range(num_clients):
        assert dealt[str(number)].tolist() == reference.load_partition(number)["record"][:]


@pytest.mark.parametrize(
    ("partition", "power"), [(ALL[5], 1), (ALL[6], 2)], ids=["linear", "square"]
)
def test_sizes_go_with_a_power_of_the_number_of_the_client(partition, power):
    sizes = [len(part) for part in partition.deal(Numbered(n=3000).load(), 0).values()]
    assert sizes == [3000 * k**power // sum(j**power for j in range(1, 5)) for k in range(1, 5)]


def test_exponential_sizes_grow_by_a_factor_of_e():
    sizes = [len(part) for part in ALL[7].deal(Numbered(n=100_000).load(), 0).values()]
    for smaller, larger in zip(sizes, sizes[1:], strict=False):
        assert larger / smaller == pytest.approx(2.71828, abs=1e-3)


def shares(partition: Partition, task: Numbered, seed: int = 0) -> Tensor:
    """Return the share of each class that each client owns, shape ``(clients, classes)``."""
    targets = task.load().train.targets
    counts = [
        torch.bincount(targets[numbers], minlength=task.classes)
        for numbers in partition.deal(task.load(), seed).values()
    ]
    return torch.stack(counts) / torch.bincount(targets)


def test_a_large_alpha_gives_clients_that_are_alike_and_a_small_one_sole_owners():
    task = Numbered(n=4000, classes=10)
    alike = shares(Dirichlet(num_clients=4, alpha=1e6), task)
    assert (alike - 0.25).abs().max() < 0.01
    skewed = shares(Dirichlet(num_clients=4, alpha=0.02), task)
    assert (skewed.max(dim=0).values > 0.95).float().mean() >= 0.7


def test_dirichlet_shares_have_the_spread_of_their_distribution():
    # A share of Dir(a, ..., a) over k clients has variance (1/k)(1 - 1/k) / (k a + 1).
    task = Numbered(n=40_000, classes=200)
    spread = shares(Dirichlet(num_clients=5, alpha=0.5), task).var()
    assert float(spread) == pytest.approx(0.2 * 0.8 / 3.5, rel=0.15)


def test_dirichlet_keeps_the_smallest_size_it_is_asked_for():
    def smallest(seed: int, min_partition_size: int) -> int:
        partition = Dirichlet(num_clients=4, alpha=0.5, min_partition_size=min_partition_size)
        return min(len(part) for part in partition.deal(Numbered().load(), seed).values())

    assert min(smallest(seed, 1) for seed in range(8)) < 25
    assert min(smallest(seed, 25) for seed in range(8)) >= 25


def test_a_balanced_draw_that_divides_by_zero_is_refused_rather_than_given_to_the_last_client():
    partition = Dirichlet(num_clients=2, alpha=0.001, self_balancing=True)
    with pytest.raises(ConfigError, match="Raise partition.alpha"):
        partition(Numbered(classes=10), 6)


def test_pathological_clients_have_exactly_as_many_classes_as_asked_for():
    task = Numbered(n=600, classes=6)
    for num_classes in (1, 2, 6):
        owns = shares(Pathological(num_clients=6, num_classes_per_client=num_classes), task) > 0
        assert owns.sum(dim=1).tolist() == [num_classes] * 6
        assert owns.any(dim=0).all()  # as many clients as classes: no class is without owner


def test_shards_drop_only_what_does_not_fill_one():
    sizes = [len(part) for part in Shard(num_clients=4).deal(Numbered(n=203).load(), 0).values()]
    assert sizes == [2 * (203 // 8)] * 4
    owns = shares(Shard(num_clients=4), Numbered(n=200, classes=4)) > 0
    assert owns.sum(dim=1).max() <= 4


def test_natural_clients_go_by_their_own_names_in_canonical_order():
    owners = ["b", "north", "a", "b", "a", "b"]
    data = Natural(test_fraction=0.0)(Numbered(n=6, owners=owners), 0)
    assert list(data.clients) == ["a", "b", "north"]
    assert everything(data) == {
        "a": ([2, 4], [], []),
        "b": ([0, 3, 5], [], []),
        "north": ([1], [], []),
    }


# Errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: Iid(num_clients=0), "partition.num_clients=0 must be >= 1"),
        (lambda: Generated(num_clients=-3), "partition.num_clients=-3 must be >= 1"),
        (lambda: Generated(num_clients=3, cache_clients=-1), "partition.cache_clients=-1"),
        (lambda: Dirichlet(num_clients=3, alpha=0.0), "partition.alpha=0.0 must be > 0"),
        (lambda: Dirichlet(num_clients=3, alpha=float("nan")), "partition.alpha=nan"),
        (lambda: Dirichlet(num_clients=3, min_partition_size=0), "partition.min_partition_size=0"),
        (lambda: Pathological(num_clients=3, num_classes_per_client=0), "num_classes_per_client=0"),
        (lambda: Shard(num_clients=3, num_shards_per_client=0), "num_shards_per_client=0"),
        (lambda: Iid(num_clients=3, test_fraction=1.0), "partition.test_fraction=1.0 must lie in"),
        (lambda: Natural(validation_fraction=-0.1), "partition.validation_fraction=-0.1"),
        (
            lambda: Iid(num_clients=3, test_fraction=0.5, validation_fraction=0.5),
            "must add up to less than 1",
        ),
    ],
)
def test_a_value_out_of_range_is_named_with_its_key(build, named):
    with pytest.raises(ConfigError) as raised:
        build()
    assert named in str(raised.value)


@pytest.mark.parametrize("partition", ALL, ids=kind)
def test_more_clients_than_examples_are_refused(partition):
    with pytest.raises(ConfigError) as raised:
        replace(partition, num_clients=201)(Numbered(), 0)
    assert "partition.num_clients=201" in str(raised.value)
    assert "200 training examples of task=numbered" in str(raised.value)
    assert "ower partition.num_clients" in str(raised.value)


@pytest.mark.parametrize(
    ("partition", "named"),
    [
        (Dirichlet(num_clients=150, alpha=0.01), "Raise partition.alpha"),
        (Dirichlet(num_clients=5, alpha=1e-4, self_balancing=True), "partition.alpha=0.0001"),
        (Pathological(num_clients=2, num_classes_per_client=5), "num_classes_per_client=5"),
        (Pathological(num_clients=199, num_classes_per_client=3), "Lower partition.num_clients"),
        (Shard(num_clients=20, num_shards_per_client=11), "cannot be cut into 220 shards"),
        (Linear(num_clients=100), "partition.num_clients=100 does not fit"),
        (Exponential(num_clients=20), "partition.num_clients=20 does not fit"),
        (Natural(), "it does not say who owns them"),
    ],
    ids=lambda value: kind(value) if not isinstance(value, str) else "",
)
def test_a_scheme_that_the_records_do_not_suffice_for_names_its_keys(partition, named):
    with pytest.raises(ConfigError) as raised:
        partition(Numbered(), 0)
    assert named in str(raised.value)


def test_natural_needs_one_owner_for_each_record():
    with pytest.raises(ConfigError, match="it names 3 owners"):
        Natural()(Numbered(n=4, owners=["a", "b", "c"]), 0)


def test_a_client_without_a_record_is_named():
    class Stingy(Iid):
        def deal(self, pooled, seed):
            return {"0": torch.arange(3), "1": torch.arange(0)}

    with pytest.raises(ConfigError, match=r"1 clients get no record \(1\)"):
        Stingy(num_clients=2)(Numbered(), 0)


@pytest.mark.parametrize("partition", [ALL[2], ALL[3], ALL[4]], ids=kind)
def test_dealing_by_class_needs_classes(partition):
    with pytest.raises(ConfigError, match="deals by class"):
        partition(Numbered(regression=True), 0)


def test_dealing_prints_nothing_and_leaves_global_randomness_alone(capfd):
    import numpy as np

    torch.manual_seed(0)
    np.random.seed(0)
    for partition in ALL:
        data = partition(Numbered(), 0)
        assert isinstance(data, PartitionedData)
    assert capfd.readouterr() == ("", "")
    after = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    assert after == (torch.rand(1), np.random.rand())
