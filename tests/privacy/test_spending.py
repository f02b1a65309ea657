"""What clients have lost: composed per client, never forgotten, largest first."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_app.privacy.accounting import GaussianEvent, PldAccountant, RdpAccountant
from fl_app.privacy.spending import InMemoryPayments, Payment, Spending

DELTA = 1e-5
RDP = RdpAccountant()
PLAIN = GaussianEvent(noise_multiplier=2.0)
SAMPLED = GaussianEvent(noise_multiplier=1.0, sample_rate=0.1)
CLIENTS = st.lists(st.sampled_from("abcde"), unique=True).map(tuple)
PAYMENTS = st.lists(
    st.builds(
        Payment,
        round=st.integers(1, 9),
        event=st.sampled_from([PLAIN, SAMPLED, GaussianEvent(noise_multiplier=5.0)]),
        clients=st.none() | CLIENTS,
    ),
    max_size=8,
)


def of_each(payments: Sequence[Payment], population: Sequence[str]) -> list[float]:
    """Return each client's epsilon, composed in the plainest way."""
    return [
        RDP.epsilon([p.event for p in payments if p.clients is None or c in p.clients], delta=DELTA)
        for c in population
    ]


@settings(max_examples=30)
@given(PAYMENTS)
def test_largest_and_mean_are_those_of_the_clients_one_by_one(payments) -> None:
    spending = Spending(RDP, delta=DELTA, payments=payments)
    each = of_each(payments, "abcdef")
    assert spending.epsilon_max() == pytest.approx(max(each), rel=1e-12)
    assert spending.epsilon_mean(6) == pytest.approx(statistics.fmean(each), rel=1e-12)


@settings(max_examples=30)
@given(PAYMENTS, PAYMENTS)
def test_what_a_payment_would_come_to_is_what_it_comes_to(payments, further) -> None:
    spending = Spending(RDP, delta=DELTA, payments=payments)
    for payment in further:
        before, foreseen = spending.epsilon_max(), spending.epsilon_after(payment)
        assert spending.epsilon_max() == before
        spending.add(payment)
        assert spending.epsilon_max() == foreseen >= before


@pytest.mark.parametrize("accountant", [RDP, PldAccountant()], ids=lambda a: a.name)
def test_rounds_of_secret_cohorts_cost_everybody_what_one_long_event_costs(accountant) -> None:
    payments = [Payment(round=r, event=SAMPLED, clients=None) for r in range(1, 31)]
    spending = Spending(accountant, delta=DELTA, payments=payments)
    expected = accountant.epsilon([SAMPLED.times(30)], delta=DELTA)
    assert spending.epsilon_max() == pytest.approx(expected, rel=1e-12)
    assert spending.epsilon_mean(1000) == pytest.approx(expected, rel=1e-12)


def test_of_seeded_cohorts_the_most_asked_client_counts() -> None:
    rounds = [("a", "b"), ("a", "c"), ("a", "b")]
    payments = [Payment(round=n, event=PLAIN, clients=c) for n, c in enumerate(rounds, start=1)]
    spending = Spending(RDP, delta=DELTA, payments=payments)
    cost = {n: RDP.epsilon([PLAIN.times(n)], delta=DELTA) for n in (1, 2, 3)}
    assert spending.epsilon_max() == cost[3]
    assert spending.epsilon_mean(4) == pytest.approx((cost[3] + cost[2] + cost[1] + 0) / 4)


def test_before_any_payment_nothing_is_spent() -> None:
    spending = Spending(RDP, delta=DELTA)
    assert spending.epsilon_max() == spending.epsilon_mean(5) == 0.0


def test_the_accountant_is_asked_about_as_few_histories_as_can_be() -> None:
    """Clients who took part equally often have lost the same, and the most asked have lost most."""
    asked: Counter[str] = Counter()

    class Counting:
        name = "counting"

        def epsilon(self, events, *, delta) -> float:
            asked["epsilon"] += 1
            return RDP.epsilon(events, delta=delta)

    spending = Spending(Counting(), delta=DELTA)
    for round in range(1, 51):
        clients = tuple(str(k) for k in range(100) if (k + round) % (1 + k % 7) == 0)
        payment = Payment(round=round, event=PLAIN, clients=clients)
        spending.epsilon_after(payment)
        spending.add(payment)
        spending.epsilon_max()
    assert asked["epsilon"] == 50


def test_a_record_in_memory_gives_back_what_was_paid_in_order() -> None:
    record = InMemoryPayments()
    payments = [Payment(round=r, event=PLAIN, clients=("a",)) for r in (1, 2, 2)]
    for payment in payments:
        record.pay(payment)
    assert list(record.paid()) == payments
