"""The mechanism of client-level privacy: limits, noise, adaptive bound, and what it is charged."""

from __future__ import annotations

import math

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant as GooglesRdp
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fl_app.aggregation import WeightedMean
from fl_app.config import compose_config
from fl_app.privacy.accounting import GaussianEvent, RdpAccountant, accountant_named
from fl_app.privacy.client_level import CLIPPED, ClientLevel, ClientLevelPlan
from fl_app.privacy.randomness import (
    PrivacyRandomness,
    reproducible_randomness_for_tests,
    secret_randomness,
)
from fl_app.types import ClientUpdate, ConfigError, Params, PrivacyUnit

HUGE = 1e30  # clips nothing


def plan_of(
    *,
    expected_cohort: float = 4,
    noise: float = 1.0,
    sample_rate: float | None = None,
    **fields: object,
) -> ClientLevelPlan:
    return ClientLevelPlan(
        privacy=ClientLevel(**fields),  # type: ignore[arg-type]
        noise_multiplier=noise,
        sample_rate=sample_rate,
        expected_cohort=expected_cohort,
    )


def secret() -> PrivacyRandomness:
    return secret_randomness()


# The noisy mean -----------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(-64, 64), min_size=3, max_size=3), min_size=8, max_size=8))
def test_without_noise_and_bound_it_is_the_uniform_mean_bit_for_bit(values) -> None:
    """Of numbers that have few bits, which no order of summation rounds."""
    deltas = [{"w": torch.tensor(row, dtype=torch.float32) / 8} for row in values]
    updates = [
        ClientUpdate(client=str(n), round=1, delta=delta, num_examples=1 + n)
        for n, delta in enumerate(deltas)
    ]
    mean = plan_of(expected_cohort=8, noise=0.0).noisy_mean(
        deltas, like=deltas[0], max_norm=HUGE, randomness=secret()
    )
    assert torch.equal(mean["w"], WeightedMean(weighting="uniform")(updates)["w"])
    assert mean["w"].dtype == torch.float32


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=9))
def test_it_is_the_sum_over_the_expected_cohort_however_many_replied(values) -> None:
    deltas = [{"w": torch.tensor([value])} for value in values]
    mean = plan_of(expected_cohort=5, noise=0.0).noisy_mean(
        deltas, like={"w": torch.zeros(1)}, max_norm=HUGE, randomness=secret()
    )
    assert mean["w"].item() == np.float32(sum(values) / 5)


def test_noise_or_a_bound_makes_it_another() -> None:
    deltas = [{"w": torch.ones(4)}] * 4
    for noise, max_norm in ((1e-3, HUGE / 1e30), (0.0, 0.5)):
        mean = plan_of(noise=noise).noisy_mean(
            deltas, like=deltas[0], max_norm=max_norm, randomness=secret()
        )
        assert not torch.equal(mean["w"], torch.ones(4))


@pytest.mark.parametrize("replies", [0, 3, 40])
def test_its_noise_is_gaussian_of_z_c_over_the_expected_cohort(replies) -> None:
    """Kolmogorov-Smirnov; chance fails it once in 10^6. With no reply it is noise alone."""
    z, c, m, size = 1.3, 0.5, 8.0, 100_000
    model = {"w": torch.zeros(size - 1000), "b": torch.zeros(10, 100)}
    delta = {name: torch.full_like(t, 1e-3 / math.sqrt(size)) for name, t in model.items()}
    mean = plan_of(expected_cohort=m, noise=z).noisy_mean(
        [delta] * replies, like=model, max_norm=c, randomness=secret()
    )
    released = torch.cat([t.flatten() for t in mean.values()]).double().numpy()
    centre = replies * 1e-3 / math.sqrt(size) / m
    std = z * c / m
    assert stats.kstest(released, "norm", args=(centre, std)).pvalue > 1e-6
    assert stats.kstest(released, "norm", args=(centre, 1.05 * std)).pvalue < 1e-6


def test_the_same_seed_gives_other_noise_unless_tests_ask_by_name() -> None:
    def draw(randomness: PrivacyRandomness) -> Params:
        torch.manual_seed(1)
        return plan_of().noisy_mean(
            [], like={"w": torch.zeros(5)}, max_norm=1.0, randomness=randomness
        )

    assert not torch.equal(draw(secret())["w"], draw(secret())["w"])
    first, second = (draw(reproducible_randomness_for_tests(1, "server/1")) for _ in range(2))
    assert torch.equal(first["w"], second["w"])


# The client's part --------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), st.floats(1e-3, 1e3))
def test_a_client_clips_to_the_bound_it_is_told_and_says_so_only_if_asked(values, bound) -> None:
    delta = {"w": torch.tensor(values)}
    fixed, told = ClientLevel().protect(delta, max_norm=bound, randomness=secret())
    assert fixed["w"].dtype == torch.float32
    assert fixed["w"].double().norm() <= bound * (1 + 1e-6)
    assert told == {}
    adaptive, told = ClientLevel(target_quantile=0.5).protect(
        delta, max_norm=bound, randomness=secret()
    )
    assert torch.equal(adaptive["w"], fixed["w"])
    assert told == {CLIPPED: float(delta["w"].double().norm() > bound)}


def test_without_word_of_the_server_the_configured_bound_holds() -> None:
    delta = {"w": torch.tensor([3.0, 4.0])}
    clipped, _ = ClientLevel(max_norm=2.5).protect(delta, max_norm=None, randomness=secret())
    assert clipped["w"].tolist() == [1.5, 2.0]


def test_a_broken_update_becomes_zero_and_counts_as_clipped() -> None:
    delta = {"w": torch.tensor([math.nan, 1.0])}
    sent, told = ClientLevel(target_quantile=0.5).protect(delta, max_norm=1.0, randomness=secret())
    assert sent["w"].tolist() == [0.0, 0.0]
    assert told == {CLIPPED: 1.0}


def test_a_client_pays_nothing_itself() -> None:
    assert ClientLevel().unit is PrivacyUnit.CLIENT
    assert ClientLevel().event(100, batch_size=8, epochs=1) is None


# The adaptive bound -------------------------------------------------------------------------------


def test_the_bound_moves_by_the_formula() -> None:
    """By hand: 3 of 4 within, gamma 1/2, eta 0.2: C exp(-0.2 (3/4 - 1/2)) = C exp(-0.05)."""
    plan = plan_of(noise=0.0, target_quantile=0.5, bound_learning_rate=0.2)
    moved = plan.next_max_norm(2.0, [0.0, 1.0, 0.0, 0.0], randomness=secret())
    assert moved == pytest.approx(2.0 * math.exp(-0.05), rel=1e-12)


def test_who_brings_no_bit_moves_the_bound_nowhere() -> None:
    """By hand: of 8 expected, one within: ((1/2) / 8 + 1/2) - 1/2 = 1/16."""
    plan = plan_of(noise=0.0, target_quantile=0.5, expected_cohort=8, bound_learning_rate=1.0)
    moved = plan.next_max_norm(1.0, [0.0, None, None], randomness=secret())
    assert moved == pytest.approx(math.exp(-1 / 16), rel=1e-12)


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=5),
    st.floats(allow_nan=True, allow_infinity=True),
)
def test_a_client_moves_the_sum_of_bits_by_a_half_whatever_it_says(others, hostile) -> None:
    plan = plan_of(noise=0.0, target_quantile=0.5, expected_cohort=10, bound_learning_rate=1.0)
    without, with_it = (
        math.log(plan.next_max_norm(1.0, bits, randomness=secret()))
        for bits in (others, [*others, hostile])
    )
    assert abs(with_it - without) * 10 == pytest.approx(0.5, rel=1e-9)


def test_with_the_quantile_off_the_bound_stays_to_the_bit() -> None:
    assert plan_of().next_max_norm(0.1, [1.0, 0.0, None], randomness=secret()) == 0.1
    assert plan_of(noise=1.0).update_noise_multiplier == 1.0


@pytest.mark.parametrize("gamma", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("start", [0.01, 100.0])
def test_without_noise_the_bound_converges_to_the_quantile_of_the_norms(gamma, start) -> None:
    norms = np.random.default_rng(1).lognormal(size=401)
    plan = plan_of(
        noise=0.0, target_quantile=gamma, expected_cohort=len(norms), bound_learning_rate=0.2
    )
    bound = start
    for _ in range(400):
        bound = plan.next_max_norm(bound, (norms > bound).astype(float), randomness=secret())
    assert (norms <= bound).mean() == pytest.approx(gamma, abs=0.01)


def test_the_noise_on_the_bits_has_the_stated_deviation() -> None:
    plan = plan_of(noise=1.0, target_quantile=0.5, bit_noise=3.0, expected_cohort=50)
    shares = [
        -math.log(plan.next_max_norm(1.0, [0.0] * 50, randomness=secret())) / 0.2 + 0.5
        for _ in range(5000)
    ]
    assert stats.kstest(shares, "norm", args=(1.0, 3.0 / 50)).pvalue > 1e-6
    assert stats.kstest(shares, "norm", args=(1.0, 3.6 / 50)).pvalue < 1e-6


@given(st.floats(0.3, 5.0), st.floats(1.05, 20.0))
def test_update_and_bit_together_cost_what_the_noise_multiplier_alone_costs(z, factor) -> None:
    """A client moves the updates' sum by C and the bits' by 1/2, in one release of both."""
    plan = plan_of(noise=z, target_quantile=0.5, bit_noise=z / 2 * factor)
    both = [
        GaussianEvent(noise_multiplier=plan.update_noise_multiplier),
        GaussianEvent(noise_multiplier=plan.bit_noise / 0.5),
    ]
    accountant = RdpAccountant()
    assert plan.event is not None
    assert accountant.epsilon(both, delta=1e-5) == pytest.approx(
        accountant.epsilon([plan.event], delta=1e-5), rel=1e-9
    )
    assert plan.update_noise_multiplier > z


def test_by_default_the_bits_get_a_twentieth_of_the_cohort_as_noise() -> None:
    plan = plan_of(noise=1.0, target_quantile=0.5, expected_cohort=100)
    assert plan.bit_noise == 5.0
    assert plan.update_noise_multiplier == pytest.approx(1 / math.sqrt(1 - 0.01))


@pytest.mark.parametrize(("bit_noise", "cohort"), [(0.5, 100), (0.1, 100), (None, 10)])
def test_bits_that_alone_cost_more_than_the_round_are_refused(bit_noise, cohort) -> None:
    privacy = ClientLevel(noise_multiplier=1.0, target_quantile=0.5, bit_noise=bit_noise)
    with pytest.raises(ConfigError, match=r"privacy.bit_noise=0\.\d+ must exceed half"):
        privacy.plan(sample_rate=None, participations=1, expected_cohort=cohort)


# What it costs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sample_rate", "rounds"), [(None, 4), (0.05, 40)])
@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_epsilon_is_dp_accountings(sample_rate, rounds, accountant) -> None:
    plan = ClientLevel(noise_multiplier=1.5, accountant=accountant).plan(
        sample_rate=sample_rate, participations=rounds, expected_cohort=10
    )
    event = dp_accounting.GaussianDpEvent(1.5)
    if sample_rate:
        event = dp_accounting.PoissonSampledDpEvent(sample_rate, event)
    google = GooglesRdp() if accountant == "rdp" else PLDAccountant()
    google.compose(event, rounds)
    assert plan.planned_epsilon == pytest.approx(google.get_epsilon(1e-5), rel=2e-3)


@pytest.mark.parametrize(("sample_rate", "rounds"), [(0.1, 100), (None, 7)])
def test_a_target_is_met_and_hardly_less_noise_would_meet_it(sample_rate, rounds) -> None:
    plan = ClientLevel(noise_multiplier=None, target_epsilon=3.0).plan(
        sample_rate=sample_rate, participations=rounds, expected_cohort=10
    )
    assert 2.97 < plan.planned_epsilon <= 3.0
    assert plan.event is not None
    assert accountant_named("rdp").epsilon([plan.event.times(rounds)], delta=1e-5) <= 3.0


def test_planned_rounds_come_before_those_of_the_run() -> None:
    privacy = ClientLevel(planned_rounds=50)
    short, long = (
        privacy.plan(sample_rate=0.1, participations=n, expected_cohort=1) for n in (1, 100)
    )
    assert short == long


def test_noise_that_cannot_be_accounted_is_refused_before_the_run() -> None:
    with pytest.raises(ConfigError, match="privacy.noise_multiplier=1e-200 over 3 rounds"):
        ClientLevel(noise_multiplier=1e-200).plan(
            sample_rate=0.1, participations=3, expected_cohort=1
        )


def test_without_noise_there_is_no_price() -> None:
    assert plan_of(noise=0.0).event is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"noise_multiplier": 0.0}, "privacy.noise_multiplier=0.0 must be > 0"),
        ({"noise_multiplier": -1.0}, "privacy.noise_multiplier=-1.0 must be > 0"),
        ({"noise_multiplier": math.nan}, "privacy.noise_multiplier=nan"),
        ({"noise_multiplier": None}, "give one of them"),
        ({"target_epsilon": 3.0}, "privacy.noise_multiplier=1.0 and privacy.target_epsilon=3.0"),
        ({"noise_multiplier": None, "target_epsilon": 0.0}, "privacy.target_epsilon=0.0"),
        ({"planned_rounds": 0}, "privacy.planned_rounds=0"),
        ({"delta": 0.0}, "privacy.delta=0.0"),
        ({"delta": 1.0}, "privacy.delta=1.0"),
        ({"max_norm": 0.0}, "privacy.max_norm=0.0 must be finite and >= 1e-12"),
        ({"max_norm": -1.0}, "privacy.max_norm=-1.0"),
        ({"max_norm": math.inf}, "privacy.max_norm=inf"),
        ({"target_quantile": 0.0}, "privacy.target_quantile=0.0"),
        ({"target_quantile": 1.0}, "privacy.target_quantile=1.0"),
        ({"bound_learning_rate": 0.0}, "privacy.bound_learning_rate=0.0"),
        ({"bit_noise": 0.0}, "privacy.bit_noise=0.0"),
        ({"accountant": "moments"}, "accountant=moments"),
        ({"randomness": "seeded"}, "privacy.randomness=seeded is not known"),
    ],
)
def test_a_value_out_of_range_is_refused_by_key_and_value(fields, words) -> None:
    with pytest.raises(ConfigError) as caught:
        ClientLevel(**fields)
    assert words in str(caught.value)


def test_the_yaml_names_every_field_with_its_default() -> None:
    assert instantiate(compose_config(["privacy=client"])["privacy"]) == ClientLevel()
