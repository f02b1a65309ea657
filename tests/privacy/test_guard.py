"""A guard counts as a fresh solve does, never passes a budget, and keeps the owner's terms."""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_app.privacy.accounting import (
    ORDERS,
    GaussianEvent,
    PldAccountant,
    PrvAccountant,
    RdpAccountant,
    adaptive_delta,
    epsilons,
    rounds_allowed,
)
from fl_app.privacy.base import Budget, BudgetExhaustedError, PolicyError, Request
from fl_app.privacy.guard import LedgerGuard, OpenGuard, guard_of
from fl_app.privacy.ledger import Ledger
from fl_app.privacy.ledger_format import Account, LedgerError
from fl_app.privacy.policy import Terms
from fl_app.privacy.policy_file import read_policy
from fl_app.types import PrivacyUnit

RDP = RdpAccountant()
TERMS = Terms(data_set="digits", delta=1e-5, epsilon=3.0, unit=PrivacyUnit.RECORD)
EVENT = GaussianEvent(noise_multiplier=1.0, sample_rate=0.01, count=100)
ASKED = Request(
    client="0",
    run="run",
    round=1,
    unit=PrivacyUnit.RECORD,
    event=EVENT,
    delta=1e-5,
    num_examples=4000,
    task="digits",
)


def guard(folder: Path, **changes) -> LedgerGuard:
    terms = replace(TERMS, **{k: v for k, v in changes.items() if k in Terms.__dataclass_fields__})
    rest = {k: v for k, v in changes.items() if k not in Terms.__dataclass_fields__}
    return LedgerGuard(ledger=Ledger(folder / "ledger.jsonl"), terms=terms, **rest)


def admitted(keeper: LedgerGuard, request: Request) -> Budget:
    [budget] = keeper.admit([request])
    assert isinstance(budget, Budget), budget
    return budget


def refused(keeper: LedgerGuard, request: Request, kind: type[Exception], match: str) -> None:
    before = keeper.ledger.tallies()
    with pytest.raises(kind, match=match):
        [verdict] = keeper.admit([request])
        assert isinstance(verdict, Exception)
        raise verdict
    assert keeper.ledger.tallies() == before


# Counting.

MECHANISMS = [(1.0, 0.01), (0.8, 0.02), (2.0, 1.0), (1.3, 0.004)]
STEPS = st.tuples(
    st.sampled_from(["a", "b"]),
    st.sampled_from(MECHANISMS),
    st.sampled_from([1, 7, 100]),
    st.booleans(),
)


@settings(max_examples=25)
@given(
    st.lists(st.lists(STEPS, min_size=1, max_size=4), min_size=1, max_size=12), st.floats(0.3, 6)
)
def test_counting_is_a_fresh_solve_after_any_charges_of_anyone(cohorts, epsilon) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        # Two processes' worth of guards on one ledger; what each sees must not matter.
        guards = [guard(Path(scratch), epsilon=epsilon) for _ in range(2)]
        paid: dict[str, list[GaussianEvent]] = {"a": [], "b": []}
        for cohort in cohorts:
            requests = [
                replace(
                    ASKED,
                    client=client,
                    event=GaussianEvent(noise_multiplier=z, sample_rate=q, count=count),
                )
                for client, (z, q), count, _ in cohort
            ]
            verdicts = guards[cohort[0][3]].admit(requests)
            for request, verdict in zip(requests, verdicts, strict=True):
                history, event = paid[request.client], request.event
                delta = adaptive_delta([*history, event], 1e-5)
                fresh = rounds_allowed(RDP, history, event, epsilon=epsilon, delta=delta)
                if isinstance(verdict, Budget):
                    history.append(event)
                    assert verdict.rounds_left == fresh - 1
                    assert verdict.epsilon_spent == pytest.approx(
                        RDP.epsilon(history, delta=adaptive_delta(history, 1e-5)), rel=1e-12
                    )
                    assert verdict.epsilon_spent <= epsilon
                else:
                    assert isinstance(verdict, BudgetExhaustedError)
                    assert fresh == 0
        for client, history in paid.items():
            held = Ledger(Path(scratch) / "ledger.jsonl").events_of(
                Account(client=client, data_set="digits")
            )
            assert sum(event.count for event in held) == sum(event.count for event in history)
            assert RDP.epsilon(held, delta=1e-5) <= epsilon


def test_a_budget_ends_where_a_fresh_solve_says_and_not_a_round_later(tmp_path: Path) -> None:
    keeper, allowed = guard(tmp_path), rounds_allowed(RDP, [], EVENT, epsilon=3.0, delta=1e-5)
    assert allowed > 5
    for round in range(1, allowed + 1):
        budget = admitted(keeper, replace(ASKED, round=round))
        assert budget.rounds_left == allowed - round
        assert (budget.epsilon, budget.delta) == (3.0, 1e-5)
    for _ in range(2):
        refused(keeper, ASKED, BudgetExhaustedError, "epsilon=3 at delta=1e-05, of which 2.9")
    refused(guard(tmp_path), ASKED, BudgetExhaustedError, "Plan fewer rounds")
    # What is smaller may still fit, and what the owner allows more of does.
    cheap = replace(EVENT, count=1)
    assert rounds_allowed(RDP, [EVENT.times(allowed)], cheap, epsilon=3.0, delta=1e-5) > 0
    admitted(keeper, replace(ASKED, event=cheap))
    admitted(guard(tmp_path, epsilon=6.0), ASKED)


def test_ten_rounds_cost_what_one_long_run_costs(tmp_path: Path) -> None:
    keeper = guard(tmp_path, epsilon=None)
    spent = [admitted(keeper, replace(ASKED, round=round)) for round in range(1, 11)]
    assert spent[-1].epsilon_spent == RDP.epsilon([EVENT.times(10)], delta=1e-5)
    assert spent[-1].rounds_left is None
    assert [b.epsilon_spent for b in spent] == sorted(b.epsilon_spent for b in spent)
    long = guard(tmp_path, epsilon=None, data_set="another")
    assert admitted(long, replace(ASKED, event=EVENT.times(10))) == spent[-1]


@pytest.mark.parametrize("last_checkpoint", range(7))
def test_a_resumed_run_costs_no_less_than_the_uninterrupted_one(
    tmp_path: Path, last_checkpoint: int
) -> None:
    whole = guard(tmp_path, data_set="whole", epsilon=None)
    for round in range(1, 11):
        uninterrupted = admitted(whole, replace(ASKED, round=round))
    for round in range(1, 7):
        admitted(guard(tmp_path, data_set="cut", epsilon=None), replace(ASKED, round=round))
    again = guard(tmp_path, data_set="cut", epsilon=None)
    for round in range(last_checkpoint + 1, 11):
        resumed = admitted(again, replace(ASKED, round=round))
    repeated = 6 - last_checkpoint
    assert resumed.epsilon_spent == RDP.epsilon([EVENT.times(10 + repeated)], delta=1e-5)
    assert resumed.epsilon_spent >= uninterrupted.epsilon_spent
    assert (resumed.epsilon_spent == uninterrupted.epsilon_spent) == (repeated == 0)


def test_processes_that_share_a_ledger_never_pass_the_budget_together(tmp_path: Path) -> None:
    allowed = rounds_allowed(RDP, [], EVENT, epsilon=3.0, delta=1e-5)
    children = []
    for process in range(3):
        child = os.fork()
        if child == 0:
            keeper, rounds = guard(tmp_path), 0
            while isinstance(keeper.admit([ASKED])[0], Budget):
                rounds += 1
            (tmp_path / f"trained{process}").write_text(str(rounds))
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    trained = [int((tmp_path / f"trained{process}").read_text()) for process in range(3)]
    assert sum(trained) == allowed
    [event] = Ledger(tmp_path / "ledger.jsonl").events_of(Account(client="0", data_set="digits"))
    assert event == EVENT.times(allowed)


def test_a_cohort_is_paid_in_one_write_and_only_those_admitted_pay(tmp_path: Path) -> None:
    keeper = guard(tmp_path, limits={"poor": 0.5, "free": None})
    cohort = [
        ASKED,
        replace(ASKED, client="poor"),
        replace(ASKED, client="weak", unit=PrivacyUnit.CLIENT),
        replace(ASKED, client="free"),
    ]
    first, poor, weak, free = keeper.admit(cohort)
    assert isinstance(first, Budget)
    assert isinstance(poor, BudgetExhaustedError)
    assert isinstance(weak, PolicyError)
    assert isinstance(free, Budget)
    assert (free.epsilon, free.rounds_left) == (None, None)
    assert [entry.charge.account.client for entry in keeper.ledger] == ["0", "free"]
    assert len({entry.time for entry in keeper.ledger}) == 1


def test_nothing_is_admitted_when_the_ledger_cannot_be_used(tmp_path: Path) -> None:
    keeper = guard(tmp_path)
    admitted(keeper, ASKED)
    content = bytearray(keeper.ledger.path.read_bytes())
    content[-80] ^= 1
    keeper.ledger.path.write_bytes(content)
    with pytest.raises(LedgerError, match="line 2"):
        guard(tmp_path).admit([ASKED])


# Terms.


@pytest.mark.parametrize(
    ("terms", "request_", "match"),
    [
        ({}, {"unit": PrivacyUnit.CLIENT}, "wants each record hidden, and privacy=client hides"),
        ({"unit": PrivacyUnit.CLIENT}, {}, "wants each client hidden, and privacy=record"),
        ({}, {"event": None, "unit": PrivacyUnit.NONE}, "privacy only: choose privacy=record"),
        ({}, {"event": None}, "privacy only"),
        ({"unit": None}, {"unit": PrivacyUnit.NONE}, "privacy only"),
        ({"tasks": ("ecg", "eeg")}, {}, "task=digits: its owner allows ecg, eeg"),
        ({"tasks": ("ecg",)}, {"task": ""}, "task=: its owner"),
        ({"least_noise_multiplier": 1.1}, {}, "at least 1.1, not 1: plan with more noise"),
        ({"delta": 1 / 4000}, {}, "delta=0.00025, which is not below one over"),
        ({}, {"event": replace(EVENT, noise_multiplier=1e-200)}, "no finite epsilon"),
        ({"epsilon": None}, {"event": replace(EVENT, noise_multiplier=1e-200)}, "no finite"),
    ],
)
def test_what_the_owner_does_not_allow_is_declined_and_costs_nothing(
    tmp_path: Path, terms, request_, match
) -> None:
    refused(guard(tmp_path, **terms), replace(ASKED, **request_), PolicyError, match)


def test_the_owners_delta_counts_whatever_the_request_says(tmp_path: Path) -> None:
    budget = admitted(guard(tmp_path, delta=1e-7), replace(ASKED, delta=0.1))
    assert budget.delta == 1e-7
    assert budget.epsilon_spent == RDP.epsilon([EVENT], delta=1e-7)


def test_a_refusal_tells_nobody_how_many_records_there_are(tmp_path: Path) -> None:
    [refusal] = guard(tmp_path, delta=0.001).admit([replace(ASKED, num_examples=54321)])
    assert "54321" not in str(refusal)


def test_a_refusal_says_how_the_budget_stands_only_if_the_owner_wants_that(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    [open_] = guard(tmp_path, epsilon=0.456).admit([ASKED])
    [closed] = guard(tmp_path, epsilon=0.456, share_budget=False).admit([ASKED])
    assert "epsilon=0.456" in str(open_)
    assert "0.456" not in str(closed)
    assert "epsilon" not in str(closed)
    assert caplog.text.count("epsilon=0.456") == 2  # the owner's own log has it in both cases


def test_units_do_not_mix_in_one_account(tmp_path: Path) -> None:
    admitted(guard(tmp_path), ASKED)
    by_client = guard(tmp_path, unit=None)
    refused(
        by_client,
        replace(ASKED, unit=PrivacyUnit.CLIENT),
        PolicyError,
        "has paid for privacy=record before, and privacy=client cannot be added",
    )
    admitted(by_client, replace(ASKED, unit=PrivacyUnit.CLIENT, client="1"))
    admitted(by_client, ASKED)


def test_training_without_privacy_passes_only_where_nobody_wants_any(tmp_path: Path) -> None:
    plain = replace(ASKED, unit=PrivacyUnit.NONE, event=None)
    assert OpenGuard().admit([plain, plain]) == [None, None]
    assert guard(tmp_path, unit=None).admit([plain]) == [None]
    assert not list(tmp_path.iterdir())
    [verdict] = OpenGuard().admit([ASKED])
    assert isinstance(verdict, PolicyError)
    assert "has no ledger" in str(verdict)


def test_a_guard_keeps_the_policy_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(
        "version: 1\ndata_set: ward-7\nepsilon: 2\ndelta: 1e-6\nunit: record\n"
        "ledger: spent.jsonl\ntasks: [digits]\nleast_noise_multiplier: 0.9\n"
    )
    path.chmod(0o600)
    keeper = guard_of(read_policy(path))
    assert admitted(keeper, ASKED).epsilon_spent == RDP.epsilon([EVENT], delta=1e-6)
    assert {a.data_set for a in Ledger(tmp_path / "spent.jsonl").tallies()} == {"ward-7"}
    refused(keeper, replace(ASKED, task="other"), PolicyError, "task=other")


# Other accountants.


@pytest.mark.parametrize(
    "accountant",
    [PrvAccountant(), pytest.param(PldAccountant(), marks=pytest.mark.slow)],
    ids=lambda a: a.name,
)
def test_a_tighter_accountant_allows_more_of_one_mechanism_and_no_other(
    tmp_path: Path, accountant
) -> None:
    event = replace(EVENT, count=500)
    request, keeper = replace(ASKED, event=event), guard(tmp_path, accountant=accountant)
    rdp = rounds_allowed(RDP, [], event, epsilon=3.0, delta=1e-5)
    rounds = 0
    while isinstance(verdict := keeper.admit([request])[0], Budget):
        rounds += 1
        assert verdict.epsilon_spent <= 3.0
    assert isinstance(verdict, BudgetExhaustedError)
    assert rounds > rdp
    assert accountant.epsilon([event.times(rounds)], delta=1e-5) <= 3.0
    assert accountant.epsilon([event.times(rounds + 1)], delta=1e-5) > 3.0
    refused(
        keeper,
        replace(ASKED, event=replace(EVENT, noise_multiplier=5.0)),
        PolicyError,
        "proven for one mechanism that never changes.*accountant: rdp",
    )


@settings(max_examples=20)
@given(
    st.lists(
        st.lists(
            st.builds(
                GaussianEvent,
                noise_multiplier=st.sampled_from([0.5, 1.0, 3.0, 50.0]),
                sample_rate=st.sampled_from([0.001, 0.1, 1.0]),
                count=st.integers(1, 10**6),
            ),
            max_size=4,
        ),
        max_size=5,
    ),
    st.sampled_from([1e-9, 1e-5, 0.4]),
)
def test_many_epsilons_at_once_are_those_one_by_one(histories, delta) -> None:
    assert epsilons(RDP, histories, delta=delta) == pytest.approx(
        [RDP.epsilon(h, delta=adaptive_delta(h, delta)) for h in histories], rel=1e-12
    )


def test_an_epsilon_that_is_not_there_does_not_spoil_the_others() -> None:
    hopeless = GaussianEvent(noise_multiplier=1e-200, sample_rate=0.1)
    for accountant in (RDP, PrvAccountant()):
        found = epsilons(accountant, [[EVENT], [hopeless], [], [hopeless, EVENT]], delta=1e-5)
        assert found == [accountant.epsilon([EVENT], delta=1e-5), math.inf, 0.0, math.inf]


def test_mechanisms_that_may_have_been_chosen_in_view_of_one_another_share_delta() -> None:
    other = replace(EVENT, noise_multiplier=2 * EVENT.noise_multiplier)
    [alone, again, mixed] = epsilons(RDP, [[EVENT], [EVENT, EVENT], [EVENT, other]], delta=1e-5)
    assert alone == RDP.epsilon([EVENT], delta=1e-5)
    assert again == RDP.epsilon([EVENT.times(2)], delta=1e-5)
    assert mixed == pytest.approx(RDP.epsilon([EVENT, other], delta=1e-5 / len(ORDERS)))
    assert mixed > RDP.epsilon([EVENT, other], delta=1e-5)
