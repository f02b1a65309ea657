"""Local training is plain torch, and a function of (parameters, records, randomness) alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fl_app.aggregation import WeightedMean
from fl_app.client import ClientRuntime, SimulatedFailureError
from fl_app.client_state import ClientStateStore, DiskClientState, MemoryClientState
from fl_app.objective import LocalObjective, OwnLoss, Proximal
from fl_app.params import read_params, trainable_names, write_params
from fl_app.privacy.none import NoPrivacy
from fl_app.server_optimizer import apply_change
from fl_app.site import SimulatedSite
from fl_app.training import (
    ClientTimeoutError,
    LocalTraining,
    Randomness,
    TrainedModel,
    evaluate,
    evaluate_quickly,
    train_locally,
)
from fl_app.types import (
    ClientExamples,
    ClientUpdate,
    ConfigError,
    Examples,
    Params,
    TrainInstruction,
)

SGD = partial(torch.optim.SGD, lr=0.1)
MOMENTUM = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


@dataclass(frozen=True, kw_only=True)
class Toy:
    """Three columns, two classes; the layers are chosen by the test."""

    layers: Callable[[], list[nn.Module]] = lambda: [nn.Linear(3, 2)]
    name: str = "toy"

    def build_model(self) -> nn.Module:
        return nn.Sequential(*self.layers())

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, float]:
        return {"accuracy": (outputs.argmax(1) == targets).double().mean().item()}


LINEAR = Toy()
DROPOUT = Toy(layers=lambda: [nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)])
NORMED = Toy(layers=lambda: [nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)])


def examples(n: int = 12, seed: int = 0) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 3, generator=generator)
    return Examples(inputs=inputs, targets=(inputs[:, 0] > 0).long())


def initial(task: Toy, seed: int = 5) -> Params:
    torch.manual_seed(seed)
    return read_params(task.build_model())


def trained(
    task: Toy = LINEAR,
    training: LocalTraining | None = None,
    *,
    owned: ClientExamples | None = None,
    objective: LocalObjective | None = None,
    model: nn.Module | None = None,
    received: Params | None = None,
    seed: int = 1,
    round: int = 1,
    client: str = "0",
    **options: Any,
) -> TrainedModel:
    return train_locally(
        model or task.build_model(),
        task,
        owned or ClientExamples(train=examples()),
        training or LocalTraining(optimizer=SGD, batch_size=4, epochs=2),
        objective or OwnLoss(),
        received or initial(task),
        Randomness(seed=seed, round=round, client=client),
        **options,
    )


def equal(first: Params, second: Params) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# Central training ---------------------------------------------------------------------------------


def sgd_by_hand(
    task: Toy, received: Params, batches: list[Examples], optimizer: Any = SGD
) -> nn.Module:
    model = task.build_model()
    write_params(model, received)
    steps = optimizer(model.parameters())
    for batch in batches:
        steps.zero_grad()
        task.losses(model(batch.inputs), batch.targets).mean().backward()
        steps.step()
    return model


def batches(owned: Examples, size: int, epochs: int, randomness: Randomness) -> list[Examples]:
    generator = randomness.batches()
    return [
        owned.take(indices)
        for _ in range(epochs)
        for indices in torch.randperm(len(owned), generator=generator).split(size)
    ]


@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM, partial(torch.optim.Adam, lr=0.01)])
@pytest.mark.parametrize(("size", "epochs"), [(12, 1), (4, 2), (5, 3), (100, 2)])
def test_local_training_is_plain_torch_to_the_bit(optimizer, size, epochs) -> None:
    received, randomness = initial(LINEAR), Randomness(seed=1, round=1, client="0")
    by_hand = sgd_by_hand(
        LINEAR, received, batches(examples(), size, epochs, randomness), optimizer
    )
    training = LocalTraining(optimizer=optimizer, batch_size=size, epochs=epochs)
    delta = trained(training=training, received=received).delta
    for name, tensor in read_params(by_hand).items():
        assert torch.equal(delta[name], tensor - received[name])


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_fedavg_with_one_full_batch_client_is_one_step_of_central_sgd(weighting) -> None:
    received = initial(LINEAR)
    full_batch = LocalTraining(optimizer=SGD, batch_size=12, epochs=1)
    delta = trained(training=full_batch, received=received).delta
    update = ClientUpdate(client="0", round=1, delta=delta, num_examples=12)
    new, _ = apply_change(
        received,
        WeightedMean(weighting=weighting)([update]),
        trainable=trainable_names(LINEAR.build_model()),
        make_optimizer=partial(torch.optim.SGD, lr=1.0),
        state=None,
    )
    central = read_params(sgd_by_hand(LINEAR, received, [examples()]))
    for name, tensor in central.items():
        torch.testing.assert_close(new[name], tensor, rtol=1e-6, atol=1e-7)


def test_fedavg_of_full_batch_clients_is_one_step_of_central_sgd_on_all_records() -> None:
    """McMahan et al. 2017, Section 2: FedSGD, weights n_k / n, is gradient descent."""
    received, pooled = initial(LINEAR), examples(12)
    parts = pooled.inputs.split([2, 3, 7]), pooled.targets.split([2, 3, 7])
    full_batch = LocalTraining(optimizer=SGD, batch_size=12, epochs=1)
    updates = []
    for client, (inputs, targets) in enumerate(zip(*parts, strict=True)):
        owned = ClientExamples(train=Examples(inputs=inputs, targets=targets))
        delta = trained(training=full_batch, owned=owned, received=received).delta
        updates.append(
            ClientUpdate(client=str(client), round=1, delta=delta, num_examples=len(targets))
        )
    mean = WeightedMean()(updates)
    central = read_params(sgd_by_hand(LINEAR, received, [pooled]))
    for name, tensor in central.items():
        torch.testing.assert_close(received[name] + mean[name], tensor, rtol=1e-5, atol=1e-6)


def test_fedprox_with_mu_zero_is_fedavg_to_the_bit_and_with_mu_it_is_not() -> None:
    plain = trained().delta
    assert equal(trained(objective=Proximal(mu=0.0)).delta, plain)
    assert not equal(trained(objective=Proximal(mu=0.5)).delta, plain)


def test_the_first_step_of_fedprox_has_no_pull() -> None:
    once = LocalTraining(optimizer=SGD, batch_size=12, epochs=1)
    assert equal(
        trained(training=once, objective=Proximal(mu=9.0)).delta, trained(training=once).delta
    )


def test_fedprox_is_sgd_on_the_loss_with_its_term_written_out() -> None:
    received, randomness = initial(LINEAR), Randomness(seed=1, round=1, client="0")
    model = LINEAR.build_model()
    write_params(model, received)
    steps = SGD(model.parameters())
    for batch in batches(examples(), 4, 2, randomness):
        steps.zero_grad()
        far = sum((p - received[name]).square().sum() for name, p in model.named_parameters())
        loss = LINEAR.losses(model(batch.inputs), batch.targets).mean() + 0.5 / 2 * far
        loss.backward()
        steps.step()
    delta = trained(received=received, objective=Proximal(mu=0.5)).delta
    for name, tensor in read_params(model).items():
        torch.testing.assert_close(delta[name], tensor - received[name])


def test_the_reported_loss_is_the_mean_over_the_records_of_the_last_epoch() -> None:
    still = LocalTraining(optimizer=partial(torch.optim.SGD, lr=1e-30), batch_size=5, epochs=2)
    result = trained(training=still)
    measured = evaluate(LINEAR.build_model(), LINEAR, examples(), params=initial(LINEAR))
    assert result.metrics["loss"] == pytest.approx(measured.metrics["loss"], rel=1e-6)
    assert result.metrics["epochs"] == 2.0


# Randomness and purity ----------------------------------------------------------------------------


@pytest.mark.parametrize("task", [LINEAR, DROPOUT], ids=["order of records", "dropout"])
def test_draws_are_a_function_of_seed_round_and_client(task) -> None:
    size = 4 if task is LINEAR else 12
    draw = partial(trained, task, LocalTraining(optimizer=SGD, batch_size=size, epochs=1))
    first = draw(seed=1, round=1, client="0").delta
    torch.rand(17)
    assert equal(draw(seed=1, round=1, client="0").delta, first)
    for other in ({"seed": 2}, {"round": 2}, {"client": "1"}):
        assert not equal(draw(**{"seed": 1, "round": 1, "client": "0", **other}).delta, first)


@pytest.mark.parametrize("deadline", [None, 0.0], ids=["done", "given up"])
def test_the_global_generator_is_left_as_it_was(deadline) -> None:
    model, received = DROPOUT.build_model(), initial(DROPOUT)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    try:
        trained(DROPOUT, model=model, received=received, deadline=deadline)
    except ClientTimeoutError:
        assert deadline is not None
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("task", [LINEAR, DROPOUT, NORMED], ids=["linear", "dropout", "normed"])
def test_what_the_scratch_model_held_before_has_no_influence(task) -> None:
    used = task.build_model()
    other = ClientExamples(train=examples(seed=9))
    trained(task, LocalTraining(optimizer=MOMENTUM, epochs=3), model=used, owned=other, client="7")
    for tensor in used.state_dict().values():
        tensor.fill_(0 if tensor.dtype == torch.int64 else float("nan"))
    used.eval()
    assert equal(trained(task, model=used).delta, trained(task).delta)


def test_what_the_scratch_model_held_has_no_influence_on_cumulative_averages() -> None:
    """BatchNorm(momentum=None) averages with 1 / num_batches_tracked, an integer buffer."""
    task = Toy(layers=lambda: [nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 2)])
    used = task.build_model()
    trained(task, model=used, owned=ClientExamples(train=examples(seed=9)), client="7")
    assert equal(trained(task, model=used).delta, trained(task).delta)


def test_received_parameters_and_records_are_left_as_they_are() -> None:
    received, owned = initial(NORMED), ClientExamples(train=examples())
    copy = {name: tensor.clone() for name, tensor in received.items()}
    trained(NORMED, received=received, owned=owned)
    assert equal(received, copy)
    assert torch.equal(owned.train.inputs, examples().inputs)


def test_buffers_are_part_of_the_delta() -> None:
    received = initial(NORMED)
    delta = trained(
        NORMED, LocalTraining(optimizer=SGD, batch_size=12, epochs=1), received=received
    ).delta
    assert delta.keys() == received.keys()
    assert "1.num_batches_tracked" not in delta
    linear = nn.functional.linear(examples().inputs, received["0.weight"], received["0.bias"])
    expected = 0.9 * received["1.running_mean"] + 0.1 * linear.mean(0)
    torch.testing.assert_close(received["1.running_mean"] + delta["1.running_mean"], expected)


def test_a_frozen_parameter_does_not_move() -> None:
    def frozen() -> list[nn.Module]:
        first = nn.Linear(3, 3)
        first.requires_grad_(False)
        return [first, nn.Linear(3, 2)]

    delta = trained(Toy(layers=frozen), objective=Proximal(mu=1.0)).delta
    assert float(delta["0.weight"].abs().max()) == 0
    assert float(delta["1.weight"].abs().max()) > 0


# Early stopping -----------------------------------------------------------------------------------


def contrary(n: int = 12) -> ClientExamples:
    """Return records whose validation part has every label wrong: training only harms it."""
    train = examples(n)
    validation = Examples(inputs=train.inputs, targets=1 - train.targets)
    return ClientExamples(train=train, validation=validation)


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_early_stopping_restores_the_best_epoch_and_stops(patience) -> None:
    one = LocalTraining(optimizer=SGD, batch_size=4, epochs=1)
    many = replace(one, epochs=20, early_stopping_patience=patience)
    # The first epoch is the best on a validation part that contradicts the training part.
    result = trained(training=many, owned=contrary())
    assert result.metrics["epochs"] == 1 + patience
    assert equal(result.delta, trained(training=one).delta)


def test_early_stopping_goes_on_while_the_validation_loss_falls() -> None:
    owned = ClientExamples(train=examples(), validation=examples())
    stopping = LocalTraining(optimizer=SGD, batch_size=12, epochs=6, early_stopping_patience=1)
    result = trained(training=stopping, owned=owned)
    assert result.metrics["epochs"] == 6
    without = replace(stopping, early_stopping_patience=None)
    assert equal(result.delta, trained(training=without, owned=owned).delta)


def test_a_client_without_a_validation_part_trains_all_epochs() -> None:
    stopping = LocalTraining(optimizer=SGD, epochs=3, early_stopping_patience=1)
    assert trained(training=stopping).metrics["epochs"] == 3


@pytest.mark.parametrize("task", [DROPOUT, NORMED], ids=["dropout", "normed"])
def test_watching_the_validation_part_changes_no_step(task) -> None:
    owned = ClientExamples(train=examples(), validation=examples(6, seed=3))
    plain = LocalTraining(optimizer=partial(torch.optim.SGD, lr=1e-3), batch_size=4, epochs=3)
    watched = replace(plain, early_stopping_patience=50)
    result = trained(task, watched, owned=owned)
    assert result.metrics == trained(task, plain, owned=owned).metrics


# Deadlines ----------------------------------------------------------------------------------------


def test_a_deadline_in_the_past_is_given_up_before_the_first_step() -> None:
    with pytest.raises(ClientTimeoutError, match="epoch 1"):
        trained(deadline=time.monotonic() - 1)


def test_a_deadline_far_away_changes_nothing() -> None:
    assert equal(trained(deadline=time.monotonic() + 3600).delta, trained().delta)


# Configuration ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("early_stopping_patience", 0),
        ("failure_fraction", 1.0),
        ("failure_fraction", -0.1),
        ("failure_fraction", float("nan")),
    ],
)
def test_a_bad_value_is_refused_by_key_and_value(key, value) -> None:
    with pytest.raises(ConfigError) as caught:
        LocalTraining(optimizer=SGD, **{key: value})
    assert f"client.{key}={value} " in str(caught.value)


# Evaluation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [LINEAR, DROPOUT, NORMED], ids=["linear", "dropout", "normed"])
@pytest.mark.parametrize("size", [1, 5, 12])
def test_measuring_in_batches_is_measuring_at_once(monkeypatch, task, size) -> None:
    model, params = task.build_model(), initial(task)
    at_once = evaluate(model, task, examples(), params=params)
    monkeypatch.setattr("fl_app.training.EVALUATION_BATCH", size)
    in_batches = evaluate(model, task, examples(), params=params)
    assert in_batches.num_examples == at_once.num_examples == 12
    assert in_batches.metrics == pytest.approx(at_once.metrics, rel=1e-6)


def test_measuring_changes_neither_model_nor_generator() -> None:
    model, params = NORMED.build_model(), initial(NORMED)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    evaluate(model, NORMED, examples(), params=params)
    assert equal(read_params(model), params)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_quick_measurement_agrees_with_the_whole_one() -> None:
    model, params = LINEAR.build_model(), initial(LINEAR)
    whole = evaluate(model, LINEAR, examples(), params=params)
    assert evaluate_quickly(model, LINEAR, examples()) == whole


# The runtime --------------------------------------------------------------------------------------


@dataclass
class Owned:
    """Three clients with the same twelve records; the first access of each may be slow."""

    test: bool = False
    delay_s: float = 0.0
    clients: tuple[str, ...] = ("0", "1", "2")
    held_out: None = None
    train: Examples = field(default_factory=examples)

    def examples_of(self, client: str) -> ClientExamples:
        time.sleep(self.delay_s)
        return ClientExamples(train=self.train, test=examples(5, seed=4) if self.test else None)


def runtime(
    training: LocalTraining,
    states: ClientStateStore | None = None,
    *,
    task: Toy = LINEAR,
    **owned: Any,
) -> ClientRuntime:
    return ClientRuntime(
        task=task,
        data=Owned(**owned),
        training=training,
        objective=OwnLoss(),
        seed=1,
        states=states or MemoryClientState(),
        privacy=NoPrivacy(),
        site=SimulatedSite(privacy=NoPrivacy(), data_set="test"),
    )


KEEPING = LocalTraining(optimizer=MOMENTUM, batch_size=12, epochs=2, keep_optimizer_state=True)


@pytest.fixture(params=["memory", "disk"])
def states(request: pytest.FixtureRequest, tmp_path: Any) -> ClientStateStore:
    return MemoryClientState() if request.param == "memory" else DiskClientState(tmp_path)


def test_kept_momentum_over_two_rounds_is_one_optimizer_all_along(states) -> None:
    received, clients = initial(LINEAR), runtime(KEEPING, states)
    for round in (1, 2):
        update = clients.train("0", TrainInstruction(round=round, params=received))
        clients.train("1", TrainInstruction(round=round, params=received))
        received = {name: received[name] + update.delta[name] for name in received}
    by_hand = sgd_by_hand(LINEAR, initial(LINEAR), [examples()] * 4, MOMENTUM)
    for name, tensor in read_params(by_hand).items():
        torch.testing.assert_close(received[name], tensor, rtol=1e-5, atol=1e-6)
    fresh = runtime(replace(KEEPING, keep_optimizer_state=False))
    other = initial(LINEAR)
    for round in (1, 2):
        delta = fresh.train("0", TrainInstruction(round=round, params=other)).delta
        other = {name: other[name] + delta[name] for name in other}
    assert not torch.allclose(other["0.weight"], received["0.weight"], rtol=1e-3)


def test_a_round_that_is_given_up_leaves_what_the_client_remembers(states) -> None:
    class SlowSecondEpoch(torch.optim.SGD):
        """Sleeps past the deadline in its second step, after it has changed the momentum."""

        slow = False

        def step(self, closure: Any = None) -> None:
            super().step(closure)
            if type(self).slow:
                time.sleep(0.3)

    training = replace(KEEPING, optimizer=partial(SlowSecondEpoch, lr=0.1, momentum=0.9))
    received, clients = initial(LINEAR), runtime(training, states)
    clients.train("0", TrainInstruction(round=1, params=received))
    undisturbed = clients.train("0", TrainInstruction(round=3, params=received)).delta

    clients = runtime(training, type(states)() if isinstance(states, MemoryClientState) else states)
    clients.train("0", TrainInstruction(round=1, params=received))
    SlowSecondEpoch.slow = True
    with pytest.raises(ClientTimeoutError):
        clients.train("0", TrainInstruction(round=2, params=received, deadline_s=0.2))
    SlowSecondEpoch.slow = False
    after = clients.train("0", TrainInstruction(round=3, params=received)).delta
    assert equal(after, undisturbed)


def test_an_update_carries_count_metrics_and_the_received_model_measured() -> None:
    received = initial(LINEAR)
    update = runtime(KEEPING, test=True).train("2", TrainInstruction(round=4, params=received))
    assert (update.client, update.round, update.num_examples) == ("2", 4, 12)
    assert set(update.metrics) == {"loss", "epochs"}
    expected = evaluate(LINEAR.build_model(), LINEAR, examples(5, seed=4), params=received)
    assert update.evaluation == expected


def test_the_order_of_clients_changes_nothing() -> None:
    training = LocalTraining(optimizer=SGD, batch_size=4)
    instruction = TrainInstruction(round=1, params=initial(DROPOUT))
    first, second = (runtime(training, task=DROPOUT, test=True) for _ in range(2))
    forwards = {client: first.train(client, instruction) for client in "012"}
    backwards = {client: second.train(client, instruction) for client in "210"}
    for client, update in forwards.items():
        assert equal(update.delta, backwards[client].delta)
        assert update.evaluation == backwards[client].evaluation


def test_time_spent_on_loading_records_counts_towards_the_deadline() -> None:
    clients = runtime(LocalTraining(optimizer=SGD), delay_s=0.05)
    with pytest.raises(ClientTimeoutError):
        clients.train("0", TrainInstruction(round=1, params=initial(LINEAR), deadline_s=0.02))


def test_simulated_failures_are_a_function_of_seed_round_and_client_at_their_rate() -> None:
    training = LocalTraining(optimizer=SGD, batch_size=12, failure_fraction=0.3)

    def failed() -> list[tuple[int, str]]:
        clients, hit = runtime(training), []
        for round in range(1, 101):
            for client in "012":
                try:
                    clients.train(client, TrainInstruction(round=round, params=params))
                except SimulatedFailureError:
                    hit.append((round, client))
        return hit

    params = initial(LINEAR)
    first = failed()
    assert failed() == first
    assert 60 < len(first) < 120  # 300 draws at 0.3: 90 expected, standard deviation 8


def test_a_client_tells_its_label_counts_only_if_it_is_set_to() -> None:
    silent = LocalTraining(optimizer=SGD)
    assert runtime(silent).describe("0").label_counts is None
    told = runtime(replace(silent, share_label_counts=True)).describe("0")
    assert told.num_examples == 12
    assert told.label_counts == tuple(torch.bincount(examples().targets).tolist())


def test_measuring_a_client_without_a_held_out_part_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match="partition.test_fraction"):
        runtime(KEEPING).evaluate("0", initial(LINEAR))
    measured = runtime(KEEPING, test=True).evaluate("0", initial(LINEAR))
    assert measured.num_examples == 5
