"""Our Flower strategy: select, encode, decode, validate, aggregate, step.

`FederatedStrategy` is the one Flower ``Strategy`` that plays every algorithm (`fl_app.algorithm`),
with our selection and validation around it. The loop that drives it, with checkpoints and
tracking, is `fl_app.rounds`; Flower's own ``Strategy.start`` drives it just as well.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fl_app.aggregation import RunningMean
from fl_app.algorithm import Algorithm, ServerState, Step, Streams, hides_clients, make_running
from fl_app.answers import Answers
from fl_app.codec import decode_instruction, encode_model, train_messages
from fl_app.cohort_figures import accuracies, mean_metrics
from fl_app.directory import Cohort, Directory, KnowsClients, TrainsCohorts
from fl_app.foreign import OurReplies, Replies
from fl_app.own_measurements import OwnMeasurements
from fl_app.params import num_bytes
from fl_app.selection import Selector, Without, secret_sample_rate
from fl_app.types import (
    ClientId,
    ClientUpdate,
    ConfigError,
    EmptyCohortError,
    Evaluation,
    Failure,
    FailureKind,
    FlAppError,
    Params,
    Role,
    RoundReport,
    TooFewUpdatesError,
    client_order,
    seeded_globals,
    stream_seed,
)
from fl_app.validation import UpdateChecks

log = logging.getLogger(__name__)


class BudgetsSpentError(FlAppError):
    """Too few clients have any privacy budget left for another round."""


NO_LIMIT_S = 12 * 3600.0
"""Time to live of a message in a round without a timeout; Flower's own default."""
FOREVER_S = 10 * 365 * 24 * 3600.0
"""The same where the server's process carries the messages itself."""


class FederatedStrategy(Strategy):
    """Runs an algorithm over a population, one round at a time.

    Args:
        algorithm: What clients minimise, and the server's step.
        selector: Draws cohorts.
        checks: What an update must be.
        directory: Who the clients are.
        initial: Global model before the first round.
        trainable: Names in the model that gradients change; the rest are buffers.
        seed: The run's seed.
        replies: Reads what clients send.

    Attributes:
        state: Server state after the last round.
        report: What happened in the last round, or None before the first.
        trained_together: Whether its cohort was trained side by side; None before the first.
    """

    def __init__(
        self,
        *,
        algorithm: Algorithm,
        selector: Selector,
        checks: UpdateChecks,
        directory: Directory,
        initial: Params,
        trainable: frozenset[str],
        seed: int,
        replies: Replies | None = None,
    ) -> None:
        self._replies = replies or OurReplies()
        self.algorithm = algorithm
        self.state = ServerState(round=0, params=initial)
        self.report: RoundReport | None = None
        self.trained_together: bool | None = None
        self._selector = selector
        self._checks = checks
        self._directory = directory
        self._trainable = trainable
        self._seed = seed
        self._wanted = self._expected = 0
        self._hides = hides_clients(algorithm)
        self._secret_cohort = self._hides and secret_sample_rate(selector) is not None
        self._asked: dict[int, ClientId] = {}
        self._offline: list[Failure] = []

    # Flower's interface ---------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Draw the round's cohort and return its instructions, in the order of preference.

        Raises:
            EmptyCohortError: There is no client at all.
            BudgetsSpentError: Too few of them have any privacy budget left.
        """
        return self.messages(server_round, self.ask(server_round, arrays, config), grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take the step that a round's replies call for; sets `state` and `report`.

        Replies are consumed one by one and no further than needed: once the wanted number of good
        updates is in, the rest of an over-selected cohort is not waited for.

        Returns:
            The new global model, or None if too few good updates came back and the old one stays;
            and the cohort's mean metrics, or None if there are none.
        """
        answers = self._answers(server_round)
        answers.take_replies(replies, self._replies)
        self.trained_together = False
        return self._conclude(server_round, answers)

    def aggregate_cohort(
        self, server_round: int, cohort: Cohort
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Do as `aggregate_train` does, with answers that come without messages."""
        answers = self._answers(server_round)
        mean = make_running(self.algorithm)
        in_parts = answers.take_cohort(cohort, mean)
        self.trained_together = cohort.side_by_side
        return self._conclude(server_round, answers, mean if in_parts else None)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return nothing: clients measure the received model while they train, in one reply."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return None: there is no separate evaluation."""
        return None

    def summary(self) -> None:
        """Log what the strategy is composed of."""
        log.info("Strategy %s: %s", self.algorithm.name, self.algorithm)

    # Beyond it ------------------------------------------------------------------------------------

    def ask(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord
    ) -> dict[int, RecordDict]:
        """Draw the round's cohort; return what to tell each node, in the order of preference.

        Raises:
            EmptyCohortError: There is no client at all.
            BudgetsSpentError: Too few of them have any privacy budget left.
        """
        self._asked, self._offline = {}, []
        for client in self._drawn(server_round):
            node = self._directory.node_of(client)
            if node is None:
                self._offline.append(
                    Failure(client=client, kind=FailureKind.OFFLINE, reason="not connected")
                )
            else:
                self._asked[node] = client
        with self._randomness(server_round):
            contents = self.algorithm.instruct(
                self.state, list(self._asked.values()), arrays, config, round=server_round
            )
        self._asked = {node: client for node, client in self._asked.items() if client in contents}
        return {node: contents[client] for node, client in self._asked.items()}

    def messages(
        self, server_round: int, contents: Mapping[int, RecordDict], grid: Grid
    ) -> list[Message]:
        """Return the messages that tell nodes what `ask` gave for them."""
        no_limit = FOREVER_S if isinstance(grid, KnowsClients) else NO_LIMIT_S
        timeout = self._selector.round_timeout_s
        return train_messages(contents, round=server_round, ttl=timeout or no_limit)

    def cohort(self, contents: Mapping[int, RecordDict], grid: Grid) -> Cohort | None:
        """Return the clients that `ask` chose, asked to train together; None if they cannot.

        They can where the Grid sees to it, all are told the same, and answers need no translation.
        """
        told = list(contents.values())
        alike = all(content is told[0] for content in told)
        ours = isinstance(self._replies, OurReplies)
        if not (told and alike and ours and isinstance(grid, TrainsCohorts)):
            return None
        instruction = decode_instruction(told[0], deadline_s=self._selector.round_timeout_s)
        return grid.cohort([self._asked[node] for node in contents], instruction)

    def evaluate_clients(
        self, grid: Grid, clients: Iterable[ClientId]
    ) -> dict[ClientId, Evaluation]:
        """Return the global model measured by clients on their own held-out parts.

        Clients without such a part, that are offline or do not answer are left out.
        """
        ask = OwnMeasurements(
            directory=self._directory,
            replies=self._replies,
            timeout_s=self._selector.round_timeout_s,
            ttl_s=NO_LIMIT_S,
        )
        return ask(grid, clients, self.state.params, round=self.state.round)

    def clients(self) -> Sequence[ClientId]:
        """Return the ids of all clients known so far; may be lazy."""
        return self._directory.clients()

    def resume(self, state: ServerState) -> None:
        """Continue from the state in a checkpoint."""
        self.state = state

    def last_report(self) -> RoundReport:
        """Return what happened in the last round.

        Raises:
            RuntimeError: No round has been played.
        """
        if self.report is None:
            raise RuntimeError("No round has been played yet.")
        return self.report

    def current_arrays(self) -> ArrayRecord:
        """Return the global model as Flower arrays."""
        return encode_model(self.state.params)

    def _answers(self, server_round: int) -> Answers:
        """Return what takes a round's answers."""
        return Answers(
            round=server_round,
            asked=self._asked,
            offline=self._offline,
            wanted=self._wanted,
            model=self.state.params,
            checks=self._checks,
            hidden=self._hides,
        )

    def _conclude(
        self, server_round: int, answers: Answers, mean: RunningMean | None = None
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take the step that a round's answers, or their mean, call for; report the round."""
        updates, failures = answers.updates(), answers.failures()
        self._account(updates, failures)
        step = self._step(updates, mean, server_round)
        metrics = {} if self._hides else mean_metrics(updates)
        budgets = self.state.budgets.values()
        worst = max(budgets, key=lambda budget: budget.epsilon_spent, default=None)
        if step is not None:
            metrics = {**step.metrics, **metrics}
        report = RoundReport(
            round=server_round,
            cohort=self._cohort(),
            num_updates=len(updates),
            applied=step is not None,
            failures=failures,
            client_metrics=metrics,
            client_accuracy=accuracies(updates),
            epsilon=worst.epsilon_spent if worst else step.epsilon if step else None,
            epsilon_budget=worst.epsilon if worst else None,
            uplink_bytes=sum(u.num_bytes for u in updates),
            downlink_bytes=len(self._asked) * num_bytes(self.state.params),
            uplink_uncompressed_bytes=sum(u.num_bytes_uncompressed for u in updates),
        )
        self.report = self._withheld(report) if self._hides else report
        self.state = replace(self.state, round=server_round)
        if step is not None:
            self.state = replace(self.state, params=step.params, memory=step.memory)
        return (
            encode_model(step.params) if step is not None else None,
            MetricRecord(dict(metrics)) if metrics else None,
        )

    def _step(
        self, updates: Sequence[ClientUpdate], mean: RunningMean | None, round: int
    ) -> Step | None:
        """Return the server's step, or None if there are too few updates for one."""
        if len(updates) < self._selector.min_replies and not self._hides:
            why = f"{len(updates)} of at least {self._selector.min_replies} updates came back"
        else:
            try:
                with self._randomness(round):
                    if mean is not None and isinstance(self.algorithm, Streams):
                        return self.algorithm.step_along(
                            self.state, mean, trainable=self._trainable
                        )
                    return self.algorithm.step(
                        self.state, updates, round=round, trainable=self._trainable
                    )
            except TooFewUpdatesError as error:
                why = str(error).rstrip(".")
        log.warning("Round %d: %s; the model stays as it was.", round, why)
        return None

    def _drawn(self, round: int) -> Sequence[ClientId]:
        """Return the round's cohort.

        The schedule that a seed gives is kept as long as it asks nobody who takes part no more:
        privacy may have been planned by it. Otherwise the cohort is drawn among the others.
        """
        clients = self._directory.clients()
        if not clients:
            raise EmptyCohortError(
                f"Round {round}: no client is connected. Start clients, or raise the number of "
                "simulated ones."
            )
        self._wanted = self._expected = self._selector.wanted(len(clients))
        cohort = self._selector.select(clients, round=round, seed=self._seed)
        # A sample with its last ones cut off is none, and who is cut off depends on others.
        whole = self._hides or secret_sample_rate(self._selector) is not None
        if whole:
            self._wanted = len(cohort)
        if self.state.spent.isdisjoint(cohort):
            return cohort
        willing = Without(clients, self.state.spent)
        self._wanted = self._wanted_of(len(willing), round)
        cohort = self._selector.select(willing, round=round, seed=self._seed)
        if whole:
            self._wanted = len(cohort)
        return cohort

    def _wanted_of(self, count: int, round: int) -> int:
        """Return how many updates a round of that many willing clients aggregates at most.

        Raises:
            BudgetsSpentError: They are too few.
        """
        try:
            if count < self._selector.min_clients:
                raise ConfigError(f"selection.min_clients={self._selector.min_clients}")
            return self._selector.wanted(count)
        except ConfigError as error:
            raise BudgetsSpentError(
                f"Round {round}: {len(self.state.spent)} clients have no privacy budget left or "
                f"decline, and the other {count} are too few for a round ({error})"
            ) from error

    def _account(self, updates: Sequence[ClientUpdate], failures: Sequence[Failure]) -> None:
        """Remember how budgets stand, and who declines: they are not asked again."""
        told = {update.client: update.budget for update in updates if update.budget is not None}
        done = {client for client, budget in told.items() if budget.rounds_left == 0}
        refused = {f.client for f in failures if f.kind is FailureKind.REFUSED}
        if told or refused:
            self.state = replace(
                self.state,
                budgets={**self.state.budgets, **told},
                spent=self.state.spent | done | refused,
            )

    def _randomness(self, round: int) -> AbstractContextManager[None]:
        """Return a block in which an algorithm that draws at random does so from the run's seed."""
        return seeded_globals(stream_seed(self._seed, Role.ALGORITHM, round=round))

    def _withheld(self, report: RoundReport) -> RoundReport:
        """Return a report without what tells who answered, or who was asked if that is secret."""
        expected_bytes = self._expected * num_bytes(self.state.params)
        return replace(
            report,
            cohort=() if self._secret_cohort else report.cohort,
            num_updates=None,
            failures=(),
            client_accuracy={},
            uplink_bytes=expected_bytes,
            downlink_bytes=expected_bytes,
            uplink_uncompressed_bytes=expected_bytes,
        )

    def _cohort(self) -> tuple[ClientId, ...]:
        asked = [*self._asked.values(), *(failure.client for failure in self._offline)]
        return tuple(sorted(asked, key=client_order))
