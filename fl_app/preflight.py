"""What is tried before the first round, so that a run does not find it out client by client.

Components of users come from anywhere: whatever theirs raise or return is answered in one message
that names the key. Nothing here trains or writes anything.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from fl_app.aggregation import Aggregation, combine, min_updates
from fl_app.params import read_params
from fl_app.selection import Selector, secret_sample_rate
from fl_app.server_optimizer import OptimizerFactory
from fl_app.tasks.base import Task
from fl_app.tasks.checks import check_model
from fl_app.training import evaluate
from fl_app.types import (
    ClientId,
    ClientUpdate,
    ConfigError,
    Examples,
    FederatedData,
    FlAppError,
    Params,
    TooFewUpdatesError,
)

_TRIED_RECORDS = 64
_TRIED_UPDATES = 8  # updates a rule is tried on, unless it needs more


@contextmanager
def naming(key: str, what: str) -> Generator[None, None, None]:
    """Turn whatever the block raises into a `ConfigError` that names the key.

    Our own errors name theirs already, and pass.

    Args:
        key: Of the component that the block calls, such as "task".
        what: What it was asked to do, such as "load its records".
    """
    try:
        yield
    except FlAppError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{key} failed to {what}: {type(error).__name__}"
            f"{f' ({reason})' if reason else ''}. Mend the class that {key}._target_ names; "
            "HYDRA_FULL_ERROR=1 shows where it was raised."
        ) from error


def check_task(task: Task, data: FederatedData) -> nn.Module:
    """Return a new model of the task, once it is known to fit the task's records and loss.

    Raises:
        ConfigError: They do not fit, or one of the task's methods raises.
    """
    with naming("task", "give its records"):
        probe = data.held_out or data.examples_of(data.clients[0]).train
    with naming("task", "build its model"):
        model = task.build_model()
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"task: build_model() gave a {type(model).__name__}: it must return a new "
            "torch.nn.Module at every call."
        )
    check_model(task, model, probe)
    return model


def check_metrics(task: Task, examples: Examples) -> None:
    """Measure an untrained model on a few records: what every round does on the server.

    Raises:
        ConfigError: The task's metrics raise, or are not numbers.
    """
    few = examples.take(torch.arange(min(len(examples), _TRIED_RECORDS)))
    model = task.build_model()
    with naming("task", "measure a model by its metrics()"):
        measured = evaluate(model, task, few, params=read_params(model)).metrics
    for name, value in measured.items():
        if not isinstance(value, float | int):
            raise ConfigError(
                f"task: metrics() gave {name}={value!r:.80}: every metric must be a float."
            )


def check_optimizer(key: str, make: OptimizerFactory) -> None:
    """Make an optimizer once, so that a bad value is told now and not by every client."""
    try:
        make([torch.nn.Parameter(torch.zeros(1))])
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{key} refuses its values: {error}") from error


def check_selector(selector: Selector, clients: Sequence[ClientId], *, seed: int) -> None:
    """Draw the first cohort, which must be a list of different clients that exist.

    Raises:
        ConfigError: It is not, or the selector asks for more clients than there are.
    """
    with naming("selection", "say how many clients it wants"):
        wanted = selector.wanted(len(clients))
    if not isinstance(wanted, int) or not 0 < wanted <= len(clients):
        raise ConfigError(
            f"selection: wanted() gave {wanted!r:.80} for a population of {len(clients)} clients: "
            "it must return how many updates a round aggregates, from 1 to the population."
        )
    if selector.min_clients > len(clients):
        raise ConfigError(
            f"selection.min_clients={selector.min_clients} exceeds the population of "
            f"{len(clients)} clients: lower it or raise partition.num_clients."
        )
    with naming("selection", "select a cohort"):
        cohort = selector.select(clients, round=1, seed=seed)
    if not isinstance(cohort, list) or not all(isinstance(client, str) for client in cohort):
        raise ConfigError(
            f"selection: select() gave {cohort!r:.80}: it must return a list of client ids."
        )
    # A cohort of secret coins has the size they give it.
    least = wanted if secret_sample_rate(selector) is None else 0
    if len(set(cohort)) < max(len(cohort), least):
        raise ConfigError(
            f"selection: select() gave {len(set(cohort))} different clients in a list of "
            f"{len(cohort)}, and wanted() asks for {wanted}: name that many, and each once."
        )
    if strange := [client for client in cohort if client not in clients]:
        raise ConfigError(
            f"selection: select() names client {strange[0]!r:.80}, which is not one of those it "
            "was given: return entries of `clients`."
        )


def check_cohort(rule: Aggregation, wanted: int) -> None:
    """Refuse a rule that needs more updates than a round can ever bring.

    Args:
        rule: Says by ``min_updates`` what it needs.
        wanted: Updates a round aggregates at most.
    """
    needed = min_updates(rule)
    if wanted < needed:
        raise ConfigError(
            f"strategy.aggregation={rule} needs {needed} updates a round, and selection gives it "
            f"{wanted}: every round would keep the old model. Raise selection.fraction or "
            "selection.count, let more clients take part with partition.num_clients, or withstand "
            "fewer hostile ones."
        )


def check_aggregation(rule: Aggregation, model: Params, wanted: int) -> None:
    """Have a rule combine a few small made-up updates of the model's shapes.

    Raises:
        ConfigError: It raises, or gives anything but finite numbers in the model's shapes.
    """
    count = min(wanted, max(min_updates(rule), _TRIED_UPDATES))
    updates = [
        ClientUpdate(
            client=str(number),
            round=1,
            delta=_constant(model, 0.001 * number),
            num_examples=number + 1,
        )
        for number in range(count)
    ]
    try:
        combine(rule, updates, model)
    except TooFewUpdatesError:
        return  # it needs more than it was tried with, and did not say so
    except ConfigError:
        raise
    except FlAppError as error:
        raise ConfigError(str(error)) from error


def _constant(model: Params, value: float) -> Mapping[str, torch.Tensor]:
    return {name: torch.full_like(tensor, value) for name, tensor in model.items()}
