"""Whether the clients of a simulation are trained side by side, and if not, why not."""

from __future__ import annotations

import re

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fl_app.cohort import CohortTrainer
from fl_app.components import Components
from fl_app.local_optimizer import steps_elementwise
from fl_app.objective import is_elementwise
from fl_app.stacked.layer import NotStackableError
from fl_app.stacked.probe import Stackable, stackable
from fl_app.types import ConfigError, Examples

HEAVY_FLOPS = 5e8
"""Operations of one client's step above which asking for them no longer is what takes the time."""
CHUNK_BYTES = 32 << 20
"""Memory that one core of a CPU works in: more falls out of its caches."""


class HeavyModelError(NotStackableError):
    """A model is not asked to train side by side, because alone it keeps a core busy."""


def check_device(key: str, name: str) -> None:
    """Refuse what is no name of a device. Raises `ConfigError`."""
    if not re.fullmatch(r"cpu|auto|cuda(:\d+)?", name):
        raise ConfigError(f"{key}={name} is not known: choose cpu, cuda, cuda:N or auto.")


def device_of(key: str, name: str) -> torch.device:
    """Return the device of a name: cpu, cuda, cuda:N, or auto for a GPU if there is one.

    Args:
        key: Who is to blame if it is not there.
        name: Its name.

    Raises:
        ConfigError: It is not there, or there is no such name.
    """
    check_device(key, name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"{key}={name}: torch sees {torch.cuda.device_count()} GPUs here. Choose cpu or auto, "
            "or install a build of torch for this machine's GPU."
        )
    return device


def cohort_trainer(
    components: Components, *, device: torch.device, chunk_bytes: int | None
) -> CohortTrainer:
    """Return what trains a cohort of these components' clients side by side.

    Args:
        components: Task, data, and how clients train.
        device: Where.
        chunk_bytes: Memory that a process may take for it, about; None for what suits the device.

    Raises:
        NotStackableError: They have to be trained one by one; the message says why.
    """
    training, task = components.training, components.task
    if not components.client_app.is_ours:
        raise NotStackableError(f"client_app.app={components.client_app.app} trains them")
    if training.early_stopping_patience is not None:
        raise NotStackableError("client.early_stopping_patience lets each of them stop by itself")
    if not steps_elementwise(training.optimizer):
        raise NotStackableError(
            "client.optimizer is none of torch's that step each weight by itself, such as "
            "torch.optim.SGD or torch.optim.Adam"
        )
    objective = components.algorithm.objective
    if not is_elementwise(objective):
        raise NotStackableError(f"{type(objective).__name__} does not say that it is_elementwise")
    if getattr(components.privacy, "max_physical_batch", None) is not None:
        raise NotStackableError("privacy.max_physical_batch bounds what is held in memory at once")
    model = task.build_model().to(device)
    examples = _some(components, device)
    if device.type == "cpu":
        try:
            _check_weight(model, examples, training.batch_size)
        except NotStackableError:
            raise
        except Exception as error:  # of the model's own code, which training may never reach
            raise NotStackableError(f"{type(error).__name__}: {error}") from error
    private = _clips_records(components)
    found = stackable(model, task.losses, examples, private=private)
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES if device.type == "cpu" else _free_bytes(device) // 4
    return CohortTrainer(
        model=found.stacked(),
        task=task,
        training=training,
        objective=objective,
        once=found.once,
        client_bytes=_client_bytes(found, training.batch_size, private=private),
        chunk_bytes=chunk_bytes,
    )


def _clips_records(components: Components) -> bool:
    """Return whether training itself is private: local privacy only protects what it gives."""
    count = len(components.data.examples_of(components.data.clients[0]).train)
    training = components.training
    plan = components.privacy.steps(count, batch_size=training.batch_size, epochs=training.epochs)
    return plan is not None


def _some(components: Components, device: torch.device) -> Examples:
    """Return records of the first client, or if it has but one, of the next as well."""
    data = components.data
    parts = [data.examples_of(data.clients[0]).train]
    if len(parts[0]) == 1 and len(data.clients) > 1:
        parts.append(data.examples_of(data.clients[1]).train)
    inputs = torch.cat([part.inputs[:64] for part in parts])
    targets = torch.cat([part.targets[:64] for part in parts])
    return Examples(inputs=inputs.to(device), targets=targets.to(device))


def _check_weight(model: nn.Module, examples: Examples, batch_size: int) -> None:
    """Refuse a model that keeps a core busy by itself: side by side would only take memory."""
    few = examples.inputs[:2]
    was_training = model.training
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(few)
    model.train(was_training)
    # A backward pass takes about twice the operations of the forward pass.
    flops = 3 * counter.get_total_flops() / len(few) * batch_size
    if flops > HEAVY_FLOPS:
        raise HeavyModelError(
            f"a step of one of them takes {flops:.1e} operations, which keeps a core busy by itself"
        )


def _client_bytes(found: Stackable, batch_size: int, *, private: bool) -> int:
    """Return about how much memory one client takes while it trains beside others."""
    size = sum(p.numel() * p.element_size() for p in found.model.parameters())
    # Poisson batches are wider than expected, and gradients of records may be made.
    width = batch_size + 3 * batch_size**0.5 if private else batch_size
    made = size if private and found.whole else 0
    return int(width * (2 * found.record_bytes + made) + 6 * size)


def _free_bytes(device: torch.device) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)


CORES: int = torch.get_num_threads()
"""Threads that torch would use by itself: the cores, or what ``OMP_NUM_THREADS`` says."""
