"""What a federated algorithm is: what clients minimise, and the step the server takes.

`Composition` puts one together from an aggregation rule, a server optimizer and a local objective;
`fl_app.flower_strategy` makes one of any strategy of Flower's. `fl_app.strategy` plays its rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fl_app.aggregation import Aggregation, RunningMean, combine, fitting, running_mean
from fl_app.codec import instruction
from fl_app.objective import LocalObjective
from fl_app.server_optimizer import OptimizerFactory, apply_change
from fl_app.types import Budget, ClientId, ClientUpdate, Params

Memory: TypeAlias = Mapping[str, Any]
"""What an algorithm remembers between rounds, as a tree (`fl_app.storage`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerState:
    """The server's side of a run between two rounds.

    Attributes:
        round: Rounds done.
        params: Global model.
        memory: What the algorithm remembers, such as an optimizer's moments; None before its
            first step.
        budgets: How the privacy budgets of clients stood when they last told.
        spent: Clients that will take part no more: without budget, or declining.
    """

    round: int
    params: Params
    memory: Memory | None = None
    budgets: Mapping[ClientId, Budget] = field(default_factory=dict)
    spent: frozenset[ClientId] = frozenset()

    def to_tree(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {
            "round": self.round,
            "params": dict(self.params),
            "memory": self.memory,
            "budgets": {client: asdict(budget) for client, budget in self.budgets.items()},
            "spent": sorted(self.spent),
        }

    @staticmethod
    def from_tree(tree: Mapping[str, Any]) -> ServerState:
        """Return what `to_tree` kept."""
        budgets = {client: Budget(**budget) for client, budget in tree["budgets"].items()}
        return ServerState(
            round=tree["round"],
            params=tree["params"],
            memory=tree["memory"],
            budgets=budgets,
            spent=frozenset(tree["spent"]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What one step of the server comes to.

    Attributes:
        params: Global model after it.
        memory: What the algorithm remembers after it.
        metrics: Figures of the cohort that the algorithm itself has computed, if any.
        epsilon: Largest privacy loss of any client after it, where the server accounts for that.
    """

    params: Params
    memory: Memory | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    epsilon: float | None = None


class Algorithm(Protocol):
    """A federated algorithm: what ``strategy=NAME`` names."""

    @property
    def name(self) -> str:
        """For the records; no effect."""
        ...

    @property
    def objective(self) -> LocalObjective:
        """What clients minimise besides their own loss."""
        ...

    def instruct(
        self,
        state: ServerState,
        clients: Sequence[ClientId],
        arrays: ArrayRecord,
        config: ConfigRecord,
        *,
        round: int,
    ) -> Mapping[ClientId, RecordDict]:
        """Return what to send to each of these clients; one that is left out is not asked.

        Args:
            state: The server's, before the round.
            clients: The cohort, in the order in which their replies are preferred.
            arrays: The global model.
            config: What our clients must be told; to be passed on.
            round: Its number, from 1.
        """
        ...

    def step(
        self,
        state: ServerState,
        updates: Sequence[ClientUpdate],
        *,
        round: int,
        trainable: frozenset[str],
    ) -> Step:
        """Return the step that a round's updates call for; the state given stays as it is.

        Args:
            state: The server's, before the round.
            updates: Validated, in canonical client order; at least one, unless the algorithm
                hides clients.
            round: Its number, from 1.
            trainable: Names in the model that gradients change; the rest are buffers.

        Raises:
            TooFewUpdatesError: The algorithm needs more; the round keeps the old model.
        """
        ...


@runtime_checkable
class Streams(Protocol):
    """An algorithm that may take the updates of a round in parts."""

    def running(self) -> RunningMean | None:
        """Return what takes them; None if this one wants all of them at once."""
        ...

    def step_along(
        self, state: ServerState, mean: RunningMean, *, trainable: frozenset[str]
    ) -> Step:
        """Return the step that their mean calls for; otherwise as `Algorithm.step`."""
        ...


def make_running(algorithm: Algorithm) -> RunningMean | None:
    """Return what takes a round's updates in parts; None if all are wanted at once.

    So they are where nothing may show who took part in a round.
    """
    if hides_clients(algorithm) or not isinstance(algorithm, Streams):
        return None
    return algorithm.running()


def hides_clients(algorithm: Algorithm) -> bool:
    """Return whether nothing of a round may show who took part in it, or whether anybody did.

    An algorithm says so by a ``hides_clients`` of its own. Its rounds wait for all replies and
    take a step with however few, and what depends on replies is not reported.
    """
    return bool(getattr(algorithm, "hides_clients", False))


@dataclass(frozen=True, kw_only=True)
class Composition:
    """An aggregation rule, a server optimizer and a local objective.

    Attributes:
        aggregation: Combines the updates of a cohort.
        server_optimizer: Steps the global model along the combined change.
        objective: What clients minimise besides their own loss.
        name: For the records; no effect.
    """

    aggregation: Aggregation
    server_optimizer: OptimizerFactory
    objective: LocalObjective
    name: str

    def instruct(
        self,
        state: ServerState,
        clients: Sequence[ClientId],
        arrays: ArrayRecord,
        config: ConfigRecord,
        *,
        round: int,
    ) -> Mapping[ClientId, RecordDict]:
        """Return the same for each client: the model and the configuration."""
        return dict.fromkeys(clients, instruction(arrays, config, round=round))

    def step(
        self,
        state: ServerState,
        updates: Sequence[ClientUpdate],
        *,
        round: int,
        trainable: frozenset[str],
    ) -> Step:
        """Combine the updates, and step the global model along what comes of it."""
        return self._along(state, combine(self.aggregation, updates, state.params), trainable)

    def running(self) -> RunningMean | None:
        """Return what takes updates in parts, if the aggregation rule is a mean."""
        return running_mean(self.aggregation)

    def step_along(
        self, state: ServerState, mean: RunningMean, *, trainable: frozenset[str]
    ) -> Step:
        """Step the global model along the mean of updates that came in parts."""
        return self._along(state, fitting(mean.rule, mean.change(), state.params), trainable)

    def _along(self, state: ServerState, change: Params, trainable: frozenset[str]) -> Step:
        params, memory = apply_change(
            state.params,
            change,
            trainable=trainable,
            make_optimizer=self.server_optimizer,
            state=state.memory,
        )
        return Step(params=params, memory=memory)
