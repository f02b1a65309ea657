"""Server optimizers are torch.optim's own, and Flower's strategies on the same replies."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.supercore.task_identity import TaskIdentity
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

from fl_app.algorithm import Composition
from fl_app.server_optimizer import OptimizerFactory, Yogi, apply_change
from fl_app.types import ClientUpdate, ConfigError, Params

CONF = Path(__file__).parents[1] / "conf"
ALL = frozenset({"w", "b"})
ROUNDS = 5
NUM_EXAMPLES = (10, 30, 60)

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=1.0),
    "momentum": partial(torch.optim.SGD, lr=1.0, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.01, betas=(0.9, 0.99), eps=1e-3),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1, eps=1e-3),
    "yogi": Yogi,
}
ANY_OPTIMIZER = pytest.mark.parametrize(
    "make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys()
)


def start() -> Params:
    return random_change(99)


def random_change(seed: int) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(3, 2, generator=generator),
        "b": 0.1 * torch.randn(2, generator=generator),
    }


def equal(first: Params, second: Params) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# Torch --------------------------------------------------------------------------------------------


@ANY_OPTIMIZER
def test_steps_are_those_of_the_torch_optimizer_to_the_bit(make_optimizer) -> None:
    by_hand = [nn.Parameter(tensor.clone()) for tensor in start().values()]
    optimizer = make_optimizer(by_hand)
    params, state = start(), None
    for round in range(ROUNDS):
        change = random_change(round)
        for parameter, tensor in zip(by_hand, change.values(), strict=True):
            parameter.grad = -tensor
        optimizer.step()
        params, state = apply_change(
            params, change, trainable=ALL, make_optimizer=make_optimizer, state=state
        )
        assert equal(params, dict(zip("wb", (p.detach() for p in by_hand), strict=True)))


@ANY_OPTIMIZER
def test_neither_the_parameters_nor_the_state_given_are_changed(make_optimizer) -> None:
    step = partial(apply_change, trainable=ALL, make_optimizer=make_optimizer)
    first, state = step(start(), random_change(0), state=None)
    first_before, state_before, change = deepcopy(first), deepcopy(state), random_change(1)
    once = step(first, change, state=state)
    again = step(first, change, state=state)
    assert equal(first, first_before)
    assert equal(change, random_change(1))
    assert str(state) == str(state_before)
    assert equal(once[0], again[0])
    assert str(once[1]) == str(again[1])


def test_sgd_with_rate_one_adds_the_change() -> None:
    params, _ = apply_change(
        {"w": torch.tensor([1.0, 2.0])},
        {"w": torch.tensor([0.5, -2.0])},
        trainable=frozenset("w"),
        make_optimizer=OPTIMIZERS["sgd"],
        state=None,
    )
    assert params["w"].tolist() == [1.5, 0.0]


@ANY_OPTIMIZER
def test_buffers_move_by_the_plain_change_and_keep_their_place(make_optimizer) -> None:
    params = {"a_mean": torch.tensor([1.0, 2.0]), **start()}
    change = {"a_mean": torch.tensor([0.25, -4.0]), **random_change(0)}
    new, _ = apply_change(params, change, trainable=ALL, make_optimizer=make_optimizer, state=None)
    assert list(new) == list(params)
    assert new["a_mean"].tolist() == [1.25, -2.0]
    without, _ = apply_change(
        start(), random_change(0), trainable=ALL, make_optimizer=make_optimizer, state=None
    )
    assert torch.equal(new["w"], without["w"])


# Yogi ---------------------------------------------------------------------------------------------


def numpy_yogi(
    x: np.ndarray, gradients: list[np.ndarray], *, accumulator: float
) -> Iterator[np.ndarray]:
    """Reddi et al. 2021, Algorithm 2, FedYogi: lines 7 to 12 with Delta = -gradient."""
    eta, beta1, beta2, tau = 0.05, 0.9, 0.99, 1e-3
    m, v = np.zeros_like(x), np.full_like(x, accumulator)
    for gradient in gradients:
        delta = -gradient
        m = beta1 * m + (1 - beta1) * delta
        v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
        x = x + eta * m / (np.sqrt(v) + tau)
        yield x


@pytest.mark.parametrize("accumulator", [0.0, 1e-6, 0.5])
def test_yogi_is_algorithm_2_of_the_paper(accumulator) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=4)
    gradients = [rng.normal(scale=scale, size=4) for scale in (1, 0.1, 3, 0, 1e-4, 1)]
    parameter = nn.Parameter(torch.from_numpy(x.copy()))
    optimizer = Yogi(
        [parameter], lr=0.05, betas=(0.9, 0.99), eps=1e-3, initial_accumulator=accumulator
    )
    for gradient, expected in zip(
        gradients, numpy_yogi(x, gradients, accumulator=accumulator), strict=True
    ):
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", 0.0),
        ("lr", math.nan),
        ("betas", (1.0, 0.9)),
        ("betas", (0.9, -0.1)),
        ("eps", 0.0),
        ("initial_accumulator", -1.0),
    ],
)
def test_a_bad_value_of_yogi_is_refused_by_key_and_value(key, value) -> None:
    with pytest.raises(ConfigError) as caught:
        Yogi([nn.Parameter(torch.zeros(1))], **{key: value})
    assert f"server_optimizer.{key}={value}" in str(caught.value)


# Flower -------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def flower_knows_its_task() -> None:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    logging.getLogger("flwr").setLevel(logging.ERROR)


def composition(name: str) -> Composition:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(overrides=[f"+strategy={name}"])
    return instantiate(config.strategy, _convert_="object")


def client_deltas(round: int) -> list[Params]:
    """Return the updates of three clients: of one kind, of another size each."""
    return [
        {name: 0.1 * (client + 1) * tensor for name, tensor in random_change(seed).items()}
        for client, seed in enumerate(range(3 * round, 3 * round + 3))
    ]


def our_models(
    composed: Composition,
    make_optimizer: OptimizerFactory,
    *,
    eps_of: Callable[[int], float] | None = None,
) -> Iterator[Params]:
    """Yield the global model after each round.

    Args:
        composed: Gives the aggregation.
        make_optimizer: Server optimizer.
        eps_of: Its epsilon in the t-th step, t from 1, if it is not the same in all.
    """
    params, state = start(), None
    for round in range(1, ROUNDS + 1):
        updates = [
            ClientUpdate(client=str(k), round=round, delta=delta, num_examples=n)
            for k, (delta, n) in enumerate(zip(client_deltas(round), NUM_EXAMPLES, strict=True))
        ]
        if eps_of is not None:
            make_optimizer = partial(make_optimizer, eps=eps_of(round))
        if eps_of is not None and state is not None:  # the state carries the last round's
            state["param_groups"][0]["eps"] = eps_of(round)
        params, state = apply_change(
            params,
            composed.aggregation(updates),
            trainable=ALL,
            make_optimizer=make_optimizer,
            state=state,
        )
        yield params


def reply(delta: Params, model: Params, num_examples: int, node: int) -> Message:
    instruction = Message(RecordDict(), node, MessageType.TRAIN)
    local = ArrayRecord({k: model[k] + tensor for k, tensor in delta.items()})
    metrics = MetricRecord({"num-examples": num_examples})
    return Message(RecordDict({"arrays": local, "metrics": metrics}), reply_to=instruction)


class ThreeNodes:
    """What Flower's ``configure_train`` asks of a Grid."""

    def get_node_ids(self) -> list[int]:
        return [1, 2, 3]


def flower_models(strategy: flower.FedAvg, *, shift: int = 0) -> Iterator[Params]:
    """Yield the global model after each round of a real Flower strategy.

    Args:
        strategy: Strategy to drive.
        shift: Added to the round number that the strategy is told.
    """
    model = start()
    for round in range(1, ROUNDS + 1):
        arrays = ArrayRecord(dict(model))
        list(strategy.configure_train(round, arrays, ConfigRecord(), ThreeNodes()))
        replies = [
            reply(delta, model, n, node)
            for node, (delta, n) in enumerate(
                zip(client_deltas(round), NUM_EXAMPLES, strict=True), start=1
            )
        ]
        arrays, _ = strategy.aggregate_train(round + shift, replies)
        model = {k: v.float() for k, v in arrays.to_torch_state_dict().items()}
        yield model


def largest_difference(ours: Iterator[Params], theirs: Iterator[Params]) -> float:
    return max(
        float((mine[name] - yours[name]).abs().max())
        for mine, yours in zip(ours, theirs, strict=True)
        for name in mine
    )


FLOAT32 = 5e-6
"""Difference that rounding alone makes over these rounds, to parameters of size 1."""


def flowers(composed: Composition) -> flower.FedAvg:
    """Return Flower's strategy of that name, with the values of our YAML file."""
    ours = composed.server_optimizer.keywords
    if composed.name == "fedavg":
        return flower.FedAvg()
    if composed.name == "fedprox":
        return flower.FedProx(proximal_mu=composed.objective.mu)
    if composed.name == "fedavgm":
        return flower.FedAvgM(server_learning_rate=ours["lr"], server_momentum=ours["momentum"])
    if composed.name == "fedadagrad":
        return flower.FedAdagrad(eta=ours["lr"], tau=ours["eps"])
    (beta_1, beta_2), kinds = ours["betas"], {"fedadam": flower.FedAdam, "fedyogi": flower.FedYogi}
    return kinds[composed.name](eta=ours["lr"], beta_1=beta_1, beta_2=beta_2, tau=ours["eps"])


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedavgm", "fedadagrad"])
def test_the_shipped_strategy_is_flowers_on_the_same_replies(name) -> None:
    composed = composition(name)
    ours = our_models(composed, composed.server_optimizer)
    assert largest_difference(ours, flower_models(flowers(composed))) < FLOAT32


def flowers_epsilon(step: int) -> float:
    """Return the epsilon of Kingma & Ba's Algorithm 1 that Flower's tau is in the t-th step."""
    adam = composition("fedadam").server_optimizer.keywords
    return adam["eps"] / math.sqrt(1 - adam["betas"][1] ** step)


def test_fedadam_is_flowers_once_two_departures_of_flower_are_undone() -> None:
    """Flower's FedAdam departs from Adam (Kingma & Ba 2015, Algorithm 1) in two places.

    Its bias correction is ``1 - beta^(server_round + 1)`` where the paper has ``1 - beta^t`` with
    t = 1 in the first round; telling it ``server_round - 1`` undoes that. And it adds tau to
    ``sqrt(v)`` before the second moment's bias correction (the paper's "epsilon-hat" form), which
    is an epsilon of ``tau / sqrt(1 - beta2^t)`` in Algorithm 1; stepping with that undoes it.
    """
    composed = composition("fedadam")
    ours = our_models(composed, composed.server_optimizer, eps_of=flowers_epsilon)
    assert largest_difference(ours, flower_models(flowers(composed), shift=-1)) < FLOAT32


@pytest.mark.parametrize(("shift", "eps_of"), [(0, None), (-1, None), (0, flowers_epsilon)])
def test_fedadam_is_not_flowers_while_either_departure_stands(shift, eps_of) -> None:
    """See the test above: either alone moves the model by far more than rounding."""
    composed = composition("fedadam")
    ours = our_models(composed, composed.server_optimizer, eps_of=eps_of)
    theirs = flower_models(flowers(composed), shift=shift)
    assert largest_difference(ours, theirs) > 50 * FLOAT32


def test_fedyogi_is_flowers_when_the_second_moment_starts_at_zero() -> None:
    """Flower starts v at 0; Reddi et al. 2021, Algorithm 2, ask for v_{-1} >= tau^2."""
    composed = composition("fedyogi")
    from_zero = partial(composed.server_optimizer, initial_accumulator=0.0)
    ours = our_models(composed, from_zero)
    assert largest_difference(ours, flower_models(flowers(composed))) < FLOAT32


def test_fedyogi_is_not_flowers_from_the_papers_start_value() -> None:
    composed = composition("fedyogi")
    yogi = composed.server_optimizer.keywords
    assert yogi["initial_accumulator"] == pytest.approx(yogi["eps"] ** 2)
    ours = our_models(composed, composed.server_optimizer)
    assert largest_difference(ours, flower_models(flowers(composed))) > 10 * FLOAT32
