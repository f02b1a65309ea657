"""What is refused before the first round because it would break, or void, a privacy guarantee.

Every message names the key, the value, the rule and the way out. Nothing here is a warning.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fl_app.privacy.accounting import UnaccountableError, accountant_named
from fl_app.privacy.base import Privacy
from fl_app.selection import Selector, most_participations, secret_sample_rate
from fl_app.tasks.base import Task
from fl_app.training import LocalTraining
from fl_app.types import ClientId, ConfigError, FederatedData, PrivacyUnit

log = logging.getLogger(__name__)

_CHECKED_CLIENTS = 1000
_MOST_DRAWS = 200_000  # of a schedule of cohorts, to learn whom it asks most often


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
        _check_layers(model)
        _check_ties(model)
    _check_sizes(privacy, data, training)


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


def planned_rounds(
    selector: Selector, clients: Sequence[ClientId], *, rounds: int, seed: int
) -> int:
    """Return in how many rounds the client that is asked most often takes part.

    Exact, from the schedule of cohorts that the seed gives; for schedules too long to draw, an
    upper bound that holds for all clients but with probability 10^-6 (Chernoff and union bounds).
    All rounds where coins decide: who is asked is nobody's to know.
    """
    if secret_sample_rate(selector) is not None:
        return rounds
    wanted = selector.wanted(len(clients))
    if rounds * wanted <= _MOST_DRAWS:
        return max(1, most_participations(selector, clients, rounds=rounds, seed=seed))
    mean = rounds * wanted / len(clients)
    slack = math.log(len(clients) * 1e6)
    above = slack / 3 + math.sqrt(slack * slack / 9 + 2 * slack * mean)
    return min(rounds, math.ceil(mean + above))
