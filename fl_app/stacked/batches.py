"""Which records every client of a stack trains on in every step.

Clients differ in records, so in batches: the last of an epoch is short, Poisson batches have any
size, and some clients take more steps than others. Batches are padded to the widest of the step,
with a record of the same client and weight 0, so that no client's numbers touch another's; clients
are sorted by their steps, so that those still training are always the first ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fl_app.types import Examples

Booleans: TypeAlias = npt.NDArray[np.bool_]
Integers: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What the first ``a`` clients of a stack train on in one step.

    Attributes:
        active: How many of them do; the others, the last, are done, and all their records padding.
        clients: a.
        width: b, records of the widest of their batches; >= 1.
        rows: Positions in the stack's records, int64, ``(a * b,)``.
        real: 1 for records, 0 for padding, ``(a * b,)``.
        shares: One over the records of the client's batch, 0 for padding, ``(a * b,)``.
    """

    active: int
    clients: int
    width: int
    rows: Tensor
    real: Tensor
    shares: Tensor


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The batches of a stack of clients.

    Args:
        sizes: Records of each client's batch in each step, ``(steps, clients)``; 0 past its last.
        steps: Steps of each client, descending, each >= 1.
        rows: Positions of the records of all batches, client by client, step by step.
        first: Position of each client's first record.
    """

    sizes: Integers
    steps: Integers
    rows: Integers
    first: Integers

    def batches(self, dtype: torch.dtype, device: torch.device) -> list[Batch]:
        """Return the batch of each step; masks have this type."""
        steps, clients = self.sizes.shape
        width = max(int(self.sizes.max()), 1)
        counts = self.sizes.T.reshape(-1)  # client by client, as `rows`
        starts = np.cumsum(counts) - counts
        slot = np.arange(len(self.rows)) - np.repeat(starts, counts)
        group = np.arange(steps * clients).reshape(steps, clients).T.reshape(-1)
        where = np.repeat(group * width, counts) + slot
        padded = np.repeat(np.tile(self.first, steps), width)
        padded[where] = self.rows
        real = np.zeros(len(padded))
        real[where] = 1.0
        all_rows = torch.from_numpy(padded.reshape(steps, clients, width))
        all_real = torch.from_numpy(real.reshape(steps, clients, width)).to(device, dtype)
        inverse = 1.0 / np.maximum(self.sizes, 1)
        all_shares = torch.from_numpy(real.reshape(steps, clients, width) * inverse[:, :, None])
        all_shares = all_shares.to(device, dtype)
        active = np.searchsorted(-self.steps, -np.arange(steps), side="left")
        widths = np.maximum(self.sizes.max(axis=1), 1)
        return [
            Batch(
                active=some,
                clients=a,
                width=b,
                rows=all_rows[step, :a, :b].reshape(-1),
                real=all_real[step, :a, :b].reshape(-1),
                shares=all_shares[step, :a, :b].reshape(-1),
            )
            for step, (some, b) in enumerate(zip(active.tolist(), widths.tolist(), strict=True))
            for a in (min(_rounded(some), clients),)
        ]


def _rounded(count: int) -> int:
    """Return a number with four significant bits, at most an eighth larger.

    A few clients more take no more time to ask for, and steps of fewer different shapes are
    sooner recorded (`fl_app.stacked.program`).
    """
    unit = 1 << max(0, count.bit_length() - 4)
    return -(-count // unit) * unit


def in_epochs(
    orders: Sequence[Sequence[Tensor]], firsts: Sequence[int], batch_size: int
) -> Schedule:
    """Return the schedule of clients that go through their records in epochs.

    Args:
        orders: Of each client an order of its records for each epoch; clients by descending steps.
        firsts: Position of each client's first record.
        batch_size: Records a step; the last batch of an epoch may be smaller.
    """
    lengths = np.array([len(epochs[0]) for epochs in orders])
    epochs = len(orders[0])
    per_epoch = -(-lengths // batch_size)
    step = np.arange(per_epoch.max() * epochs)[:, None]
    left = lengths - step % per_epoch * batch_size
    sizes = np.where(step < per_epoch * epochs, np.minimum(left, batch_size), 0)
    rows = torch.cat([order for client in orders for order in client]).numpy()
    first = np.array(firsts)
    return Schedule(
        sizes=sizes,
        steps=per_epoch * epochs,
        rows=rows + np.repeat(first, lengths * epochs),
        first=first,
    )


def drawn(
    coins: Booleans, counts: Sequence[int], steps: Sequence[int], firsts: Sequence[int]
) -> Schedule:
    """Return the schedule of clients whose batches were drawn by coins.

    Args:
        coins: For each client, step and record in turn, whether the record is in the batch.
        counts: Records of each client.
        steps: Steps of each client, descending.
        firsts: Position of each client's first record.
    """
    number, length, first = np.array(steps), np.array(counts), np.array(firsts)
    begins = np.cumsum(number * length) - number * length
    heads = np.flatnonzero(coins)
    client = np.searchsorted(begins, heads, side="right") - 1
    step, record = np.divmod(heads - begins[client], length[client])
    groups = np.bincount(step * len(number) + client, minlength=number[0] * len(number))
    return Schedule(
        sizes=groups.reshape(number[0], len(number)),
        steps=number,
        rows=first[client] + record,
        first=first,
    )


def pooled(parts: Sequence[Examples]) -> tuple[Examples, list[int]]:
    """Return one set of records that holds those of all clients, and where each one's begin.

    Clients whose records are views of one tensor are not copied.
    """
    inputs = _whole([part.inputs for part in parts])
    targets = _whole([part.targets for part in parts])
    if inputs is not None and targets is not None and inputs[1] == targets[1]:
        return Examples(inputs=inputs[0], targets=targets[0]), inputs[1]
    joined = Examples(
        inputs=torch.cat([part.inputs for part in parts]),
        targets=torch.cat([part.targets for part in parts]),
    )
    lengths = [part.targets.shape[0] for part in parts]
    return joined, (np.cumsum(lengths) - lengths).tolist()


def _whole(tensors: Sequence[Tensor]) -> tuple[Tensor, list[int]] | None:
    """Return the one tensor that these are rows of, and where each begins; or None."""
    base, head = tensors[0]._base, tensors[0]
    row = head[:1].numel()
    if base is None or not base.is_contiguous() or not row or base.numel() % row:
        return None
    base_rows = base.view(-1, *head.shape[1:])
    # Of a single record torch calls any stride contiguous, that of every other record too.
    start, row_bytes, stride = base.data_ptr(), row * base.element_size(), base_rows.stride(0)
    shape, dtype = head.shape[1:], base.dtype
    for t in tensors:
        alike = t._base is base and t.dtype == dtype and t.shape[1:] == shape
        if not (alike and t.is_contiguous() and t.stride(0) == stride):
            return None
    offsets = [tensor.data_ptr() - start for tensor in tensors]
    if any(offset % row_bytes for offset in offsets):
        return None
    return base_rows, [offset // row_bytes for offset in offsets]
