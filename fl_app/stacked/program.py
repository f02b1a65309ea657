"""Steps that are asked for often enough are recorded, and played back without Python.

Of a small model's step most of the time goes into asking for its operations: Python, torch's
dispatch and its autograd. `Programs` records the operations that a step consists of, gradients
included, once for each shape it comes in, and has torch's interpreter play them back. A recording
gives the bits of what was recorded, which is checked before it is used.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

log = logging.getLogger(__name__)

RECORDED_AFTER = 16
"""Steps of one shape, at least, before it is recorded."""
RECORDING_S = 0.05
"""Seconds that a recording takes, as long as none has been made."""
MOST_PROGRAMS = 256
"""Shapes that are recorded at most."""

Step: TypeAlias = Callable[..., Sequence[Tensor]]
"""Tensors -> tensors; a function of their shapes and values, and of nothing else."""

_ASIDE = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class Programs:
    """Recordings of one step, by the shapes of what it is given.

    Args:
        step: The step. May write to the tensors it is given; must do the same to them whenever it
            is given the same.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._seen: dict[Any, tuple[int, float]] = {}
        self._programs: dict[Any, Step] = {}
        self._recording_s = RECORDING_S

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        """Return what the step returns.

        A shape is recorded once its steps have taken the time that a recording does, so that in a
        run of any length recordings cost no more than they could have saved.
        """
        if tensors[0].device.type != "cpu":  # where torch's interpreter would fuse operations
            return self._step(*tensors)
        key = tuple([(tensor.shape, tensor.dtype) for tensor in tensors])
        program = self._programs.get(key)
        if program is not None:
            return program(*tensors)
        count, taken_s = self._seen.get(key, (0, 0.0))
        due = count >= RECORDED_AFTER and taken_s >= self._recording_s
        if due and len(self._programs) < MOST_PROGRAMS:
            self._record(key, tensors)
        began = time.perf_counter()
        outputs = self._step(*tensors)
        self._seen[key] = (count + 1, taken_s + time.perf_counter() - began)
        return outputs

    def _record(self, key: Any, tensors: Sequence[Tensor]) -> None:
        began = time.perf_counter()
        # The step itself where it cannot be recorded: that is not to be tried again.
        self._programs[key] = _recorded(self._step, tensors) or self._step
        self._recording_s = time.perf_counter() - began


def _recorded(step: Step, tensors: Sequence[Tensor]) -> Step | None:
    """Return a recording of a step; None if it cannot be recorded, or gives other bits.

    Whatever it is that fails here, the step itself works, and goes on being used.
    """
    own = [[tensor.detach().clone() for tensor in tensors] for _ in range(6)]
    before = torch.default_generator.get_state()
    try:
        graph = make_fx(lambda *given: tuple(step(*given)))(*own[0])
        for node in list(graph.graph.nodes):
            if node.op == "call_function" and node.target in _ASIDE:
                node.replace_all_uses_with(node.args[0])
                graph.graph.erase_node(node)
        graph.recompile()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch.jit is not developed any more
            trace: Any = torch.jit.trace
            recorded: Step = trace(graph, tuple(own[1]), check_trace=False)
        torch.default_generator.set_state(before)
        with torch.no_grad():
            for rehearsal in (own[4], own[5]):  # the first runs are for profiling, and not the last
                recorded(*rehearsal)
            torch.default_generator.set_state(before)
            played = recorded(*own[2])
        torch.default_generator.set_state(before)
        expected = step(*own[3])
    except Exception as error:
        log.debug("A step cannot be recorded: %s", error)
        return None
    finally:  # when a step is recorded must not show in what is drawn after it
        torch.default_generator.set_state(before)
    pairs = zip([*played, *own[2]], [*expected, *own[3]], strict=True)
    if not all(_same_bits(one, other) for one, other in pairs):
        return None
    without_gradients: Step = torch.no_grad()(recorded)
    return without_gradients


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.nan_to_num(0.5), other.nan_to_num(0.5))
