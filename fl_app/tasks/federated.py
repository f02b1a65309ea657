"""Federated data of a simulation: what each client owns, made when it is first asked for."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import overload

import torch
from torch import Tensor

from fl_app.tasks.base import GeneratedTask, PooledExamples
from fl_app.types import (
    ClientExamples,
    ClientId,
    ConfigError,
    Examples,
    Role,
    client_order,
    stream,
)


class ClientRange(Sequence[ClientId]):
    """The client ids "0", "1", ..., of any length in no memory.

    Args:
        length: Number of clients.
    """

    def __init__(self, length: int) -> None:
        self._numbers = range(length)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> ClientId: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ClientId]: ...
    def __getitem__(self, index: int | slice) -> ClientId | Sequence[ClientId]:
        if isinstance(index, slice):
            return [str(number) for number in self._numbers[index]]
        return str(self._numbers[index])

    def __contains__(self, client: object) -> bool:
        return isinstance(client, str) and self.position(client) is not None

    def position(self, client: ClientId) -> int | None:
        """Return where a client is, or None if there is none of that name."""
        number = int(client) if client.isdecimal() else -1
        known = number in self._numbers and str(number) == client
        return number if known else None

    def __repr__(self) -> str:
        return f"ClientRange({len(self)})"


class PartitionedData:
    """Records in one place, and which of them each client owns; satisfies `FederatedData`.

    Args:
        pooled: The records.
        owned: Client -> numbers of its training records, int64, shape ``(k,)`` with k >= 1.
        seed: Seed of the clients' own splits.
        test_fraction: Share of its records that each client keeps for its own test, rounded down.
        validation_fraction: Share that it keeps for its early stopping, rounded down.
    """

    def __init__(
        self,
        *,
        pooled: PooledExamples,
        owned: Mapping[ClientId, Tensor],
        seed: int,
        test_fraction: float,
        validation_fraction: float,
    ) -> None:
        self._pooled = pooled
        self._owned = {client: owned[client] for client in sorted(owned, key=client_order)}
        self._clients = tuple(self._owned)
        self._seed = seed
        self._test_fraction = test_fraction
        self._validation_fraction = validation_fraction
        self._made: dict[ClientId, ClientExamples] = {}

    @property
    def clients(self) -> Sequence[ClientId]:
        """All client ids in canonical order."""
        return self._clients

    @property
    def held_out(self) -> Examples | None:
        """Records of no client, for the server, or None."""
        return self._pooled.held_out

    def examples_of(self, client: ClientId) -> ClientExamples:
        """Return what ``client`` owns; split and copied at the first call, then kept.

        A client with too few records for a share of them to be a whole record has None there,
        and at least one record to train on. Each part keeps the order of the records.

        Raises:
            ConfigError: There is no such client.
        """
        if client not in self._made:
            if client not in self._owned:
                raise _unknown(client, self._clients)
            self._made[client] = self._split(client)
        return self._made[client]

    def _split(self, client: ClientId) -> ClientExamples:
        owned = self._owned[client]
        num_test = _whole(len(owned), self._test_fraction)
        num_validation = _whole(len(owned), self._validation_fraction)
        drawn = torch.randperm(len(owned), generator=stream(self._seed, Role.SPLIT, client=client))
        test, validation, train = (
            self._pooled.train.take(owned[part.sort().values])
            for part in drawn.tensor_split([num_test, num_test + num_validation])
        )
        return ClientExamples(
            train=train,
            validation=validation if num_validation else None,
            test=test if num_test else None,
        )


class GeneratedData:
    """Clients whose records a task makes when they are asked for; satisfies `FederatedData`.

    Args:
        task: Makes the records.
        seed: Seed it makes them with.
        clients: All client ids in canonical order.
        cache_clients: Clients whose records are kept, those used last.
    """

    def __init__(
        self,
        *,
        task: GeneratedTask,
        seed: int,
        clients: Sequence[ClientId],
        cache_clients: int,
    ) -> None:
        self._clients = clients
        self._held_out = functools.cache(lambda: task.held_out(seed))
        self._made = functools.lru_cache(cache_clients)(lambda client: task.generate(client, seed))

    @property
    def clients(self) -> Sequence[ClientId]:
        """All client ids in canonical order."""
        return self._clients

    @property
    def held_out(self) -> Examples | None:
        """Records of no client, for the server, or None; made at the first call, then kept."""
        return self._held_out()

    def examples_of(self, client: ClientId) -> ClientExamples:
        """Return what ``client`` owns.

        Raises:
            ConfigError: There is no such client.
        """
        if client not in self._clients:
            raise _unknown(client, self._clients)
        return self._made(client)


def _whole(num_records: int, fraction: float) -> int:
    """Return the whole records in a share: floor, but of 0.29 * 100 it is 29, not 28."""
    return int(num_records * fraction + 1e-9)


def _unknown(client: ClientId, clients: Sequence[ClientId]) -> ConfigError:
    return ConfigError(
        f"client {client!r} is none of the {len(clients)} clients of this partition, "
        f"{clients[0]!r} to {clients[-1]!r}: ask for one of these, or change partition."
    )
