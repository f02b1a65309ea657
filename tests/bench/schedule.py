"""Who trains in a round and in which order: what ours draws, for loops that are to do the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from workloads import SEED, Workload

from fl_app.selection import Uniform
from fl_app.tasks.federated import ClientRange
from fl_app.types import Role, client_order, stream, stream_seed


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A client's part in a round.

    Attributes:
        client: Its id.
        batches: Numbers of the client's records in each of its batches.
    """

    client: str
    batches: tuple[Tensor, ...]


def cohort_of(workload: Workload, round: int) -> list[str]:
    """Return the clients of a round in canonical order."""
    selector = Uniform(count=workload.cohort)
    clients = selector.select(ClientRange(workload.clients), round=round, seed=SEED)
    return sorted(clients, key=client_order)


def turns_of(workload: Workload, round: int) -> list[Turn]:
    """Return the cohort of a round in canonical order, each client with its batches."""
    turns = []
    for client in cohort_of(workload, round):
        generator = stream(SEED, Role.BATCHES, round=round, client=client)
        order = torch.randperm(workload.size_of(client), generator=generator)
        turns.append(Turn(client=client, batches=torch.split(order, workload.batch)))
    return turns


def seed_model() -> None:
    """Set torch's global generator to where ours draws the first model from."""
    torch.manual_seed(stream_seed(SEED, Role.MODEL))
