"""Epsilon against three other accountants, in its limits, and over many rounds."""

from __future__ import annotations

import math

import absl.logging
import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant as GooglesRdp
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import RDPAccountant as OpacusRdp
from scipy.integrate import quad
from scipy.stats import norm

from fl_app.privacy.accounting import (
    ORDERS,
    GaussianEvent,
    PldAccountant,
    PrvAccountant,
    RdpAccountant,
    UnaccountableError,
    accountant_named,
    rdp_of,
    rounds_allowed,
    solve_noise,
)
from fl_app.types import ConfigError

DELTA = 1e-5
RDP, PLD, PRV = RdpAccountant(), PldAccountant(), PrvAccountant()
FLOWERS = GaussianEvent(noise_multiplier=1.0, sample_rate=32 / 4000, count=4000 // 32)
"""A round of Flower's Opacus example: 10 clients with 4,000 records each, batches of 32."""

EVENTS = st.builds(
    GaussianEvent,
    noise_multiplier=st.floats(0.6, 8.0),
    sample_rate=st.sampled_from([0.001, 0.01, 0.1, 0.5, 1.0]),
    count=st.integers(1, 200),
)
FEW = settings(max_examples=15)


@pytest.mark.parametrize(
    ("rounds", "rdp", "prv"),
    [(1, 1.12, 0.62), (3, 1.32, 0.94), (50, 4.02, 3.70), (100, 5.88, 5.43)],
)
def test_the_figures_of_flowers_example_over_its_rounds(rounds, rdp, prv) -> None:
    """Flower's example reports the first line for ever."""
    events = [FLOWERS.times(rounds)]
    assert RDP.epsilon(events, delta=DELTA) == pytest.approx(rdp, abs=0.006)
    assert PRV.epsilon(events, delta=DELTA) == pytest.approx(prv, abs=0.006)


@pytest.mark.parametrize("accountant", [RDP, PLD, PRV], ids=lambda a: a.name)
def test_ten_rounds_cost_what_one_long_run_costs(accountant) -> None:
    ten = [FLOWERS] * 10
    assert accountant.epsilon(ten, delta=DELTA) == pytest.approx(
        accountant.epsilon([FLOWERS.times(10)], delta=DELTA), rel=1e-9
    )


@pytest.mark.parametrize("sample_rate", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("noise_multiplier", [0.7, 1.0, 3.0])
def test_the_divergence_is_its_integral(noise_multiplier, sample_rate) -> None:
    """Mironov et al. 2019, arXiv:1908.10530, Section 3.3, by quadrature."""
    divergences = rdp_of(noise_multiplier, sample_rate)
    for order in (1.1, 1.5, 3.3, 10.9, 12):

        def integrand(x: float, order: float = order) -> float:
            ratio = 1 - sample_rate + sample_rate * math.exp((2 * x - 1) / 2 / noise_multiplier**2)
            return math.exp(order * math.log(ratio) + norm.logpdf(x, 0, noise_multiplier))

        tails = 12 * noise_multiplier
        value, _ = quad(integrand, -tails, tails + order, limit=1000, points=[0, order])
        expected = math.log(value) / (order - 1)
        assert divergences[ORDERS.index(order)] == pytest.approx(expected, rel=1e-6, abs=1e-8)


@pytest.mark.slow
@FEW
@given(st.lists(EVENTS, min_size=1, max_size=3))
def test_epsilon_is_opacus_and_no_more_than_googles(events) -> None:
    """Google's leaves orders out whose series it gives up on: at high rates its bound is looser."""
    absl.logging.set_verbosity(absl.logging.ERROR)
    opacus = OpacusRdp()
    opacus.history = [(e.noise_multiplier, e.sample_rate, e.count) for e in events]
    google = GooglesRdp()
    for event in events:
        inner = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        google.compose(dp_accounting.PoissonSampledDpEvent(event.sample_rate, inner), event.count)
    ours = RDP.epsilon(events, delta=DELTA)
    theirs = google.get_epsilon(DELTA)
    # Opacus' own highest order is 63: too low for those who spend little.
    assert ours <= opacus.get_epsilon(DELTA) * (1 + 1e-9)
    assert ours <= theirs * (1 + 1e-3)
    if all(event.sample_rate in (0.001, 0.01, 1.0) for event in events):
        assert ours == pytest.approx(theirs, rel=1e-3)
    if ours > 0.5:
        assert ours == pytest.approx(opacus.get_epsilon(DELTA), rel=1e-9)


@settings(max_examples=5)
@given(EVENTS)
def test_tighter_accountants_agree_and_stay_below_rdp(event) -> None:
    tight = PLD.epsilon([event], delta=DELTA)
    assert tight <= RDP.epsilon([event], delta=DELTA) * 1.001
    assert PRV.epsilon([event], delta=DELTA) == pytest.approx(tight, abs=0.025, rel=0.01)


def test_one_gaussian_is_the_closed_form() -> None:
    """Balle & Wang 2018, arXiv:1805.06530, Theorem 8."""

    def phi(t: float) -> float:
        return 0.5 * (1 + math.erf(t / math.sqrt(2)))

    sigma = 2.0
    epsilon = PLD.epsilon([GaussianEvent(noise_multiplier=sigma)], delta=DELTA)
    a, b = 1 / (2 * sigma), epsilon * sigma
    assert phi(a - b) - math.exp(epsilon) * phi(-a - b) == pytest.approx(DELTA, rel=0.02)


def test_many_gaussians_without_sampling_cost_what_one_of_their_precision_costs() -> None:
    many = [GaussianEvent(noise_multiplier=8.0, count=48), GaussianEvent(noise_multiplier=4.0)]
    one = GaussianEvent(noise_multiplier=1 / math.sqrt(48 / 64 + 1 / 16))
    for accountant in (RDP, PLD):
        assert accountant.epsilon(many, delta=DELTA) == pytest.approx(
            accountant.epsilon([one], delta=DELTA), rel=1e-6
        )
    composed = PLDAccountant()
    composed.compose(dp_accounting.GaussianDpEvent(8.0), 48)
    composed.compose(dp_accounting.GaussianDpEvent(4.0))
    assert PLD.epsilon(many, delta=DELTA) == pytest.approx(composed.get_epsilon(DELTA), rel=1e-3)


def test_nothing_released_costs_nothing() -> None:
    for accountant in (RDP, PLD, PRV):
        assert accountant.epsilon([], delta=DELTA) == 0.0


@FEW
@given(EVENTS, EVENTS)
def test_epsilon_never_falls_by_releasing_more(first, second) -> None:
    alone = RDP.epsilon([first], delta=DELTA)
    assert RDP.epsilon([first, second], delta=DELTA) >= alone
    assert RDP.epsilon([second, first], delta=DELTA) == pytest.approx(
        RDP.epsilon([first, second], delta=DELTA), rel=1e-12
    )


@FEW
@given(EVENTS, st.lists(EVENTS, max_size=2), st.floats(0.1, 20))
def test_the_rounds_allowed_fit_and_one_more_does_not(event, history, epsilon) -> None:
    allowed = rounds_allowed(RDP, history, event, epsilon=epsilon, delta=DELTA, at_most=5000)
    cost = [
        RDP.epsilon([*history, *([event.times(k)] if k else [])], delta=DELTA)
        for k in (allowed, allowed + 1)
    ]
    if allowed or cost[0] <= epsilon:
        assert cost[0] <= epsilon
    if allowed < 5000:
        assert cost[1] > epsilon


def test_a_history_beyond_the_budget_allows_nothing() -> None:
    many = [FLOWERS.times(1000)]
    assert rounds_allowed(RDP, many, FLOWERS, epsilon=1.0, delta=DELTA) == 0


@pytest.mark.parametrize(
    ("accountant", "epsilon"),
    [(RDP, 0.5), (RDP, 3.0), (PRV, 3.0)],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_solved_noise_meets_the_target_and_hardly_less_would(accountant, epsilon) -> None:
    def event_of(noise_multiplier: float) -> GaussianEvent:
        return GaussianEvent(noise_multiplier=noise_multiplier, sample_rate=0.05, count=200)

    sigma = solve_noise(accountant, event_of, epsilon=epsilon, delta=DELTA)
    assert accountant.epsilon([event_of(sigma)], delta=DELTA) <= epsilon
    assert accountant.epsilon([event_of(sigma / 1.003)], delta=DELTA) > epsilon


def test_a_target_that_no_noise_meets_is_refused() -> None:
    with pytest.raises(ConfigError, match="no noise up to 1000"):
        solve_noise(
            RDP,
            lambda s: GaussianEvent(noise_multiplier=s, count=10**9),
            epsilon=0.01,
            delta=DELTA,
        )


def test_noise_too_small_to_account_is_an_error_and_no_number() -> None:
    event = GaussianEvent(noise_multiplier=1e-200, sample_rate=0.1)
    for accountant in (RDP, PLD, PRV):
        with pytest.raises(UnaccountableError):
            accountant.epsilon([event], delta=DELTA)


@pytest.mark.parametrize(
    "values",
    [
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": math.inf},
        {"noise_multiplier": 1.0, "sample_rate": 0.0},
        {"noise_multiplier": 1.0, "sample_rate": 1.5},
        {"noise_multiplier": 1.0, "count": 0},
    ],
)
def test_an_event_that_cannot_be_is_refused(values) -> None:
    with pytest.raises(ConfigError):
        GaussianEvent(**values)


def test_an_unknown_accountant_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="accountant=moments is not known: choose one of rdp"):
        accountant_named("moments")
