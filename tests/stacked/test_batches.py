"""Ragged batches: every record where its client's batch has it, and padding of the same client."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fl_app.stacked.batches import Batch, Schedule, drawn, in_epochs, pooled
from fl_app.types import Examples

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def batches(schedule: Schedule) -> list[Batch]:
    return schedule.batches(torch.float64, torch.device("cpu"))


def agree(schedule: Schedule, expected: Sequence[Sequence[Sequence[int]]]) -> bool:
    """Check a schedule against the records of each client and step, and its padding.

    Args:
        schedule: What is checked.
        expected: Client -> step -> positions.
    """
    steps = batches(schedule)
    assert len(steps) == max(len(client) for client in expected)
    for number, batch in enumerate(steps):
        active = [client[number] for client in expected if number < len(client)]
        assert batch.active == len(active)
        assert len(active) <= batch.clients <= min(len(expected), 1.15 * len(active) + 1)
        assert batch.width == max(1, *(len(rows) for rows in active))
        table = batch.rows.view(batch.clients, batch.width)
        real = batch.real.view(batch.clients, batch.width)
        shares = batch.shares.view(batch.clients, batch.width)
        assert not real[len(active) :].any() and not shares[len(active) :].any()
        for client, rows in enumerate(active):
            assert table[client, : len(rows)].tolist() == list(rows)
            assert real[client].tolist() == [1.0] * len(rows) + [0.0] * (batch.width - len(rows))
            expected_shares = real[client] / max(1, len(rows))
            assert shares[client].tolist() == expected_shares.tolist()
            padding = table[client, len(rows) :].tolist()
            assert all(row == schedule.first[client] for row in padding)
    return True


@given(SIZES, st.integers(1, 16), st.integers(1, 3), st.integers(0, 99))
def test_epochs_are_split_as_torch_splits_them(sizes, batch_size, epochs, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = sorted(sizes, reverse=True)
    firsts = torch.randperm(len(sizes), generator=generator).mul(100).tolist()
    orders = [[torch.randperm(size, generator=generator) for _ in range(epochs)] for size in sizes]
    expected = [
        [(part + first).tolist() for order in client for part in order.split(batch_size)]
        for client, first in zip(orders, firsts, strict=True)
    ]
    assert agree(in_epochs(orders, firsts, batch_size), expected)


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 5)), min_size=1, max_size=8),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    st.integers(0, 99),
)
def test_drawn_batches_hold_the_records_whose_coins_show_heads(clients, heads, seed) -> None:
    clients = sorted(clients, key=lambda client: -client[1])
    rng = np.random.default_rng(seed)
    tosses = [rng.random((steps, count)) < heads for count, steps in clients]
    firsts = [1000 * k for k in range(len(clients))]
    expected = [
        [(np.flatnonzero(step) + first).tolist() for step in client]
        for client, first in zip(tosses, firsts, strict=True)
    ]
    coins = np.concatenate([client.reshape(-1) for client in tosses])
    counts, steps = zip(*clients, strict=True)
    assert agree(drawn(coins, counts, steps, firsts), expected)


# Records of several clients in one place ----------------------------------------------------------

INPUTS = torch.arange(60.0).view(20, 3)
TARGETS = torch.arange(20)


def together(parts: Sequence[Examples]) -> bool:
    """Return whether pooled records are, at their clients' positions, these clients' records."""
    whole, firsts = pooled(parts)
    assert len(whole.inputs) == len(whole.targets)
    for part, first in zip(parts, firsts, strict=True):
        assert torch.equal(whole.inputs[first : first + len(part)], part.inputs)
        assert torch.equal(whole.targets[first : first + len(part)], part.targets)
    return True


def part(rows: slice | list[int]) -> Examples:
    return Examples(inputs=INPUTS[rows], targets=TARGETS[rows])


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(1, 9)), min_size=1, max_size=5))
def test_slices_of_one_tensor_are_not_copied(ranges) -> None:
    parts = [part(slice(first, first + length)) for first, length in ranges]
    assert together(parts)
    whole, _ = pooled(parts)
    assert whole.inputs.untyped_storage().data_ptr() == INPUTS.untyped_storage().data_ptr()


@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 9), st.integers(1, 3)), min_size=1))
def test_clients_dealt_every_so_many_records_have_their_own(step, dealt) -> None:
    """Also after one that was dealt a single record, whose stride nothing shows."""
    parts = [part(slice(first, first + step * count, step)) for first, count in dealt]
    assert together(parts)
    assert together([part(slice(0, 1, step)), *parts])


def made(inputs: Tensor, first: int, last: int) -> Examples:
    return Examples(inputs=inputs[first:last], targets=TARGETS[first:last])


TURNED, COLUMNS, EMPTY = INPUTS.view(3, 20).T, INPUTS[:, 1:], torch.empty(20, 0)
SHIFTED = INPUTS.view(-1)[1:58].view(19, 3)
APART = [Examples(inputs=INPUTS[:4], targets=TARGETS[4:8]), part(slice(4, 6))]
EXPANDED = [
    Examples(inputs=INPUTS[k : k + 1].expand(n, 3), targets=TARGETS[:n])
    for k, n in ((0, 1), (2, 4))
]


@pytest.mark.parametrize(
    "parts",
    [
        [part([3, 1]), part([5]), part([0, 19, 2])],
        [part(slice(2, 4)), part([0])],
        *(APART, EXPANDED, [made(SHIFTED, 0, 2), part(slice(2, 4))]),
        *([made(tensor, 0, 1), made(tensor, 4, 9)] for tensor in (TURNED, COLUMNS, EMPTY)),
    ],
    ids=["copies", "view and copy", "apart", "expanded", "shifted", "turned", "columns", "empty"],
)
def test_records_that_do_not_lie_in_one_tensor_row_by_row_are_put_together(parts) -> None:
    assert together(parts)
