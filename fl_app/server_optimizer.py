"""Server optimizers: the aggregated change, negated, is the gradient of one optimizer step.

Any ``torch.optim`` optimizer serves (FedOpt, Reddi et al. 2021, arXiv:2003.00295, Algorithm 1),
named in YAML by ``_target_`` with ``_partial_: true``; so its state checkpoints, and its
arithmetic is PyTorch's. Yogi is the one that PyTorch lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fl_app.types import ConfigError, Params

OptimizerFactory: TypeAlias = Callable[[Iterable[Tensor]], Optimizer]
"""Makes an optimizer over the given parameters, such as ``partial(torch.optim.SGD, lr=1.0)``."""

OptimizerState: TypeAlias = Mapping[str, Any]
"""An optimizer's ``state_dict()``."""


def apply_change(
    params: Params,
    change: Params,
    *,
    trainable: frozenset[str],
    make_optimizer: OptimizerFactory,
    state: OptimizerState | None,
) -> tuple[Params, OptimizerState]:
    """Return the global model after one server step, and the optimizer's new state.

    Pure: neither the parameters nor the state given are changed. Buffers (running statistics) are
    moved by the change itself; an adaptive step on a variance could make it negative.

    Args:
        params: Global parameters, name -> tensor.
        change: Aggregated change, same names and shapes.
        trainable: Names that the optimizer steps; the rest are buffers.
        make_optimizer: Server optimizer.
        state: What the last call returned, or None in the first round.
    """
    names = [name for name in params if name in trainable]
    stepped = [nn.Parameter(params[name].detach().clone()) for name in names]
    optimizer = make_optimizer(stepped)
    if state is not None:
        # A copy: torch keeps the given tensors, and steps them in place.
        optimizer.load_state_dict(deepcopy(dict(state)))
    for parameter, name in zip(stepped, names, strict=True):
        parameter.grad = -change[name]
    optimizer.step()
    new = {name: p.detach() for name, p in zip(names, stepped, strict=True)}
    return (
        {name: new[name] if name in new else params[name] + change[name] for name in params},
        optimizer.state_dict(),
    )


class Yogi(Optimizer):
    """Yogi as FedOpt uses it (Reddi et al. 2021, arXiv:2003.00295, Algorithm 2).

    ``m = b1 m + (1 - b1) g``, ``v = v - (1 - b2) g^2 sign(v - g^2)``,
    ``x = x - lr m / (sqrt(v) + eps)``; without bias correction, as in the paper.

    Args:
        params: Parameters to step.
        lr: Server learning rate (eta), > 0.
        betas: Decay of the first and second moment, each in [0, 1).
        eps: Degree of adaptivity (tau), > 0.
        initial_accumulator: Start value of v (v_{-1}); the paper asks for at least tau squared.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-3,
        initial_accumulator: float = 1e-6,
    ) -> None:
        rules = {
            f"lr={lr} must be > 0": lr > 0,
            f"betas={tuple(betas)} must each lie in [0, 1)": all(0 <= b < 1 for b in betas),
            f"eps={eps} must be > 0": eps > 0,
            f"initial_accumulator={initial_accumulator} must be >= 0": initial_accumulator >= 0,
        }
        for rule, holds in rules.items():
            if not holds:
                raise ConfigError(f"strategy.server_optimizer.{rule}.")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "initial_accumulator": initial_accumulator,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # closures not used
        """Take one step from the gradients that the parameters hold."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                gradient, state = parameter.grad, self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.full_like(parameter, group["initial_accumulator"])
                mean, square = state["exp_avg"], state["exp_avg_sq"]
                mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
                squared = gradient.square()
                square.addcmul_(torch.sign(square - squared), squared, value=-(1 - beta2))
                parameter.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-group["lr"])
