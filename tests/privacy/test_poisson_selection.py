"""Poisson cohorts: each client as likely, independent of all others and of any seed, and cheap."""

from __future__ import annotations

import math
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from helpers import TINY, play, rounds_of
from scipy import stats

from fl_app.components import build
from fl_app.config import compose_config, to_json
from fl_app.privacy.randomness import KeyedRandomness, secret_randomness
from fl_app.selection import (
    Poisson,
    RoundRobin,
    Uniform,
    expected_cohort,
    most_participations,
    secret_sample_rate,
)
from fl_app.tasks.federated import ClientRange
from fl_app.types import ConfigError


def test_sizes_are_binomial_and_each_client_as_likely() -> None:
    """Chance fails either test once in 10^6."""
    n, q, rounds = 40, 0.1, 20_000
    selector, clients = Poisson(fraction=q), ClientRange(n)
    cohorts = [selector.select(clients, round=1, seed=1) for _ in range(rounds)]
    sizes = np.bincount([len(cohort) for cohort in cohorts], minlength=n + 1)
    expected = rounds * stats.binom(n, q).pmf(np.arange(n + 1))
    often = expected >= 5
    pooled = [*sizes[often], sizes[~often].sum()], [*expected[often], expected[~often].sum()]
    assert stats.chisquare(*pooled).pvalue > 1e-6
    each = Counter(client for cohort in cohorts for client in cohort)
    assert stats.chisquare([each[client] for client in clients]).pvalue > 1e-7
    assert sizes[0] > 0
    assert all(len(set(cohort)) == len(cohort) for cohort in cohorts)


def test_two_clients_are_drawn_independently() -> None:
    """As gaps between heads: neighbours and clients far apart alike."""
    q, rounds = 0.3, 20_000
    heads = np.zeros((rounds, 10), dtype=bool)
    for row in heads:
        row[secret_randomness().positions(10, heads=q)] = True
    for other in (1, 9):
        both = int((heads[:, 0] & heads[:, other]).sum())
        assert stats.binomtest(both, rounds, q * q).pvalue > 1e-6


@pytest.mark.parametrize("heads", [1e-9, 0.001, 0.3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_positions_are_ascending_and_within_the_coins(heads, count) -> None:
    for key in range(20):
        positions = KeyedRandomness(key).positions(count, heads=heads)
        assert positions.dtype == np.int64
        assert (np.diff(positions) > 0).all()
        assert ((positions >= 0) & (positions < count)).all()
        if heads == 1.0:
            assert positions.tolist() == list(range(count))


def test_the_last_coin_is_tossed_too() -> None:
    found = sum(9 in KeyedRandomness(key).positions(10, heads=0.5) for key in range(4000))
    assert stats.binomtest(found, 4000, 0.5).pvalue > 1e-6


def test_a_million_clients_cost_what_their_cohort_costs() -> None:
    selector, clients = Poisson(fraction=1e-4), ClientRange(10**6)
    selector.select(clients, round=1, seed=1)
    tracemalloc.start()
    began = time.perf_counter()
    sizes = [len(selector.select(clients, round=1, seed=1)) for _ in range(50)]
    seconds, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert stats.binomtest(sum(sizes), 50 * 10**6, 1e-4).pvalue > 1e-6
    assert peak < 1_000_000
    assert seconds < 1


def test_cohorts_do_not_follow_from_the_seed() -> None:
    selector, clients = Poisson(fraction=0.5), ClientRange(64)
    drawn = {tuple(selector.select(clients, round=1, seed=1)) for _ in range(20)}
    assert len(drawn) == 20


def test_tests_may_ask_by_name_for_cohorts_that_repeat() -> None:
    selector = Poisson(fraction=0.5, randomness="reproducible_for_tests")
    clients = ClientRange(64)
    first = selector.select(clients, round=1, seed=1)
    assert first == selector.select(clients, round=1, seed=1)
    assert first != selector.select(clients, round=2, seed=1)
    assert first != selector.select(clients, round=1, seed=2)


def test_a_selector_says_whether_its_coins_are_secret() -> None:
    assert secret_sample_rate(Poisson(fraction=0.25)) == 0.25
    assert expected_cohort(Poisson(fraction=0.25), 10) == 2.5
    for public in (Uniform(fraction=0.25), RoundRobin(count=3)):
        assert secret_sample_rate(public) is None
    assert expected_cohort(Uniform(fraction=0.25), 12) == 3


@pytest.mark.parametrize("rounds", [1, 5, 13])
def test_the_most_asked_client_is_counted_exactly(rounds) -> None:
    clients = ClientRange(7)
    selector = Uniform(count=3)
    asked = [c for r in range(1, rounds + 1) for c in selector.select(clients, round=r, seed=3)]
    assert most_participations(selector, clients, rounds=rounds, seed=3) == max(
        Counter(asked).values()
    )
    in_turn = most_participations(RoundRobin(count=3), clients, rounds=rounds, seed=3)
    assert in_turn == math.ceil(3 * rounds / 7)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fraction", 0.0),
        ("fraction", 1.1),
        ("fraction", math.nan),
        ("min_replies", 0),
        ("min_clients", 0),
        ("round_timeout_s", 0.0),
        ("randomness", "seed"),
    ],
)
def test_a_bad_value_is_refused_by_key_and_value(key, value) -> None:
    with pytest.raises(ConfigError) as caught:
        Poisson(**{key: value})
    assert f"selection.{key}={value} " in str(caught.value)


def test_an_empty_first_cohort_is_no_mistake_of_the_configuration() -> None:
    config = compose_config([*TINY, "selection=poisson", "selection.fraction=1e-6"])
    assert build(to_json(config)).selector.wanted(6) == 1


def test_a_run_without_privacy_plays_poisson_cohorts_whole(tmp_path) -> None:
    """Of a cohort larger than the mean nobody is left out; of an empty one the model stays."""
    run_dir = play(tmp_path / "run", "selection=poisson", "selection.fraction=0.3", "rounds=12")
    for entry in rounds_of(run_dir):
        assert entry["num_updates"] == len(entry["cohort"])
        assert entry["applied"] is bool(entry["cohort"])
