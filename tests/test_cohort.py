"""Clients trained side by side come out as if each had been trained by itself."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from side_by_side import (
    RAGGED,
    SGD,
    cohort,
    equal,
    farthest,
    one_by_one,
    plain,
    trainer_of,
)
from torch import Tensor, nn
from zoo import (
    ALL,
    CLASSES,
    MLP,
    WITH_RULES,
    Zoo,
    words,
)

from fl_app.objective import LocalObjective, OwnLoss, Proximal
from fl_app.training import ClientTimeoutError, LocalTraining, TrainedModel
from fl_app.types import Examples

# Of torch, where vmap loops over attention.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

ROUNDING = 1e-11
TWO_EPOCHS = LocalTraining(optimizer=SGD, batch_size=5, epochs=2)
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": SGD,
    "decay": partial(torch.optim.SGD, lr=0.1, weight_decay=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "dampening": partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.5),
    "maximize": partial(torch.optim.SGD, lr=0.1, maximize=True),
    "adam": partial(torch.optim.Adam, lr=0.01),
    "amsgrad": partial(torch.optim.Adam, lr=0.01, amsgrad=True, weight_decay=0.1),
    "fused adam": partial(torch.optim.Adam, lr=0.01, fused=True),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1, lr_decay=0.1),
    "adadelta": partial(torch.optim.Adadelta, lr=1.0),
    "adamax": partial(torch.optim.Adamax, lr=0.01),
    "nadam": partial(torch.optim.NAdam, lr=0.01),
    "radam": partial(torch.optim.RAdam, lr=0.01),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
    "rprop": partial(torch.optim.Rprop, lr=0.01),
}
EVERY_OPTIMIZER = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
EVERY_MODEL = pytest.mark.parametrize("task", ALL.values(), ids=ALL)


def same_losses(first: Sequence[TrainedModel], second: Sequence[TrainedModel]) -> bool:
    # One by one they are added up in single precision.
    return all(
        one.metrics["epochs"] == other.metrics["epochs"]
        and one.metrics["loss"] == pytest.approx(other.metrics["loss"], rel=1e-6)
        for one, other in zip(first, second, strict=True)
    )


def same_trees(first: Any, second: Any) -> bool:
    """Return whether two optimizers remember the same, to rounding."""
    if isinstance(second, Tensor):
        assert first.shape == second.shape and first.dtype == second.dtype
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)
        return True
    if isinstance(second, dict):
        assert first.keys() == second.keys()
        return all(same_trees(first[key], second[key]) for key in second)
    if isinstance(second, list | tuple):
        return all(map(same_trees, first, second))
    return bool(first == second)


# Equal to one by one ------------------------------------------------------------------------------


@EVERY_MODEL
def test_a_cohort_is_its_clients_one_by_one_for_every_layer(task: Zoo) -> None:
    clients = plain(task, RAGGED)
    together, alone = (train(task, TWO_EPOCHS, clients) for train in (cohort, one_by_one))
    assert farthest(together, alone) < ROUNDING
    assert same_losses(together, alone)
    # Only if clients differ, and have moved, does that say anything.
    assert farthest(together[:1], alone[1:2]) > 1e-3


@pytest.mark.parametrize("name", ["linear", "conv and pool", "layer norm", "attention"])
def test_a_cohort_is_its_clients_one_by_one_in_single_precision(name: str) -> None:
    task = replace(ALL[name], dtype=torch.float32)
    clients = plain(task, RAGGED)
    together, alone = (train(task, TWO_EPOCHS, clients) for train in (cohort, one_by_one))
    assert farthest(together, alone) < 2e-5


@EVERY_OPTIMIZER
@pytest.mark.parametrize("objective", [OwnLoss(), Proximal(mu=0.5)], ids=["own", "proximal"])
def test_a_cohort_is_its_clients_one_by_one_for_every_optimizer(
    optimizer: Callable[..., Any], objective: LocalObjective
) -> None:
    training = LocalTraining(optimizer=optimizer, batch_size=4, epochs=3, keep_optimizer_state=True)
    clients = plain(MLP, RAGGED)
    together, alone = (
        train(MLP, training, clients, objective=objective) for train in (cohort, one_by_one)
    )
    assert farthest(together, alone) < ROUNDING
    for one, other in zip(together, alone, strict=True):
        assert same_trees(one.optimizer_state, other.optimizer_state)


def test_what_the_loss_does_not_reach_is_pulled_and_decayed_as_one_by_one() -> None:
    task = WITH_RULES["parts without a gradient"]
    training = LocalTraining(optimizer=OPTIMIZERS["momentum"], batch_size=4, epochs=2)
    clients = plain(task, RAGGED)
    together, alone = (
        train(task, training, clients, objective=Proximal(mu=0.5)) for train in (cohort, one_by_one)
    )
    assert farthest(together, alone) < ROUNDING
    assert not any(bool(model.delta["0.unused.weight"].any()) for model in together)


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    batch_size=st.integers(1, 16),
    epochs=st.integers(1, 3),
    side_by_side=st.integers(1, 10),
    optimizer=st.sampled_from(["sgd", "momentum", "adam", "adagrad"]),
    objective=st.sampled_from([OwnLoss(), Proximal(mu=0.3)]),
)
def test_and_for_any_sizes_of_clients_batches_and_chunks(
    sizes, batch_size, epochs, side_by_side, optimizer, objective
) -> None:
    training = LocalTraining(
        optimizer=OPTIMIZERS[optimizer],
        batch_size=batch_size,
        epochs=epochs,
        keep_optimizer_state=True,
    )
    clients = plain(MLP, sizes)
    together = cohort(
        *(MLP, training, clients),
        objective=objective,
        side_by_side=side_by_side,
    )
    alone = one_by_one(MLP, training, clients, objective=objective)
    assert farthest(together, alone) < ROUNDING
    assert same_losses(together, alone)
    if optimizer != "sgd":  # ours remembers nothing, torch's empty groups
        for one, other in zip(together, alone, strict=True):
            assert same_trees(one.optimizer_state, other.optimizer_state)


@settings(max_examples=10)
@given(st.sampled_from(sorted(ALL)), st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_and_for_any_layer_and_sizes(name, sizes) -> None:
    task = ALL[name]
    training = LocalTraining(optimizer=OPTIMIZERS["momentum"], batch_size=4, epochs=1)
    clients = plain(task, sizes)
    alone = one_by_one(task, training, clients)
    assert farthest(cohort(task, training, clients), alone) < ROUNDING


@EVERY_OPTIMIZER
def test_what_optimizers_remember_goes_on_over_rounds_that_clients_take_part_in_unequally(
    optimizer: Callable[..., Any],
) -> None:
    """Bias corrections count steps: of each client by itself, also where it skips a round."""
    training = LocalTraining(optimizer=optimizer, batch_size=4, epochs=1, keep_optimizer_state=True)
    rounds = [[0, 1, 2], [0, 2, 3], [0, 1, 2, 3, 4], [4, 1, 0]]
    memories: dict[str, dict[int, Any]] = {"together": {}, "alone": {}}
    for number, present in enumerate(rounds, start=1):
        every = plain(MLP, [9, 9, 5, 12, 3], round=number)
        results = {}
        for name, train in (("together", cohort), ("alone", one_by_one)):
            memory = memories[name]
            chosen = [replace(every[k], optimizer_state=memory.get(k)) for k in present]
            results[name] = train(MLP, training, chosen)
            memory |= {
                k: model.optimizer_state for k, model in zip(present, results[name], strict=True)
            }
        assert farthest(results["together"], results["alone"]) < 1e-9
    for k, state in memories["alone"].items():
        if state.get("state") and memories["together"][k]:
            assert same_trees(memories["together"][k], state)


def test_what_one_client_remembers_is_not_changed_by_the_next_round() -> None:
    training = LocalTraining(
        optimizer=OPTIMIZERS["adam"], batch_size=4, epochs=1, keep_optimizer_state=True
    )
    clients = plain(MLP, [9, 9])
    first = cohort(MLP, training, clients)
    before = [
        {name: value.clone() for name, value in model.optimizer_state["state"][0].items()}
        for model in first
    ]
    again = [
        replace(client, optimizer_state=model.optimizer_state)
        for client, model in zip(clients, first, strict=True)
    ]
    cohort(MLP, training, again)
    for model, kept in zip(first, before, strict=True):
        assert all(torch.equal(model.optimizer_state["state"][0][n], kept[n]) for n in kept)


def test_nothing_is_remembered_unless_it_is_to_be() -> None:
    training = LocalTraining(optimizer=OPTIMIZERS["adam"], batch_size=4, epochs=1)
    assert [m.optimizer_state for m in cohort(MLP, training, plain(MLP, [3, 4]))] == [{}, {}]


def test_the_received_parameters_are_left_as_they_are_and_frozen_ones_do_not_move() -> None:
    task = ALL["frozen parts and buffers"]
    received = task.initial()
    copy = {name: tensor.clone() for name, tensor in received.items()}
    models = cohort(task, TWO_EPOCHS, plain(task, RAGGED), received=received)
    assert equal(received, copy)
    still = {"0.still.weight", "0.still.bias", "0.mixed.bias", "0.scale"}
    for model in models:
        assert {name for name in model.delta if not bool(model.delta[name].any())} == still
        assert model.delta.keys() == received.keys()


def test_the_same_cohort_gives_the_same_bits_whatever_was_trained_before() -> None:
    clients, other = plain(MLP, RAGGED), plain(MLP, [3, 30], round=7)
    expected = cohort(MLP, TWO_EPOCHS, clients)
    cohort(MLP, TWO_EPOCHS, other, received=MLP.initial(9))
    again = cohort(MLP, TWO_EPOCHS, clients)
    assert all(equal(a.delta, b.delta) for a, b in zip(expected, again, strict=True))


# Nobody else's numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, task in ALL.items() if task.records is not words])
def test_a_client_whose_records_are_not_finite_changes_no_other_to_the_bit(name: str) -> None:
    task = ALL[name]
    healthy = plain(task, RAGGED)
    sick = list(healthy)
    for k, value in ((1, float("nan")), (3, float("inf"))):
        inputs = healthy[k].examples.inputs.clone()
        inputs[0] = value
        spoilt = Examples(inputs=inputs, targets=healthy[k].examples.targets)
        sick[k] = replace(healthy[k], examples=spoilt)
    models, expected = (cohort(task, TWO_EPOCHS, clients) for clients in (sick, healthy))
    for k in (0, 2, 4):
        assert equal(models[k].delta, expected[k].delta)
        assert models[k].metrics == expected[k].metrics
    assert not all(bool(tensor.isfinite().all()) for tensor in models[1].delta.values())


def test_a_client_whose_weights_run_away_changes_no_other_to_the_bit() -> None:
    """By a memory of infinite momentum, which is its own."""
    training = LocalTraining(
        optimizer=OPTIMIZERS["momentum"], batch_size=4, epochs=2, keep_optimizer_state=True
    )
    clients = plain(MLP, [9, 9, 9])
    healthy = [
        replace(client, optimizer_state=model.optimizer_state)
        for client, model in zip(clients, cohort(MLP, training, clients), strict=True)
    ]
    state = dict(healthy[1].optimizer_state or {})
    state["state"] = {
        number: {"momentum_buffer": torch.full_like(entry["momentum_buffer"], float("inf"))}
        for number, entry in state["state"].items()
    }
    sick = [healthy[0], replace(healthy[1], optimizer_state=state), healthy[2]]
    models, expected = (cohort(MLP, training, group) for group in (sick, healthy))
    assert equal(models[0].delta, expected[0].delta)
    assert equal(models[2].delta, expected[2].delta)
    assert not bool(models[1].delta["0.weight"].isfinite().any())


def test_records_of_other_clients_say_nothing_about_a_client() -> None:
    clients = plain(MLP, RAGGED)
    others = [
        replace(client, examples=MLP.examples(len(client.examples), 77)) for client in clients
    ]
    models = cohort(MLP, TWO_EPOCHS, [clients[0], *others[1:]])
    assert equal(models[0].delta, cohort(MLP, TWO_EPOCHS, clients)[0].delta)


# Deadlines ----------------------------------------------------------------------------------------


def test_clients_that_are_not_done_at_the_deadline_give_up() -> None:
    late = cohort(MLP, TWO_EPOCHS, plain(MLP, [3, 4]), deadline=time.monotonic() - 1)
    assert all(isinstance(model, ClientTimeoutError) for model in late)
    in_time = cohort(MLP, TWO_EPOCHS, plain(MLP, [3, 4]), deadline=time.monotonic() + 600)
    assert farthest(in_time, one_by_one(MLP, TWO_EPOCHS, plain(MLP, [3, 4]))) < ROUNDING


def test_a_client_that_was_done_before_the_deadline_has_answered(monkeypatch) -> None:
    """By a clock that ticks once a look: the deadline falls between the first two steps."""
    ticks = itertools.count(1)
    monkeypatch.setattr("fl_app.cohort.time", SimpleNamespace(monotonic=lambda: next(ticks)))
    training = LocalTraining(optimizer=SGD, batch_size=4, epochs=1)
    clients = plain(MLP, [16, 4])
    long, short = cohort(MLP, training, clients, deadline=1.5)
    assert isinstance(long, ClientTimeoutError)
    assert farthest([short], one_by_one(MLP, training, clients)[1:]) < ROUNDING


# Dropout ------------------------------------------------------------------------------------------

DROPOUT = Zoo(layers=lambda: [nn.Dropout(0.3), nn.Linear(5, CLASSES)])


def test_dropout_masks_are_a_function_of_seed_and_round() -> None:
    training = LocalTraining(optimizer=SGD, batch_size=50, epochs=1)
    first, again = (cohort(DROPOUT, training, plain(DROPOUT, [20, 20])) for _ in range(2))
    assert all(equal(a.delta, b.delta) for a, b in zip(first, again, strict=True))
    # One batch, so that the order of records is no other.
    other = cohort(DROPOUT, training, plain(DROPOUT, [20, 20], round=2))
    assert farthest(other, first) > 1e-3


class Told(nn.Module):
    """Tells what it sees in training."""

    seen: list[Tensor] = []  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return x


def test_dropout_masks_of_clients_and_records_are_independent_and_scaled_right() -> None:
    task = Zoo(
        layers=lambda: [nn.Dropout(0.3), Told(), nn.Linear(400, CLASSES)],
        records=lambda n, generator: torch.ones(n, 400),
    )
    Told.seen.clear()
    cohort(task, LocalTraining(optimizer=SGD, batch_size=8, epochs=1), plain(task, [8, 8, 8]))
    masks = Told.seen[-1].view(24, 400)
    assert set(masks.unique().tolist()) == {0.0, 1 / (1 - 0.3)}
    dropped = (masks == 0).double()
    assert abs(float(dropped.mean()) - 0.3) < 5 * (0.3 * 0.7 / masks.numel()) ** 0.5
    # The covariance of two records' masks, over 400 entries, in its standard deviations.
    centred = (dropped - 0.3) / (0.3 * 0.7) ** 0.5
    correlations = (centred @ centred.T / 400**0.5)[~torch.eye(24, dtype=torch.bool)]
    assert float(correlations.abs().max()) < 6
    assert 0.8 < float(correlations.square().mean()) < 1.2


def test_the_global_generator_is_left_as_it_was() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    clients, trainer = plain(DROPOUT, [3, 4]), trainer_of(DROPOUT, TWO_EPOCHS)
    received = DROPOUT.initial()
    torch.manual_seed(3)
    trainer.train(received, clients)
    assert torch.equal(torch.rand(4), expected)


class Hungry(nn.Module):
    """Takes more memory than there is for more than thirty records at a time."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 30:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return x * 1.0


def test_clients_that_do_not_fit_into_memory_together_are_trained_fewer_at_a_time(caplog) -> None:
    hungry = Zoo(layers=lambda: [Hungry(), nn.Linear(5, CLASSES)])
    fed = Zoo(layers=lambda: [nn.Linear(5, CLASSES)])
    clients = plain(hungry, [10] * 12)
    training = LocalTraining(optimizer=partial(torch.optim.SGD, lr=0.1), epochs=1, batch_size=10)
    trainer = trainer_of(hungry, training)
    for _ in range(2):
        trained = trainer.train(hungry.initial(), clients)
    told = [record.getMessage() for record in caplog.records]
    assert [words.partition(".")[0] for words in told] == [
        "12 clients side by side do not fit into memory: from now on 6 at a time",
        "6 clients side by side do not fit into memory: from now on 3 at a time",
    ]
    assert "engine.chunk_mib" in told[-1]
    for model, other in zip(trained, cohort(fed, training, clients), strict=True):
        changes = zip(model.delta.values(), other.delta.values(), strict=True)
        assert all(torch.allclose(one, two) for one, two in changes)
