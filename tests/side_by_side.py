"""Clients of a cohort, trained side by side and one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from zoo import Zoo

from fl_app.cohort import Assignment, CohortTrainer
from fl_app.objective import LocalObjective, OwnLoss
from fl_app.params import write_params
from fl_app.privacy.base import RecordPlan
from fl_app.privacy.dp_sgd import DpSgd
from fl_app.privacy.randomness import PoissonSampling, reproducible_randomness_for_tests
from fl_app.private_training import train_privately
from fl_app.stacked.probe import stackable
from fl_app.training import LocalTraining, Randomness, TrainedModel, train_locally
from fl_app.types import ClientExamples, Params

SGD = partial(torch.optim.SGD, lr=0.1)
RAGGED = [12, 3, 1, 17, 5]
"""Records of the clients of a cohort."""


def trainer_of(
    task: Zoo,
    training: LocalTraining,
    *,
    private: bool = False,
    objective: LocalObjective | None = None,
    side_by_side: int = 1000,
) -> CohortTrainer:
    """Return what trains at most so many clients at once."""
    found = stackable(task.build_model(), task.losses, task.examples(8), private=private)
    return CohortTrainer(
        model=found.stacked(),
        task=task,
        training=training,
        objective=objective or OwnLoss(),
        once=found.once,
        client_bytes=1,
        chunk_bytes=side_by_side,
    )


def cohort(
    task: Zoo,
    training: LocalTraining,
    clients: Sequence[Assignment],
    *,
    received: Params | None = None,
    deadline: float | None = None,
    **options: Any,
) -> list[Any]:
    """Return what training side by side gives; options as of `trainer_of`."""
    trainer = trainer_of(task, training, private=clients[0].plan is not None, **options)
    return trainer.train(received or task.initial(), clients, deadline=deadline)


def one_by_one(
    task: Zoo,
    training: LocalTraining,
    clients: Sequence[Assignment],
    *,
    received: Params | None = None,
    objective: LocalObjective | None = None,
) -> list[TrainedModel]:
    """Return what training each client by itself gives; private ones by Opacus."""
    model = task.build_model()
    return [
        (
            train_locally
            if client.plan is None
            else partial(train_privately, plan=client.plan, secret=client.secret)
        )(
            model,
            task,
            ClientExamples(train=client.examples),
            training,
            objective or OwnLoss(),
            received or task.initial(),
            client.randomness,
            optimizer_state=client.optimizer_state,
        )
        for client in clients
    ]


def plain(task: Zoo, sizes: Sequence[int], *, round: int = 1) -> list[Assignment]:
    """Return clients with so many records each."""
    return [
        Assignment(
            examples=task.examples(size, seed=100 + k),
            count=size,
            randomness=Randomness(seed=1, round=round, client=str(k)),
        )
        for k, size in enumerate(sizes)
    ]


def private(
    task: Zoo,
    sizes: Sequence[int],
    *,
    rate: float = 0.5,
    steps: Sequence[int] = (4, 1, 3, 5, 2),
    noise: Sequence[float] = (0.5, 1.0, 0.0, 2.0, 0.7),
    bound: float = 0.4,
    round: int = 1,
) -> list[Assignment]:
    """Return clients with so many records, steps, and so much noise each; secrets anew."""
    return [
        replace(
            client,
            plan=RecordPlan(
                sampling=PoissonSampling(sample_rate=rate, steps=steps[k % len(steps)]),
                mechanism=DpSgd(
                    noise_multiplier=noise[k % len(noise)],
                    max_grad_norm=bound,
                    expected_batch_size=2.0 + k,
                ),
            ),
            secret=reproducible_randomness_for_tests(round, client.randomness.client),
        )
        for k, client in enumerate(plain(task, sizes, round=round))
    ]


def micro_batches(
    task: Zoo, clients: Sequence[Assignment], *, mu: float = 0.0
) -> list[TrainedModel]:
    """Abadi et al. 2016, Algorithm 1, client by client and record by record, with SGD."""
    trained, received = [], task.initial()
    for client in clients:
        model = task.build_model()
        write_params(model, received)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        local = [p for p in model.parameters() if p.requires_grad]
        start = [p.detach().clone() for p in local]
        records, mechanism = client.examples, client.plan.mechanism
        for positions in client.plan.sampling.batches(len(records), client.secret):
            sums = [torch.zeros_like(p) for p in local]
            for k in positions.tolist():
                loss = task.losses(model(records.inputs[k : k + 1]), records.targets[k : k + 1])
                made = torch.autograd.grad(loss.sum(), local, allow_unused=True)
                made = [torch.zeros_like(p) if g is None else g for g, p in zip(made, local)]  # noqa: B905
                norm = torch.cat([g.flatten() for g in made]).norm()
                if norm.isfinite():
                    factor = (mechanism.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
                    sums = [total + factor * g for total, g in zip(sums, made, strict=True)]
            std = mechanism.noise_multiplier * mechanism.max_grad_norm
            with torch.no_grad():
                for weight, total, origin in zip(local, sums, start, strict=True):
                    noisy = total + client.secret.normal(total, std=std)
                    pull = mu * (weight - origin)
                    weight -= 0.1 * (noisy / mechanism.expected_batch_size + pull)
        delta = {name: torch.zeros_like(tensor) for name, tensor in received.items()}
        delta |= {
            name: (p - origin).detach() for name, p, origin in zip(names, local, start, strict=True)
        }
        trained.append(TrainedModel(delta=delta, metrics={}, optimizer_state={}))
    return trained


def farthest(first: Sequence[TrainedModel], second: Sequence[TrainedModel]) -> float:
    """Return the largest difference of two entries, relative to the largest of their tensor."""
    worst = 0.0
    for one, other in zip(first, second, strict=True):
        assert list(one.delta) == list(other.delta)
        for name, expected in other.delta.items():
            difference = float((one.delta[name] - expected).abs().max())
            scale = float(expected.abs().max())
            assert difference == difference and scale < float("inf")
            worst = max(worst, difference / max(scale, 1e-3))
    return worst


def equal(first: Params, second: Params) -> bool:
    return list(first) == list(second) and all(torch.equal(first[k], second[k]) for k in first)
