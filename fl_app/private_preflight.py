"""What is refused before the first round because it would break, or void, a privacy guarantee.

Every message names the key, the value, the rule and the way out. Nothing here is a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fl_app.privacy.accounting import UnaccountableError, accountant_named
from fl_app.privacy.base import Privacy
from fl_app.privacy.randomness import secret_randomness
from fl_app.tasks.base import Task
from fl_app.training import LocalTraining
from fl_app.types import ConfigError, Examples, FederatedData, PrivacyUnit

log = logging.getLogger(__name__)

_CHECKED_CLIENTS = 1000


@dataclass(frozen=True, kw_only=True)
class FixedTask:
    """A task whose model has its unfit layers replaced (``privacy.fix=true``).

    Attributes:
        task: The task as it is.
    """

    task: Task

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    def build_model(self) -> nn.Module:
        """Return a new model, its layers replaced by Opacus' ``ModuleValidator.fix``."""
        from opacus.validators import ModuleValidator

        model = self.task.build_model()
        fixed: nn.Module = ModuleValidator.fix(model)
        return fixed

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the task's loss of every record."""
        return self.task.losses(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, float]:
        """Return the task's metrics."""
        return self.task.metrics(outputs, targets)

    def changes(self) -> list[str]:
        """Return one line for each layer that is replaced."""
        before = dict(self.task.build_model().named_modules())
        after = dict(self.build_model().named_modules())
        return [
            f"{name}: {type(layer).__name__} becomes {type(after[name]).__name__}"
            for name, layer in before.items()
            if name in after and type(after[name]) is not type(layer)
        ]


def check_privacy(
    privacy: Privacy, model: nn.Module, data: FederatedData, training: LocalTraining
) -> None:
    """Refuse what would break the guarantee that is asked for.

    Args:
        privacy: What is asked.
        model: A new one of the task.
        data: Who owns how much.
        training: How clients train.

    Raises:
        ConfigError: Of the first thing found.
    """
    if privacy.unit is PrivacyUnit.NONE:
        return
    if training.early_stopping_patience is not None:
        raise ConfigError(
            f"client.early_stopping_patience={training.early_stopping_patience} chooses an epoch "
            f"by looking at private records, which privacy={privacy.unit} does not account for: "
            "set it to null."
        )
    if training.attack.fraction:
        raise ConfigError(
            f"client.attack={type(training.attack).__name__} simulates clients that keep to no "
            f"rule, so privacy={privacy.unit} would promise what they do not do: choose "
            "client/attack=none or privacy=none."
        )
    if privacy.unit is PrivacyUnit.RECORD:
        _check_buffers(model)
        _check_layers(model)
        _check_ties(model)
    _check_sizes(privacy, data, training)


def _check_buffers(model: nn.Module) -> None:
    """Refuse what is computed from the records without noise, and layers that mix records.

    Opacus looks at layers with parameters alone; a BatchNorm without any passes its check.
    """
    for name, layer in model.named_modules():
        mixes = isinstance(layer, _BatchNorm)
        if mixes or (isinstance(layer, _InstanceNorm) and layer.track_running_stats):
            raise ConfigError(
                f"task.model={type(model).__name__} has layers that mix records or keep figures "
                f"of them ({name}: {type(layer).__name__}): choose others, such as GroupNorm "
                "instead of BatchNorm, or set privacy.fix=true to have them replaced."
            )
    parameters = {id(parameter) for parameter in model.parameters()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and id(tensor) not in parameters:
            raise ConfigError(
                f"task.model={type(model).__name__} has the buffer {name}, which would leave the "
                "client as it is, without noise: make it a parameter, or no part of the "
                "state_dict (register_buffer(..., persistent=False))."
            )


def _check_layers(model: nn.Module) -> None:
    from opacus.validators import ModuleValidator

    errors = ModuleValidator.validate(model, strict=False)
    if not errors:
        return
    shown = "; ".join(" ".join(str(error).split()) for error in errors[:3])
    raise ConfigError(
        f"task.model={type(model).__name__} has layers that mix records or that have no gradient "
        f"of a single record ({shown}): choose others, such as GroupNorm instead of BatchNorm, or "
        "set privacy.fix=true to have them replaced."
    )


def check_ghost(
    model: nn.Module, losses: Callable[[Tensor, Tensor], Tensor], probe: Examples
) -> None:
    """Refuse ghost clipping of a model that uses a weight past its layer, as ``F.linear`` can.

    Ghost clipping takes norms from layers' own calls; what goes past them would not be bounded.

    Raises:
        ConfigError: The gradient of some single record is longer than its bound after clipping.
    """
    from fl_app.privacy.dp_sgd import DpSgd, GradientMode
    from fl_app.privacy.private_steps import private_steps

    bound = 1e-3
    mechanism = DpSgd(
        noise_multiplier=0.0,
        max_grad_norm=bound,
        expected_batch_size=1,
        gradients=GradientMode.GHOST,
    )
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    norms: list[float] = []

    def measure() -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients]))))

    randomness = secret_randomness()
    with private_steps(model, optimizer, losses, mechanism, randomness) as stepper:
        for k in range(min(4, len(probe))):
            stepper.step(probe.inputs[k : k + 1], probe.targets[k : k + 1], then=measure)
    if max(norms) > bound * 1.01:
        raise ConfigError(
            f"privacy.gradients=ghost cannot bound the gradients of task.model="
            f"{type(model).__name__}, which uses weights past their layers: choose "
            "privacy.gradients=hooks."
        )


def _check_ties(model: nn.Module) -> None:
    """Refuse parameters that stand in two places: their two gradients would be clipped apart."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = next((group for group in names.values() if len(group) > 1), None)
    if tied:
        raise ConfigError(
            f"task.model={type(model).__name__} ties the weights {' and '.join(tied)}: the "
            "gradient of one record is not known for them. Give each layer its own."
        )


def _check_sizes(privacy: Privacy, data: FederatedData, training: LocalTraining) -> None:
    """Try the smallest and the largest client: each can break its own rule."""
    sizes = client_sizes(data)
    for size in sorted({min(sizes), max(sizes)}):
        event = privacy.event(size, batch_size=training.batch_size, epochs=training.epochs)
        if event is None:
            continue
        try:
            accountant_named(privacy.accountant).epsilon([event], delta=privacy.delta)
        except UnaccountableError as error:
            raise ConfigError(
                f"privacy.noise_multiplier={event.noise_multiplier:g} is too small to account "
                f"({error}): raise it, or set privacy.target_epsilon."
            ) from error


def client_sizes(data: FederatedData) -> list[int]:
    """Return how many records clients train on: all, or the first 1,000 of a larger population."""
    return [len(data.examples_of(client).train) for client in data.clients[:_CHECKED_CLIENTS]]
