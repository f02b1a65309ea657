"""Cohorts: distinct clients of the population, a function of (seed, round), fair, and cheap."""

from __future__ import annotations

import math
import time
import tracemalloc
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from fl_app.selection import RoundRobin, Uniform
from fl_app.tasks.federated import ClientRange
from fl_app.types import ConfigError

BOTH = pytest.mark.parametrize("kind", [Uniform, RoundRobin])
ROUNDS = st.integers(1, 10_000)
SEEDS = st.integers(0, 2**40)


@BOTH
@given(st.data())
def test_a_cohort_is_distinct_clients_of_the_population_of_the_size_wanted(kind, data) -> None:
    population = data.draw(st.integers(1, 200))
    count = data.draw(st.integers(1, population))
    clients = ClientRange(population)
    selector = kind(count=count)
    cohort = selector.select(clients, round=data.draw(ROUNDS), seed=data.draw(SEEDS))
    assert len(cohort) == len(set(cohort)) == selector.wanted(population) == count
    assert all(client in clients for client in cohort)


@given(st.integers(1, 1000), st.integers(1, 100))
def test_a_fraction_is_rounded_to_whole_clients_but_never_to_none(population, percent) -> None:
    wanted = Uniform(fraction=percent / 100).wanted(population)
    assert 1 <= wanted <= population
    assert wanted == 1 or abs(wanted - Fraction(percent, 100) * population) <= Fraction(1, 2)


def test_a_count_overrides_the_fraction() -> None:
    assert Uniform(fraction=0.5, count=3).wanted(100) == 3
    assert Uniform(fraction=0.1).wanted(100) == 10


@BOTH
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 300), ROUNDS)
def test_over_selection_asks_its_share_more_but_aggregates_no_more(
    kind, population, count, percent, round
) -> None:
    count = min(count, population)
    selector = kind(count=count, over_selection=percent / 100)
    cohort = selector.select(ClientRange(population), round=round, seed=0)
    asked = math.ceil(count * (1 + Fraction(percent, 100)))
    assert len(cohort) == len(set(cohort)) == min(asked, population)
    assert selector.wanted(population) == count


@given(SEEDS, ROUNDS)
def test_the_same_seed_and_round_give_the_same_cohort(seed, round) -> None:
    clients = ClientRange(1000)
    first = Uniform(count=20).select(clients, round=round, seed=seed)
    assert first == Uniform(count=20).select(list(clients), round=round, seed=seed)


def test_other_rounds_and_other_seeds_give_other_cohorts() -> None:
    selector, clients = Uniform(count=5), ClientRange(1000)
    cohorts = {
        tuple(sorted(selector.select(clients, round=round, seed=seed)))
        for round in range(1, 31)
        for seed in range(10)
    }
    # Two of 300 cohorts of 5 in 1000 coincide with a probability below 1e-8.
    assert len(cohorts) == 300


def test_every_client_is_drawn_equally_often() -> None:
    population, size, rounds = 40, 8, 3000
    selector, clients = Uniform(count=size), ClientRange(population)
    counts = [0] * population
    for round in range(1, rounds + 1):
        for client in selector.select(clients, round=round, seed=11):
            counts[int(client)] += 1
    # Within a round draws exclude one another, so the variance is (1 - size/population) of
    # Poisson's: the plain test is conservative, the scaled one exact in the limit.
    mean = size * rounds / population
    scaled = sum((c - mean) ** 2 for c in counts) / mean / (1 - size / population)
    scaled *= (population - 1) / population
    assert chisquare(counts).pvalue > 0.01
    assert 16 < scaled < 73  # chi-square with 39 degrees: 0.1 % and 99.9 % quantiles are 16.3, 72.1


def test_the_first_in_order_of_preference_is_uniform_too() -> None:
    selector, clients = Uniform(count=4), ClientRange(10)
    counts = [0] * 10
    for round in range(1, 2001):
        counts[int(selector.select(clients, round=round, seed=5)[0])] += 1
    assert chisquare(counts).pvalue > 0.01


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 3))
def test_round_robin_asks_everyone_once_in_population_over_count_rounds(count, turns, lap) -> None:
    population = count * turns
    selector, clients = RoundRobin(count=count), ClientRange(population)
    first = lap * turns + 1
    asked = [
        client
        for round in range(first, first + turns)
        for client in selector.select(clients, round=round, seed=0)
    ]
    assert asked == list(clients)


def test_round_robin_wraps_when_the_count_does_not_divide_the_population() -> None:
    selector, clients = RoundRobin(count=2), ClientRange(5)
    cohorts = [selector.select(clients, round=round, seed=0) for round in range(1, 6)]
    assert cohorts == [["0", "1"], ["2", "3"], ["4", "0"], ["1", "2"], ["3", "4"]]


def test_over_selected_clients_of_round_robin_are_the_first_of_the_next_round() -> None:
    selector, clients = RoundRobin(count=2, over_selection=0.5), ClientRange(6)
    assert selector.select(clients, round=1, seed=0) == ["0", "1", "2"]
    assert selector.select(clients, round=2, seed=0)[0] == "2"


@BOTH
def test_ten_million_clients_cost_what_a_thousand_do(kind) -> None:
    selector, clients = kind(count=10), ClientRange(10**7)
    tracemalloc.start()
    began = time.perf_counter()
    cohorts = [selector.select(clients, round=round, seed=1) for round in range(1, 51)]
    seconds, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(len(set(cohort)) == 10 for cohort in cohorts)
    assert peak < 1_000_000
    assert seconds < 1


@BOTH
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fraction", 0.0),
        ("fraction", 1.01),
        ("fraction", -0.5),
        ("fraction", math.nan),
        ("count", 0),
        ("count", -3),
        ("over_selection", -0.1),
        ("over_selection", math.inf),
        ("over_selection", math.nan),
        ("min_replies", 0),
        ("min_clients", 0),
        ("round_timeout_s", 0.0),
        ("round_timeout_s", -1.0),
        ("round_timeout_s", math.nan),
    ],
)
def test_a_bad_value_is_refused_by_key_and_value(kind, key, value) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**{key: value})
    assert f"selection.{key}={value} " in str(caught.value)


def test_a_cohort_larger_than_the_population_is_refused() -> None:
    with pytest.raises(ConfigError, match="selection.count=11 exceeds the population of 10"):
        Uniform(count=11).select(ClientRange(10), round=1, seed=0)


def test_more_replies_than_the_cohort_has_clients_are_refused() -> None:
    with pytest.raises(ConfigError, match="selection.min_replies=3 exceeds the cohort of 2"):
        Uniform(count=2, min_replies=3).wanted(10)
