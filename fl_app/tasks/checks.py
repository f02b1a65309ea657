"""Whether a task, its model and its records fit together, found out before the first round."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fl_app.tasks.base import Task
from fl_app.types import ConfigError, Examples

_PROBE = 8  # records the model is tried on


def check_model(task: Task, model: nn.Module, examples: Examples) -> None:
    """Raise unless the model maps the records to outputs that the task's loss accepts.

    The records must be finite floats with one target each; int64 targets are class numbers, each
    of which needs an output of its own; floating targets are left to the task's loss. The model
    is tried on the first few records in evaluation mode, without gradients, and keeps its mode.

    Args:
        task: Gives the loss, and its name for the message.
        model: On the device of the records.
        examples: Any part of the task's records; the check is as good as they are complete.

    Raises:
        ConfigError: Something does not fit; the message says what, and what to change.
    """
    check_examples(task, examples)
    inputs, targets = examples.inputs[:_PROBE], examples.targets[:_PROBE]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            outputs = _try_model(model, inputs)
            _check_outputs(task, outputs, examples.targets)
            losses = _try_loss(task, outputs, targets)
    finally:
        model.train(was_training)
    if not isinstance(losses, Tensor) or losses.shape != targets.shape:
        shape = getattr(losses, "shape", None)
        given = f"a {type(losses).__name__}" if shape is None else f"losses of shape {tuple(shape)}"
        raise ConfigError(
            f"task={task.name} gives {given} for {len(targets)} "
            'records: losses() must return one number per record, as with reduction="none".'
        )


def check_examples(task: Task, examples: Examples) -> None:
    """Raise unless the records are finite floats with one usable target each.

    Raises:
        ConfigError: Something does not fit; the message says what, and what to change.
    """
    inputs, targets = examples.inputs, examples.targets
    if len(inputs) != len(targets) or targets.ndim != 1 or not len(targets):
        raise ConfigError(
            f"task={task.name} has inputs of shape {tuple(inputs.shape)} and targets of shape "
            f"{tuple(targets.shape)}: both need the same length n >= 1, and targets shape (n,)."
        )
    if not inputs.is_floating_point():
        raise ConfigError(
            f"task={task.name} has inputs of type {inputs.dtype}: they must be floats, which is "
            "what a model is trained on; convert them in the task."
        )
    broken = ~inputs.isfinite().flatten(start_dim=1).all(dim=1)
    if bool(broken.any()):
        raise ConfigError(
            f"task={task.name} has a NaN or infinite input in {int(broken.sum())} of "
            f"{len(inputs)} records, first in record {int(broken.int().argmax())}: one of them "
            "is enough to break the global model; drop or impute them in the task."
        )
    if targets.dtype != torch.int64 and not targets.is_floating_point():
        raise ConfigError(
            f"task={task.name} has targets of type {targets.dtype}: class numbers must be int64, "
            "targets of a regression floats; convert them in the task."
        )
    if targets.dtype == torch.int64 and int(targets.min()) < 0:
        raise ConfigError(
            f"task={task.name} has the label {int(targets.min())}: classes are numbered from 0; "
            "renumber them, or drop the records without a label, in the task."
        )


def _try_model(model: nn.Module, inputs: Tensor) -> Tensor:
    try:
        outputs: Tensor = model(inputs)
    except Exception as error:  # a model of anybody's
        raise ConfigError(
            f"task.model cannot take inputs of shape (n, {_shape(inputs)}): {_said(error)}. Choose "
            "a task/model that fits the records, or mend its forward()."
        ) from error
    if not isinstance(outputs, Tensor):
        raise ConfigError(
            f"task.model gives a {type(outputs).__name__}: its forward() must return one tensor, "
            "with a row for every record."
        )
    return outputs


def _check_outputs(task: Task, outputs: Tensor, targets: Tensor) -> None:
    """Raise if a class number among all ``targets`` has no output of its own."""
    if targets.dtype != torch.int64:
        return
    largest = int(targets.max())
    if outputs.ndim != 2 or outputs.shape[1] <= largest:
        raise ConfigError(
            f"task.model gives outputs of shape (n, {_shape(outputs)}) but the labels of "
            f"task={task.name} reach {largest}: it needs shape (n, {largest + 1}) or wider, one "
            "output per class; raise the task's number of classes or mend the labels."
        )


def _try_loss(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    try:
        return task.losses(outputs, targets)
    except ConfigError:
        raise
    except Exception as error:  # a loss of anybody's
        raise ConfigError(
            f"the loss of task={task.name} cannot compare outputs of shape (n, "
            f"{_shape(outputs)}) with targets of type {targets.dtype}: {_said(error)}. Mend "
            "losses(), or the targets, in the task."
        ) from error


def _said(error: Exception) -> str:
    """Return an error as one line, with its kind where that says more than its text."""
    text = " ".join(str(error).split())[:300].rstrip(".")
    return (
        text if isinstance(error, RuntimeError | ValueError) else f"{type(error).__name__}: {text}"
    )


def _shape(batch: Tensor) -> str:
    """Return the shape of one record of a batch, as in "1, 8, 8"."""
    return ", ".join(map(str, batch.shape[1:]))
