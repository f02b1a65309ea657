"""The frozen types that cross module borders, and the streams of randomness they are drawn with.

Nothing here knows Flower, Hydra or a file format. Every other module may import this one;
it imports none of them.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fl_app.errors import ConfigError as ConfigError
from fl_app.errors import EmptyCohortError as EmptyCohortError
from fl_app.errors import FlAppError as FlAppError
from fl_app.errors import InterruptedRunError as InterruptedRunError
from fl_app.errors import TooFewUpdatesError as TooFewUpdatesError

ClientId: TypeAlias = str
"""Stable name of a client: its partition number in a simulation, its site's name in a deployment.

Never Flower's node id, which is drawn anew whenever a node connects.
"""

Params: TypeAlias = Mapping[str, Tensor]
"""Name -> tensor: the floating-point entries of a module's ``state_dict``, or a change of them."""


class Role(StrEnum):
    """What a stream of randomness is for. Streams of different roles never share a seed."""

    MODEL = "model"
    PARTITION = "partition"
    SPLIT = "split"
    COHORT = "cohort"
    BATCHES = "batches"
    LAYERS = "layers"
    FAULTS = "faults"
    HOSTILE = "hostile"
    FAIRNESS = "fairness"
    ALGORITHM = "algorithm"


def stream_seed(seed: int, role: Role, *, round: int = 0, client: ClientId = "") -> int:
    """Return the 63-bit seed of the stream for ``(seed, role, round, client)``.

    Seeds of different streams are unrelated (SHA-256), so neither the order in which clients are
    trained nor the process that trains them can change what a client draws. For plain training
    only: what a privacy guarantee rests on must not be derivable from a seed that others know.
    """
    digest = hashlib.sha256(f"{seed}/{role}/{round}/{client}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def stream(seed: int, role: Role, *, round: int = 0, client: ClientId = "") -> torch.Generator:
    """Return a fresh CPU generator at the start of the stream ``(seed, role, round, client)``."""
    return torch.Generator().manual_seed(stream_seed(seed, role, round=round, client=client))


@contextmanager
def seeded_globals(seed: int) -> Generator[None, None, None]:
    """Set Python's, NumPy's and torch's global CPU generators for the block, and put them back.

    For code that draws from them and is not ours, such as Flower's strategies.
    """
    python, numpy = random.getstate(), np.random.get_state()
    # By the generator itself: torch.manual_seed and fork_rng visit every kind of accelerator.
    ours = torch.default_generator.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.default_generator.set_state(ours)


def client_order(client: ClientId) -> tuple[int, str]:
    """Return the key that sorts client ids: shorter first, then by character, so "2" < "10"."""
    return len(client), client


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """Records of one data set or a part of it.

    Attributes:
        inputs: Float tensor of shape ``(n, *features)``.
        targets: One target a record, shape ``(n,)``; int64 class numbers for classification.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: Tensor) -> Examples:
        """Return the records at ``indices`` (int64, shape ``(k,)``), in that order."""
        # index_select gives what indexing gives, in half the time.
        return Examples(
            inputs=self.inputs.index_select(0, indices),
            targets=self.targets.index_select(0, indices),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientExamples:
    """What one client owns, split once and for all.

    Attributes:
        train: Records it trains on; never empty.
        validation: Records its early stopping watches, or None.
        test: Its own held-out part, on which the received global model is measured, or None.
    """

    train: Examples
    validation: Examples | None = None
    test: Examples | None = None


class FederatedData(Protocol):
    """Who the clients are, and what each of them owns."""

    @property
    def clients(self) -> Sequence[ClientId]:
        """All client ids in canonical order (`client_order`); may be lazy, so of any length."""
        ...

    @property
    def held_out(self) -> Examples | None:
        """Records of no client, for the server to measure the global model on, or None."""
        ...

    def examples_of(self, client: ClientId) -> ClientExamples:
        """Return what ``client`` owns; the same records whenever and wherever it is called."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """One model measured on one set of records.

    Attributes:
        num_examples: Records measured on, > 0.
        metrics: Name -> value; a metric that is undefined on these records is absent.
    """

    num_examples: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainInstruction:
    """What the server asks of one client in one round.

    Attributes:
        round: Round number, from 1.
        params: The global model.
        run: Name of the run, the same after a resume; what clients remember is kept by it.
        deadline_s: Seconds the client has, or None for no limit.
        run_dir: Folder of the run, told to simulated clients only.
        max_norm: L2 bound on updates that a private server asks for in this round, > 0, or None.
    """

    round: int
    params: Params
    run: str = ""
    deadline_s: float | None = None
    run_dir: str | None = None
    max_norm: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """How a client's privacy budget stands after a round has been paid for.

    Attributes:
        epsilon_spent: Over all that the client's ledger holds, at ``delta``.
        epsilon: Limit, or None if there is none.
        delta: The owner's delta.
        rounds_left: Further rounds like the one paid for; None without a limit.
    """

    epsilon_spent: float
    epsilon: float | None
    delta: float
    rounds_left: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientUpdate:
    """What one client sends back after one round.

    Attributes:
        client: Sender.
        round: Round it answers.
        delta: Local minus global parameters; names and shapes of the model.
        num_examples: Records trained on, > 0; its weight in a weighted mean.
        metrics: Figures of the local training, such as the mean loss.
        evaluation: The *received* model on the client's own held-out part, or None.
        num_bytes: Size of ``delta`` as it was sent; ``num_bytes_uncompressed`` as float tensors.
        budget: How the client's privacy budget stands, if there is one and it may be told.
    """

    client: ClientId
    round: int
    delta: Params
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    num_bytes: int = 0
    num_bytes_uncompressed: int = 0
    budget: Budget | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientDescription:
    """What a client is willing to tell about itself.

    Attributes:
        client: Its stable id.
        num_examples: Records it would train on, or None if it does not tell.
        label_counts: Records of each class, or None if its configuration does not allow that.
    """

    client: ClientId
    num_examples: int | None
    label_counts: tuple[int, ...] | None = None


class PrivacyUnit(StrEnum):
    """Whose presence a guarantee hides; NONE if there is no guarantee."""

    NONE = "none"
    RECORD = "record"
    CLIENT = "client"


class FailureKind(StrEnum):
    """Why a client that was asked brought nothing to the round."""

    OFFLINE = "offline"
    TIMEOUT = "timeout"
    ERROR = "error"
    REJECTED = "rejected"
    REFUSED = "refused"


class StopReason(StrEnum):
    """Why a run ended: rounds done, target reached, no progress, no time, or no privacy budget."""

    ROUNDS = "rounds"
    TARGET = "target"
    PLATEAU = "plateau"
    TIME = "time"
    BUDGET = "budget"


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """One client that was asked and brought nothing to the round; ``reason`` is one line."""

    client: ClientId
    kind: FailureKind
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundReport:
    """What happened in one round: one line of ``rounds.jsonl``.

    Under client-level privacy what depends on who answered, or on what, is withheld: there is no
    ``num_updates``, no failure, no figure of a client; bytes are those of the expected cohort. So
    is the cohort where secret coins drew it.

    Attributes:
        round: Round number, from 1.
        cohort: Clients asked, in canonical order; empty if that is withheld.
        num_updates: Updates that entered the aggregate; None if that is withheld.
        applied: False if too few updates came back and the old model was kept.
        failures: Clients asked that brought nothing.
        metrics: The new global model on the held-out set; empty in rounds that skip it.
        client_metrics: Mean over the cohort, weighted by examples: ``train_*`` of the local
            training, ``test_*`` of the received model on the clients' own held-out parts.
        client_accuracy: Client -> accuracy of the received model on its own held-out part.
        epsilon: Largest privacy loss a client has spent so far; None without privacy.
        epsilon_budget: That client's limit, or None if it has none.
        uplink_bytes, downlink_bytes, uplink_uncompressed_bytes: Model bytes moved in this round.
        seconds: Wall-clock seconds of the round; the one entry that a rerun does not repeat.
    """

    round: int
    cohort: tuple[ClientId, ...]
    num_updates: int | None
    applied: bool
    failures: tuple[Failure, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    client_metrics: Mapping[str, float] = field(default_factory=dict)
    client_accuracy: Mapping[ClientId, float] = field(default_factory=dict)
    epsilon: float | None = None
    epsilon_budget: float | None = None
    uplink_bytes: int = 0
    downlink_bytes: int = 0
    uplink_uncompressed_bytes: int = 0
    seconds: float = 0.0
