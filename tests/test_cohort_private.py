"""Private clients trained side by side come out as Opacus, and a loop, have them one by one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

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
    micro_batches,
    one_by_one,
    private,
)
from torch import nn
from zoo import (
    MLP,
    PRIVATE,
    WITH_RULES,
    Direction,
    Zoo,
    words,
)

from fl_app.cohort import Assignment
from fl_app.objective import OwnLoss, Proximal
from fl_app.privacy.randomness import reproducible_randomness_for_tests
from fl_app.training import LocalTraining
from fl_app.types import Examples

# Of torch, where vmap loops over attention.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

ROUNDING = 1e-10
TRAINING = LocalTraining(optimizer=SGD)
MOMENTUM = LocalTraining(
    optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    keep_optimizer_state=True,
)
ADAM = LocalTraining(optimizer=partial(torch.optim.Adam, lr=0.01), keep_optimizer_state=True)


# Equal to one by one ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_cohort_is_the_micro_batch_loop_for_every_layer(name: str) -> None:
    task = PRIVATE[name]
    together = cohort(task, TRAINING, private(task, RAGGED))
    assert farthest(together, micro_batches(task, private(task, RAGGED))) < ROUNDING
    unclipped = micro_batches(task, private(task, RAGGED, bound=40.0, noise=[0.0]))
    assert farthest(together, unclipped) > 1e-3


# Opacus raises for a LayerNorm without a bias, and trains the padding row that torch leaves alone.
OPACUS = WITH_RULES.keys() - {"layer norm without bias", "embedding with padding"}


@pytest.mark.parametrize("name", sorted(OPACUS))
@pytest.mark.parametrize("objective", [OwnLoss(), Proximal(mu=0.5)], ids=["own", "proximal"])
def test_a_private_cohort_is_opacus_one_by_one_for_every_layer(name: str, objective) -> None:
    task = WITH_RULES[name]
    together, alone = (
        train(task, MOMENTUM, private(task, RAGGED), objective=objective)
        for train in (cohort, one_by_one)
    )
    assert farthest(together, alone) < ROUNDING
    for one, other in zip(together, alone, strict=True):
        assert one.metrics == other.metrics == {}
        for number, entries in other.optimizer_state["state"].items():
            kept = one.optimizer_state["state"][number]["momentum_buffer"]
            torch.testing.assert_close(kept, entries["momentum_buffer"], rtol=1e-9, atol=1e-12)


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    rate=st.sampled_from([0.01, 0.1, 0.3, 0.9, 1.0]),
    steps=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    noise=st.lists(st.floats(0.0, 3.0), min_size=1, max_size=8),
    bound=st.floats(0.01, 10.0),
    side_by_side=st.integers(1, 9),
    training=st.sampled_from([TRAINING, MOMENTUM]),
)
def test_and_for_any_sizes_plans_and_chunks(
    sizes, rate, steps, noise, bound, side_by_side, training
) -> None:
    draw = partial(private, MLP, sizes, rate=rate, steps=steps, noise=noise, bound=bound)
    together = cohort(MLP, training, draw(), side_by_side=side_by_side)
    assert farthest(together, one_by_one(MLP, training, draw())) < ROUNDING
    if training is TRAINING:
        assert farthest(together, micro_batches(MLP, draw())) < ROUNDING


def test_fedprox_pulls_after_the_noise_and_unclipped() -> None:
    objective = Proximal(mu=2.0)
    together = cohort(MLP, TRAINING, private(MLP, RAGGED, bound=0.01), objective=objective)
    alone = micro_batches(MLP, private(MLP, RAGGED, bound=0.01), mu=2.0)
    assert farthest(together, alone) < ROUNDING


def test_an_empty_batch_is_a_step_of_noise_alone() -> None:
    clients = partial(private, MLP, RAGGED, rate=1e-9, steps=[3], noise=[1.5])
    together = cohort(MLP, TRAINING, clients())
    for k, model in enumerate(together):
        secret = reproducible_randomness_for_tests(1, str(k))
        expected = [torch.zeros(4, 5), torch.zeros(3, 4), torch.zeros(3)]
        for _ in range(3):
            for total in expected:
                drawn = secret.normal(total.double(), std=1.5 * 0.4)
                total -= 0.1 * drawn / (2.0 + k)
        for total, name in zip(expected, MLP.initial(), strict=True):
            torch.testing.assert_close(model.delta[name], total.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [ADAM, MOMENTUM], ids=["adam", "momentum"])
def test_what_private_optimizers_remember_goes_on_over_rounds(training) -> None:
    memories: dict[str, dict[str, object]] = {"together": {}, "alone": {}}
    for number, present in enumerate([[0, 1, 2], [0, 2, 3], [0, 1, 2, 3, 4]], start=1):
        results = {}
        for name, train in (("together", cohort), ("alone", one_by_one)):
            memory = memories[name]
            every = private(MLP, RAGGED, round=number)
            chosen = [replace(every[k], optimizer_state=memory.get(str(k))) for k in present]
            results[name] = train(MLP, training, chosen)
            memory |= {
                client.randomness.client: model.optimizer_state
                for client, model in zip(chosen, results[name], strict=True)
            }
        assert farthest(results["together"], results["alone"]) < 1e-9


def test_without_secrets_of_their_own_clients_draw_other_noise_every_time() -> None:
    clients = [replace(client, secret=None) for client in private(MLP, [9, 9], noise=[1.0])]
    first, again = cohort(MLP, TRAINING, clients), cohort(MLP, TRAINING, clients)
    assert farthest(first, again) > 1e-3
    assert farthest(first[:1], first[1:]) > 1e-3


def test_shared_noise_has_the_deviation_of_each_client() -> None:
    """Of empty batches: one step is noise alone."""
    wide = Zoo(
        layers=lambda: [nn.Linear(400, 3)],
        records=lambda n, generator: torch.randn(n, 400, generator=generator),
    )
    noise = [0.5, 1.0, 2.0, 4.0]
    plans = private(wide, [5] * 4, rate=1e-9, steps=[1], noise=noise)
    clients = [replace(client, secret=None) for client in plans]
    drawn = [
        model.delta["0.weight"].flatten() * (2.0 + k) / (0.1 * 0.4 * noise[k])
        for k, model in enumerate(cohort(wide, TRAINING, clients, side_by_side=1))
    ]
    for values in drawn:
        assert abs(float(values.square().mean()) - 1) < 6 * (2 / 1200) ** 0.5
        assert abs(float(values.mean())) < 6 / 1200**0.5
    correlations = torch.corrcoef(torch.stack(drawn)) - torch.eye(4)
    assert float(correlations.abs().max()) < 6 / 1200**0.5


def test_a_client_without_a_plan_beside_private_ones_is_refused() -> None:
    first, *others = private(MLP, [9, 9])
    with pytest.raises(TypeError, match="plan"):
        cohort(MLP, TRAINING, [first, *(replace(client, plan=None) for client in others)])


# Records without a finite gradient ----------------------------------------------------------------

NORMED = Zoo(layers=lambda: [nn.Linear(5, 4), Direction(4), nn.Linear(4, 3)])
FLOATS = {n: t for n, t in PRIVATE.items() if t.records is not words} | {"direction": NORMED}


def spoilt(client: Assignment, value: float, *records: int) -> Assignment:
    inputs = client.examples.inputs.clone()
    inputs[list(records)] = value
    return replace(client, examples=Examples(inputs=inputs, targets=client.examples.targets))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", FLOATS)
def test_a_record_without_a_finite_gradient_counts_as_zero(name: str, value: float) -> None:
    """Also a client's first record, with which its batches are padded."""
    task = FLOATS[name]
    clients = private(task, RAGGED, rate=0.6)
    clients[0] = spoilt(clients[0], value, 0, 4, 5)
    clients[3] = spoilt(clients[3], value, *range(17))
    expected = private(task, RAGGED, rate=0.6)
    expected[0] = replace(clients[0], secret=expected[0].secret)
    expected[3] = replace(clients[3], secret=expected[3].secret)
    together = cohort(task, TRAINING, clients)
    assert farthest(together, micro_batches(task, expected)) < ROUNDING


@pytest.mark.parametrize("name", FLOATS)
def test_nor_does_it_change_another_client_to_the_bit(name: str) -> None:
    task = FLOATS[name]
    healthy, sick = (private(task, RAGGED, rate=0.6) for _ in range(2))
    sick[0] = spoilt(sick[0], float("nan"), 0, 4, 5)
    models, expected = cohort(task, TRAINING, sick), cohort(task, TRAINING, healthy)
    for one, other in zip(models[1:], expected[1:], strict=True):
        assert equal(one.delta, other.delta)
    assert not equal(models[0].delta, expected[0].delta)


@pytest.mark.parametrize("extreme", [1e160, 1e300])
def test_a_gradient_too_long_to_be_measured_counts_as_zero(extreme: float) -> None:
    """Its square overflows; Opacus' norm of the same record may be finite, and then is clipped."""
    clients = private(MLP, RAGGED, rate=1.0)
    clients[0] = spoilt(clients[0], extreme, 2)
    models = cohort(MLP, TRAINING, clients)
    assert all(bool(t.isfinite().all()) for model in models for t in model.delta.values())
    others = cohort(MLP, TRAINING, private(MLP, RAGGED, rate=1.0))
    assert all(equal(a.delta, b.delta) for a, b in zip(models[1:], others[1:], strict=True))
