"""Lazy clients: a population of any size costs nothing until one of it is asked for."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fl_app.tasks.classification import losses, metrics
from fl_app.tasks.digits import Digits
from fl_app.tasks.federated import ClientRange
from fl_app.tasks.models import Mlp
from fl_app.tasks.partition import Generated, Iid
from fl_app.types import ClientExamples, ConfigError, Examples, client_order

DIGITS = Digits(model=Mlp())


@dataclass(frozen=True, kw_only=True)
class Made:
    """A task that generates its clients, and counts how often it is asked to."""

    asked: list[str]
    name: str = "made"

    def build_model(self) -> nn.Module:
        return nn.Linear(1, 2)

    losses = staticmethod(losses)
    metrics = staticmethod(metrics)

    def generate(self, client: str, seed: int) -> ClientExamples:
        self.asked.append(client)
        inputs = torch.tensor([[float(client)], [float(seed)]])
        return ClientExamples(train=Examples(inputs=inputs, targets=torch.tensor([0, 1])))

    def held_out(self, seed: int) -> Examples | None:
        self.asked.append("held out")


def test_ten_million_clients_cost_nothing_until_they_are_asked_for():
    task = Made(asked=[])
    start = time.perf_counter()
    data = Generated(num_clients=10**7)(task, 3)
    assert len(data.clients) == 10**7
    assert data.clients[-1] == "9999999"
    assert "9999999" in data.clients
    assert time.perf_counter() - start < 0.5
    assert task.asked == []
    assert data.examples_of("123456").train.inputs[:, 0].tolist() == [123456, 3]
    assert task.asked == ["123456"]


def test_only_the_clients_used_last_are_kept():
    task = Made(asked=[])
    data = Generated(num_clients=10, cache_clients=2)(task, 0)
    for client in ("1", "2", "1", "3", "1", "2"):
        data.examples_of(client)
    assert task.asked == ["1", "2", "3", "2"]


def test_the_held_out_records_are_made_once():
    task = Made(asked=[])
    data = Generated(num_clients=10)(task, 0)
    assert data.held_out is data.held_out
    assert task.asked == ["held out"]


@given(st.integers(1, 50), st.data())
@settings(max_examples=40, deadline=None)
def test_a_lazy_range_of_clients_is_the_list_of_them(length, data):
    clients, listed = ClientRange(length), [str(number) for number in range(length)]
    assert list(clients) == listed == sorted(listed, key=client_order)
    index = data.draw(st.integers(-length, length - 1))
    assert clients[index] == listed[index]
    cut = data.draw(st.slices(length))
    assert list(clients[cut]) == listed[cut]
    for name in (*listed, str(length), "-1", "01", " 1", "x", "", "٣", 1):
        assert (name in clients) == (name in listed)


def test_pooled_and_generated_tasks_are_told_apart():
    with pytest.raises(ConfigError, match="use partition=generated"):
        Iid(num_clients=2)(Made(asked=[]), 0)
    with pytest.raises(ConfigError, match="use partition=iid"):
        Generated(num_clients=2)(DIGITS, 0)


@pytest.mark.parametrize(
    ("partition", "task"),
    [(Iid(num_clients=4), DIGITS), (Generated(num_clients=4), Made(asked=[]))],
    ids=["iid", "generated"],
)
def test_an_unknown_client_is_named(partition, task):
    with pytest.raises(ConfigError, match="client '4' is none of the 4 clients"):
        partition(task, 0).examples_of("4")
