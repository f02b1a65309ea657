"""An algorithm whose every step is a release under client-level privacy.

`ClientLevelAlgorithm` puts the mechanism (`fl_app.privacy.client_level`) between the updates of a
cohort and the server optimizer of a `Composition`; what comes after the noise is post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fl_app.aggregation import is_uniform_mean
from fl_app.algorithm import Algorithm, Composition, ServerState, Step
from fl_app.codec import ask_to_clip
from fl_app.objective import LocalObjective
from fl_app.privacy.accounting import accountant_named
from fl_app.privacy.base import BudgetExhaustedError
from fl_app.privacy.client_level import CLIPPED, ClientLevel, ClientLevelPlan
from fl_app.privacy.ledger_format import LedgerError
from fl_app.privacy.randomness import randomness_from
from fl_app.privacy.spending import Payment, Payments, Spending
from fl_app.selection import Selector, expected_cohort, planned_rounds, secret_sample_rate
from fl_app.server_optimizer import apply_change
from fl_app.tracking.summary import Privacy
from fl_app.types import ClientId, ClientUpdate, ConfigError, Params

_MAX_NORM, _OPTIMIZER = "max_norm", "optimizer"


class ClientLevelAlgorithm:
    """A composition whose mean is clipped, noised, and paid for.

    A round is paid for when its instructions are made, before anybody is asked, and a payment
    buys one step. Every round takes one, also when nobody answered: to skip it would tell that.

    Args:
        inner: Its server optimizer steps along the noisy mean; its objective is the clients'. Must
            have passed `check_client_level`.
        plan: Mechanism, and what it is charged as.
        payments: Where steps are paid for. What it holds already counts.
        seed: The run's seed; has a say only if tests ask for noise that repeats.
    """

    hides_clients = True

    def __init__(
        self, *, inner: Composition, plan: ClientLevelPlan, payments: Payments, seed: int
    ) -> None:
        self.inner = inner
        self.plan = plan
        self._payments = payments
        self._seed = seed
        paid = tuple(payments.paid())
        self._last_paid = max((payment.round for payment in paid), default=0)
        self._spending = Spending(
            accountant_named(plan.privacy.accountant), delta=plan.privacy.delta, payments=paid
        )
        self._paid_round: int | None = None

    @property
    def name(self) -> str:
        """As of the composition."""
        return self.inner.name

    @property
    def objective(self) -> LocalObjective:
        """As of the composition."""
        return self.inner.objective

    def instruct(
        self,
        state: ServerState,
        clients: Sequence[ClientId],
        arrays: ArrayRecord,
        config: ConfigRecord,
        *,
        round: int,
    ) -> Mapping[ClientId, RecordDict]:
        """Pay for the round, and return the same for each client: model, configuration and bound.

        Raises:
            BudgetExhaustedError: The round would pass ``privacy.target_epsilon``.
        """
        if self.plan.event is not None and state.round > self._last_paid:
            raise LedgerError(
                f"{state.round} rounds have been played, and the ledger holds {self._last_paid}: "
                "without the rest there is no epsilon to state. Put back the ledger that belongs "
                "to this run, with its head, or start a new run."
            )
        self._pay(clients, round)
        self._last_paid = round
        ask_to_clip(config, self._max_norm(state))
        return self.inner.instruct(state, clients, arrays, config, round=round)

    def step(
        self,
        state: ServerState,
        updates: Sequence[ClientUpdate],
        *,
        round: int,
        trainable: frozenset[str],
    ) -> Step:
        """Step the global model along the noisy mean of the updates, however few they are.

        Raises:
            RuntimeError: The round has not been paid for, or has had its step.
        """
        if self._paid_round != round:
            raise RuntimeError(f"Round {round} is not paid for: instruct() comes before step().")
        self._paid_round = None
        max_norm = self._max_norm(state)
        randomness = randomness_from(
            self.plan.privacy.randomness, seed=self._seed, use=f"server/{round}"
        )
        change = self.plan.noisy_mean(
            (update.delta for update in updates),
            like=state.params,
            max_norm=max_norm,
            randomness=randomness,
        )
        next_max_norm = self.plan.next_max_norm(
            max_norm, (update.metrics.get(CLIPPED) for update in updates), randomness=randomness
        )
        params, optimizer = apply_change(
            state.params,
            change,
            trainable=trainable,
            make_optimizer=self.inner.server_optimizer,
            state=(state.memory or {}).get(_OPTIMIZER),
        )
        return Step(
            params=params,
            memory={_MAX_NORM: next_max_norm, _OPTIMIZER: optimizer},
            metrics={_MAX_NORM: max_norm},  # what was released before, and a function of it
            epsilon=self._epsilon(),
        )

    def spent(self, population: int) -> Privacy:
        """Return what ``summary.json`` says of a run with that many clients."""
        unpriced = self.plan.event is None
        return Privacy(
            unit=self.plan.privacy.unit,
            epsilon_max=self._epsilon(),
            epsilon_mean=math.inf if unpriced else self._spending.epsilon_mean(population),
            delta=self.plan.privacy.delta,
            accountant=self.plan.privacy.accountant,
            noise_multiplier=self.plan.noise_multiplier,
        )

    def _max_norm(self, state: ServerState) -> float:
        if state.memory is None:
            return self.plan.privacy.max_norm
        return float(state.memory[_MAX_NORM])

    def _epsilon(self) -> float:
        return math.inf if self.plan.event is None else self._spending.epsilon_max()

    def _pay(self, clients: Sequence[ClientId], round: int) -> None:
        event, target = self.plan.event, self.plan.privacy.target_epsilon
        if event is not None:
            secret = self.plan.sample_rate is not None
            payment = Payment(round=round, event=event, clients=None if secret else tuple(clients))
            after = self._spending.epsilon_after(payment)
            if target is not None and after > target:
                raise BudgetExhaustedError(
                    f"round {round} would bring epsilon to {after:.4g}, above "
                    f"privacy.target_epsilon={target:g}: rounds that a crash had played again, or "
                    "that were added on a resume, count too. The model of the last checkpoint is "
                    "within it; plan more rounds in a new run, or allow more."
                )
            self._payments.pay(payment)
            self._spending.add(payment)
        self._paid_round = round


def check_client_level(
    algorithm: Algorithm, selector: Selector, *, params: Params, trainable: frozenset[str]
) -> Composition:
    """Return the algorithm, once it is known that its mean can be private for whole clients.

    Args:
        algorithm: What ``strategy`` names.
        selector: What ``selection`` names.
        params: The model.
        trainable: Names in it that gradients change.

    Raises:
        ConfigError: It cannot.
    """
    if not isinstance(algorithm, Composition):
        raise ConfigError(
            f"strategy={algorithm.name} cannot be used with privacy=client: how far one client "
            "moves what it computes is not known. Choose one of ours that takes a mean, such as "
            "strategy=fedadam strategy.aggregation.weighting=uniform."
        )
    rule = algorithm.aggregation
    if not is_uniform_mean(rule):
        weighting = getattr(rule, "weighting", None)
        named = f".weighting={weighting}" if weighting else f"={rule!r:.80}"
        raise ConfigError(
            f"strategy.aggregation{named} cannot be used with privacy=client: noise is calibrated "
            "to a mean in which all clients count alike. Choose a strategy that takes a mean, such "
            "as strategy=fedavg, with strategy.aggregation.weighting=uniform."
        )
    if buffers := sorted(params.keys() - trainable):
        raise ConfigError(
            f"task: {', '.join(buffers[:3])}{' …' if len(buffers) > 3 else ''} of the model cannot "
            "be trained by gradients, and privacy=client would put noise on it: a running variance "
            "could become negative. Use GroupNorm in place of BatchNorm, and leave frozen layers "
            "out of the state_dict."
        )
    if over_selection := getattr(selector, "over_selection", 0.0):
        raise ConfigError(
            f"selection.over_selection={over_selection} cannot be used with privacy=client: a "
            "round that closes early lets one client's reply keep another's out, so both would "
            "move the sum. Set it to 0, and ask more clients with selection.fraction."
        )
    if selector.round_timeout_s is not None:
        raise ConfigError(
            f"selection.round_timeout_s={selector.round_timeout_s} cannot be used with "
            "privacy=client: one client's slowness could keep another's update out of the sum. "
            "Set it to null."
        )
    if selector.min_replies > 1:
        raise ConfigError(
            f"selection.min_replies={selector.min_replies} cannot be used with privacy=client: to "
            "skip a round would tell how many answered, so every round takes a step. Set it to 1."
        )
    return algorithm


def plan_client_level(
    privacy: ClientLevel,
    selector: Selector,
    clients: Sequence[ClientId],
    *,
    rounds: int,
    seed: int,
) -> ClientLevelPlan:
    """Return the mechanism of a run over this population.

    Raises:
        ConfigError: As `ClientLevel.plan`, or delta is not below one over the population.
    """
    if privacy.delta * len(clients) >= 1:
        raise ConfigError(
            f"privacy.delta={privacy.delta:g} is not below 1/{len(clients)}: publishing one of "
            f"{len(clients)} clients at random would pass for private. Lower it."
        )
    rate = secret_sample_rate(selector)
    participations = privacy.planned_rounds or planned_rounds(
        selector, clients, rounds=rounds, seed=seed
    )
    return privacy.plan(
        sample_rate=rate,
        participations=participations,
        expected_cohort=expected_cohort(selector, len(clients)),
    )
