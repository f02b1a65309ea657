"""The mean of a cohort against NumPy in float64, and against Flower's own on the same replies."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from hypothesis import given
from hypothesis import strategies as st

from fl_app.aggregation import WeightedMean, Weighting, running_mean
from fl_app.robust_aggregation import ClippedNorm, Median
from fl_app.types import ClientUpdate, ConfigError, Params, client_order

FLOATS = st.floats(-1e3, 1e3, width=32)
COHORTS = st.lists(
    st.tuples(st.integers(1, 10**6), st.lists(FLOATS, min_size=3, max_size=3)),
    min_size=1,
    max_size=7,
)


def update(client: str, num_examples: int, values: list[float]) -> ClientUpdate:
    flat = torch.tensor(values, dtype=torch.float32)
    delta = {"w": flat[:2].reshape(1, 2), "b": flat[2]}
    return ClientUpdate(client=client, round=1, delta=delta, num_examples=num_examples)


def cohort(drawn: list[tuple[int, list[float]]]) -> list[ClientUpdate]:
    return [update(str(number), n, values) for number, (n, values) in enumerate(drawn)]


def test_two_clients_with_one_and_three_records_weigh_a_quarter_and_three_quarters() -> None:
    updates = [update("0", 1, [0, 4, 8]), update("1", 3, [4, 0, 0])]
    mean = WeightedMean()(updates)
    assert mean["w"].tolist() == [[3.0, 1.0]]
    assert mean["b"].item() == 2.0
    uniform = WeightedMean(weighting="uniform")(updates)
    assert uniform["w"].tolist() == [[2.0, 2.0]]
    assert uniform["b"].item() == 4.0


@given(COHORTS, st.sampled_from(list(Weighting)))
def test_the_mean_is_that_of_numpy_in_float64(drawn, weighting) -> None:
    mean = WeightedMean(weighting=weighting)(cohort(drawn))
    weights = [n if weighting == Weighting.EXAMPLES else 1 for n, _ in drawn]
    values = np.array([v for _, v in drawn], dtype=np.float64)
    expected = np.average(values, axis=0, weights=weights)
    got = [*mean["w"].flatten().tolist(), mean["b"].item()]
    # Float32 rounding of each addition is relative to the largest term, not to the sum.
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6 * (1 + np.abs(values).max()))


def in_parts(updates: list[ClientUpdate], rule: WeightedMean, cuts: list[int]) -> Params:
    running = running_mean(rule)
    assert running is not None
    borders = sorted({0, len(updates), *(cut % (len(updates) + 1) for cut in cuts)})
    for first, last in itertools.pairwise(borders):
        running.add(updates[first:last])
    return running.change()


@given(COHORTS, st.sampled_from(list(Weighting)), st.lists(st.integers(0, 7), max_size=4))
def test_a_mean_that_comes_in_parts_is_the_mean_of_all(drawn, weighting, cuts) -> None:
    rule = WeightedMean(weighting=weighting)
    mean = in_parts(cohort(drawn), rule, cuts)
    weights = [n if weighting == Weighting.EXAMPLES else 1 for n, _ in drawn]
    values = np.array([v for _, v in drawn], dtype=np.float64)
    expected = np.average(values, axis=0, weights=weights)
    got = [*mean["w"].flatten().tolist(), mean["b"].item()]
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6 * (1 + np.abs(values).max()))
    assert all(tensor.dtype == torch.float32 for tensor in mean.values())


@given(COHORTS, st.sampled_from(list(Weighting)))
def test_a_mean_that_comes_in_one_part_is_that_to_the_bit(drawn, weighting) -> None:
    rule = WeightedMean(weighting=weighting)
    one, whole = in_parts(cohort(drawn), rule, []), rule(cohort(drawn))
    assert all(torch.equal(one[name], whole[name]) for name in whole)


def test_the_sum_of_parts_does_not_overflow_a_short_type() -> None:
    delta = {"w": torch.full((3,), 60_000.0, dtype=torch.float16)}
    updates = [
        ClientUpdate(client=str(k), round=1, delta=delta, num_examples=10**7) for k in range(4)
    ]
    mean = in_parts(updates, WeightedMean(), [1, 2, 3])
    assert mean["w"].dtype == torch.float16
    assert mean["w"].tolist() == delta["w"].tolist()


def test_only_what_is_known_to_be_the_mean_takes_updates_in_parts() -> None:
    class Largest(WeightedMean):
        def __call__(self, updates: Sequence[ClientUpdate]) -> Params:
            return max(updates, key=lambda update: update.num_examples).delta

    assert running_mean(WeightedMean()) is not None
    assert running_mean(Largest()) is None
    assert running_mean(Median()) is None
    assert running_mean(ClippedNorm(rule=WeightedMean(), max_norm=1.0)) is None


@given(COHORTS, st.randoms(use_true_random=False))
def test_the_order_of_replies_is_forgotten_once_they_are_sorted(drawn, random) -> None:
    updates = cohort(drawn)
    shuffled = random.sample(updates, len(updates))
    in_order = sorted(shuffled, key=lambda update: client_order(update.client))
    first, second = WeightedMean()(updates), WeightedMean()(in_order)
    assert all(torch.equal(first[name], second[name]) for name in first)


@given(COHORTS)
def test_the_weighted_mean_is_flowers_on_the_same_replies(drawn) -> None:
    updates = cohort(drawn)
    replies = [
        RecordDict(
            {
                "arrays": ArrayRecord({k: Array(v.numpy()) for k, v in update.delta.items()}),
                "metrics": MetricRecord({"num-examples": update.num_examples}),
            }
        )
        for update in updates
    ]
    theirs, ours = aggregate_arrayrecords(replies, "num-examples"), WeightedMean()(updates)
    for name, tensor in ours.items():
        expected = torch.from_numpy(np.asarray(theirs[name].numpy(), dtype=np.float32))
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-3)


@given(st.lists(FLOATS, min_size=3, max_size=3), st.integers(1, 10**9))
def test_the_mean_of_one_client_is_its_own_update_to_the_bit(values, num_examples) -> None:
    only = update("0", num_examples, values)
    mean = WeightedMean()([only])
    assert all(torch.equal(mean[name], only.delta[name]) for name in mean)


@given(COHORTS)
def test_clients_with_equal_counts_give_the_uniform_mean_to_the_bit(drawn) -> None:
    updates = cohort([(7, values) for _, values in drawn])
    weighted, uniform = WeightedMean()(updates), WeightedMean(weighting="uniform")(updates)
    assert all(torch.equal(weighted[name], uniform[name]) for name in weighted)


def test_the_updates_are_left_as_they_were() -> None:
    updates = [update("0", 1, [1, 2, 3]), update("1", 2, [4, 5, 6])]
    WeightedMean()(updates)
    assert updates[0].delta["w"].tolist() == [[1.0, 2.0]]
    assert updates[1].delta["b"].item() == 6.0


@pytest.mark.parametrize("weighting", ["median", "", "EXAMPLES"])
def test_an_unknown_weighting_is_refused_by_key_and_value(weighting) -> None:
    with pytest.raises(ConfigError, match=f"aggregation.weighting={weighting} .*examples"):
        WeightedMean(weighting=weighting)
