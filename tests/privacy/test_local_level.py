"""Local privacy: the noise of one update, and what exchanging one for another costs."""

from __future__ import annotations

import math

import pytest
import torch
from dp_accounting import GaussianDpEvent
from dp_accounting.rdp import RdpAccountant as GooglesRdp
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fl_app.config import compose_config
from fl_app.privacy.accounting import RdpAccountant
from fl_app.privacy.local_level import LocalLevel
from fl_app.privacy.noisy_sum import clipped_sum
from fl_app.privacy.randomness import reproducible_randomness_for_tests, secret_randomness
from fl_app.types import ConfigError, PrivacyUnit

ENTRIES = st.lists(st.floats(width=32), min_size=3, max_size=3)


@given(ENTRIES, ENTRIES, st.floats(1e-3, 1e3))
def test_exchanging_an_update_moves_the_clipped_one_by_twice_the_bound(one, other, bound) -> None:
    like = {"w": torch.zeros(3)}
    first, second = (
        clipped_sum([{"w": torch.tensor(values)}], like=like, max_norm=bound)["w"]
        for values in (one, other)
    )
    assert (first - second).norm() <= 2 * bound * (1 + 1e-9)


def test_opposite_updates_are_that_far_apart() -> None:
    one, other = ({"w": torch.tensor([sign * 9.0])} for sign in (1, -1))
    sums = [clipped_sum([delta], like=one, max_norm=1.5)["w"] for delta in (one, other)]
    assert (sums[0] - sums[1]).item() == 3.0


def test_so_a_round_costs_a_gaussian_of_half_the_noise_multiplier() -> None:
    event = LocalLevel(noise_multiplier=6.0).event(100, batch_size=8, epochs=1)
    assert event is not None
    assert (event.noise_multiplier, event.sample_rate, event.count) == (3.0, 1.0, 1)
    google = GooglesRdp()
    google.compose(GaussianDpEvent(3.0), 5)
    assert RdpAccountant().epsilon([event.times(5)], delta=1e-5) == pytest.approx(
        google.get_epsilon(1e-5), rel=1e-3
    )


@pytest.mark.parametrize("entry", [0.0, 1e6, math.nan])
def test_every_entry_gets_noise_of_z_c_whatever_the_update_was(entry) -> None:
    """Kolmogorov-Smirnov; chance fails it once in 10^6."""
    z, c, size = 2.0, 0.5, 100_000
    delta = {"w": torch.full((size - 1,), entry), "b": torch.full((1,), entry)}
    sent, told = LocalLevel(noise_multiplier=z, max_norm=c).protect(
        delta, max_norm=1e9, randomness=secret_randomness()
    )
    centre = c / math.sqrt(size) if entry > 0 else 0.0
    released = torch.cat([sent["w"], sent["b"]])
    assert released.dtype == torch.float32
    assert stats.kstest(released.numpy(), "norm", args=(centre, z * c)).pvalue > 1e-6
    assert stats.kstest(released.numpy(), "norm", args=(centre, 1.05 * z * c)).pvalue < 1e-6
    assert told == {}


def test_no_word_of_the_server_changes_what_is_sent() -> None:
    delta = {"w": torch.ones(10)}
    sent = [
        LocalLevel().protect(
            delta, max_norm=bound, randomness=reproducible_randomness_for_tests(1, "a")
        )[0]["w"]
        for bound in (None, 1e-9, 1e9)
    ]
    assert torch.equal(sent[0], sent[1])
    assert torch.equal(sent[0], sent[2])


def test_a_target_is_met_after_the_planned_rounds() -> None:
    level = LocalLevel(noise_multiplier=None, target_epsilon=4.0, planned_rounds=10)
    event = level.event(1, batch_size=8, epochs=1)
    assert event is not None
    assert 3.97 < RdpAccountant().epsilon([event.times(10)], delta=1e-5) <= 4.0
    assert level.limit == 4.0


def test_a_target_without_planned_rounds_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs privacy.planned_rounds"):
        LocalLevel(noise_multiplier=None, target_epsilon=4.0).event(1, batch_size=8, epochs=1)


def test_the_limit_is_the_lower_of_budget_and_target() -> None:
    assert LocalLevel().limit is None
    assert LocalLevel(epsilon_budget=2.0).limit == 2.0
    both = LocalLevel(noise_multiplier=None, target_epsilon=4.0, epsilon_budget=3.0)
    assert both.limit == 3.0
    assert both.unit is PrivacyUnit.CLIENT


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"noise_multiplier": 0.0}, "privacy.noise_multiplier=0.0"),
        ({"noise_multiplier": 1e-200}, "privacy.noise_multiplier=1e-200"),
        ({"target_epsilon": 1.0}, "give one of them"),
        ({"max_norm": 0.0}, "privacy.max_norm=0.0"),
        ({"max_norm": math.nan}, "privacy.max_norm=nan"),
        ({"delta": 0.0}, "privacy.delta=0.0"),
        ({"epsilon_budget": 0.0}, "privacy.epsilon_budget=0.0"),
        ({"planned_rounds": 0}, "privacy.planned_rounds=0"),
        ({"accountant": "x"}, "accountant=x"),
        ({"randomness": "x"}, "privacy.randomness=x"),
    ],
)
def test_a_value_out_of_range_is_refused_by_key_and_value(fields, words) -> None:
    with pytest.raises(ConfigError) as caught:
        LocalLevel(**fields)
    assert words in str(caught.value)


def test_the_yaml_names_every_field_with_its_default() -> None:
    assert instantiate(compose_config(["privacy=local"])["privacy"]) == LocalLevel()
