"""The optimizer a client steps with: torch's, or for plain SGD the same arithmetic without it.

A step of a small model takes a tenth of a millisecond, and half as much again goes into what
``torch.optim`` does around its arithmetic (hooks, profiler ranges, argument checks). Federated
simulations take such steps by the million, nearly all of them plain SGD's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from fl_app.server_optimizer import OptimizerFactory


class LocalOptimizer(Protocol):
    """Steps parameters along the gradients they hold."""

    def step(self) -> None:
        """Take one step."""
        ...

    def state_dict(self) -> Mapping[str, Any]:
        """Return what it remembers; a tree of tensors and plain values."""
        ...


class PlainSgd:
    """``w = w - lr (g + weight_decay w)``: the bits of ``torch.optim.SGD`` without momentum.

    Parameters without a gradient stay as they are.
    """

    def __init__(self, parameters: Sequence[Tensor], *, lr: float, weight_decay: float):
        self._parameters = parameters
        self._lr = lr
        self._weight_decay = weight_decay

    @property
    def rate(self) -> float | None:
        """The rate, if gradients are all that it steps by."""
        return None if self._weight_decay else self._lr

    @torch.no_grad()
    def step(self) -> None:
        """Take one step."""
        moved: list[Tensor] = []
        gradients: list[Tensor] = []
        for parameter in self._parameters:
            if parameter.grad is not None:
                moved.append(parameter)
                gradients.append(parameter.grad)
        if self._weight_decay:
            decayed = torch._foreach_add(gradients, moved, alpha=self._weight_decay)
            gradients = list(decayed)
        torch._foreach_add_(moved, gradients, alpha=-self._lr)

    def state_dict(self) -> Mapping[str, Any]:
        """Return nothing: it remembers nothing."""
        return {}


def make_local_optimizer(
    factory: OptimizerFactory,
    parameters: Sequence[Tensor],
    state: Mapping[str, Any] | None = None,
) -> LocalOptimizer:
    """Return the optimizer that a factory describes, over these parameters.

    Args:
        factory: Such as ``partial(torch.optim.SGD, lr=0.1)``.
        parameters: What it steps.
        state: State to continue from, or None to start afresh.
    """
    if state is None and isinstance(factory, partial) and factory.func is torch.optim.SGD:
        options = {name: value for name, value in factory.keywords.items() if value}
        if not factory.args and options.keys() <= {"lr", "weight_decay"}:
            return PlainSgd(
                parameters,
                lr=options.get("lr", 0.0 if "lr" in factory.keywords else 1e-3),
                weight_decay=options.get("weight_decay", 0.0),
            )
    optimizer = factory(parameters)
    if state:
        # A copy: torch keeps the given tensors, and steps them in place.
        optimizer.load_state_dict(deepcopy(dict(state)))
    return optimizer


ELEMENTWISE: Final = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
)
"""Optimizers that step every weight by what they know of that weight alone."""


_COUNTED: Final = frozenset(("step", "mu_product"))
"""What these remember of their steps; all else they remember of weights, which may be scalars."""


def steps_elementwise(factory: OptimizerFactory) -> bool:
    """Return whether a factory is known to make optimizers that step each weight by itself."""
    return isinstance(factory, partial) and factory.func in ELEMENTWISE


class StackedOptimizer:
    """One optimizer for the weights of many clients: steps each client's as its own would.

    Clients that have no step left are always the last ones: `active` leaves them out.

    Args:
        factory: Such as ``partial(torch.optim.SGD, lr=0.1)``; `steps_elementwise`.
        weights: Each ``(clients, *shape)``; stepped in place.
        states: What each client's optimizer remembers, or None; all of the same `age`.
    """

    def __init__(
        self,
        factory: OptimizerFactory,
        weights: Sequence[Tensor],
        states: Sequence[Mapping[str, Any] | None],
    ) -> None:
        self._factory = factory
        self._weights = weights
        self._local = [weight.detach().requires_grad_() for weight in weights]
        self._optimizer = make_local_optimizer(factory, self._local, _stacked(states))
        self._memory: Mapping[str, Any] = {}
        self._left: list[tuple[int, dict[int, dict[str, Any]]]] = []

    def active(self, clients: int) -> Sequence[Tensor]:
        """Return the weights ``(clients, *shape)`` of the first clients, which alone are stepped.

        Args:
            clients: At most as many as at the call before.
        """
        if clients != len(self._local[0]):
            self._left.append((clients, self._counted()))
            before, self._local = self._local, [w[:clients].detach() for w in self._weights]
            for tensor in self._local:
                tensor.requires_grad_()
            if isinstance(self._optimizer, torch.optim.Optimizer):
                _hand_over(self._optimizer, before, self._local)
            else:
                self._optimizer = make_local_optimizer(self._factory, self._local)
        return self._local

    @property
    def rate(self) -> float | None:
        """The rate of an optimizer that does nothing but step down gradients at it; else None."""
        return self._optimizer.rate if isinstance(self._optimizer, PlainSgd) else None

    def step(self) -> None:
        """Step the active clients' weights along the gradients they hold."""
        self._optimizer.step()
        if not self._memory:  # of all clients; what is left out later stays in these tensors
            self._memory = self._optimizer.state_dict()

    def state_of(self, client: int) -> Mapping[str, Any]:
        """Return what one client's optimizer remembers, as its ``state_dict()`` would give it."""
        if not self._memory:
            return {}
        left = (counted for clients, counted in self._left if clients <= client)
        counted = next(left, None) or self._counted()
        state = {
            number: {
                name: value[client].clone() if isinstance(value, Tensor) else value
                for name, value in entries.items()
                if name not in _COUNTED
            }
            | counted[number]
            for number, entries in self._memory["state"].items()
        }
        return {"state": state, "param_groups": self._memory["param_groups"]}

    def _counted(self) -> dict[int, dict[str, Any]]:
        return {
            number: {name: entries[name].clone() for name in entries.keys() & _COUNTED}
            for number, entries in self._memory.get("state", {}).items()
        }

    @staticmethod
    def age(state: Mapping[str, Any] | None) -> tuple[tuple[str, float], ...]:
        """Return what of a state must be alike in clients that are stepped together."""
        return tuple(sorted(_scalars(state).items()))


def _scalars(state: Mapping[str, Any] | None) -> dict[str, float]:
    """Return what an optimizer counts, and 0 for the names of what it remembers of weights."""
    found: dict[str, float] = {}
    for entries in (state or {}).get("state", {}).values():
        for name, value in entries.items():
            found[name] = float(value) if name in _COUNTED else 0.0
    return found


def _stacked(states: Sequence[Mapping[str, Any] | None]) -> Mapping[str, Any] | None:
    """Return the states of several clients as that of one optimizer over stacked weights."""
    known = [state for state in states if state]
    if not known:
        return None
    return {
        "param_groups": known[0]["param_groups"],
        "state": {
            number: {
                name: torch.stack([state["state"][number][name] for state in known])
                if isinstance(value, Tensor) and name not in _COUNTED
                else value
                for name, value in entries.items()
            }
            for number, entries in known[0]["state"].items()
        },
    }


def _hand_over(
    optimizer: torch.optim.Optimizer, before: Sequence[Tensor], after: Sequence[Tensor]
) -> None:
    """Have an optimizer step the first rows of what it stepped before."""
    for group in optimizer.param_groups:
        group["params"] = list(after)
    for old, new in zip(before, after, strict=True):
        if old in optimizer.state:
            optimizer.state[new] = {
                name: value[: len(new)] if isinstance(value, Tensor) and value.dim() else value
                for name, value in optimizer.state.pop(old).items()
            }
