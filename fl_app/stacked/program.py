"""Steps that are asked for often enough are recorded, and played back without Python.

Of a small model's step most of the time goes into asking for its operations: Python, torch's
dispatch and its autograd. `Programs` records the operations that a step consists of, gradients
included, once for each shape it comes in, and has torch's interpreter play them back. A recording
gives the bits of what was recorded, which is checked for each shape before it is used.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fl_app.stacked.any_size import Step, graph_of, of_any_size

log = logging.getLogger(__name__)

RECORDED_AFTER = 16
"""Steps of one shape, at least, before it is recorded."""
RECORDING_S = 0.05
"""Seconds that a recording takes, as long as none has been made."""
MOST_PROGRAMS = 256
"""Shapes that are recorded at most, each by itself."""
MANY_SHAPES = 4
"""Shapes without a recording, at least, before one is made of all sizes."""
ANY_SIZE_RECORDINGS = 4
"""Recordings of one shape that one of all sizes takes the time of."""
ADOPTED_AFTER = 4
"""Steps of one shape before that one is tried on it, which takes the time of as many."""


class Programs:
    """Recordings of one step, by the shapes of what it is given.

    Args:
        step: The step. May write to the tensors it is given; must do the same to them whenever it
            is given the same.
        by_record: How many of its tensors, the first ones, have a row for each record, the others
            having one for each client, of which all have as many records; None: nothing is known.
    """

    def __init__(self, step: Step, *, by_record: int | None = None) -> None:
        self._step = step
        self._by_record = by_record
        self._seen: dict[Any, tuple[int, float]] = {}
        self._programs: dict[Any, Step] = {}
        self._recording_s = RECORDING_S
        self._taken_s = 0.0
        self._of_any_size: Step | None = None
        self._sizes_tried = by_record is None
        self._unfit: set[Any] = set()

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        """Return what the step returns.

        A shape is recorded once its steps have taken the time that a recording does, so that in a
        run of any length recordings cost no more than they could have saved. Of steps that come in
        many shapes one recording is made that plays all sizes (`fl_app.stacked.any_size`), once
        those not recorded have together taken the time it does; for a shape it is used as soon as
        it has given the step's bits there.
        """
        if tensors[0].device.type != "cpu":  # where torch's interpreter would fuse operations
            return self._step(*tensors)
        key = tuple([(tensor.shape, tensor.dtype) for tensor in tensors])
        program = self._programs.get(key)
        if program is not None:
            return program(*tensors)
        count, taken_s = self._seen.get(key, (0, 0.0))
        if not self._adopted(key, tensors, count):
            due = count >= RECORDED_AFTER and taken_s >= self._recording_s
            if due and len(self._programs) < MOST_PROGRAMS:
                self._record(key, tensors)
        began = time.perf_counter()
        outputs = self._step(*tensors)
        took_s = time.perf_counter() - began
        self._seen[key] = (count + 1, taken_s + took_s)
        self._taken_s += took_s
        return outputs

    def _adopted(self, key: Any, tensors: Sequence[Tensor], count: int) -> bool:
        """Return whether a shape is played by the recording of all sizes from now on."""
        many = len(self._seen) - len(self._programs) >= MANY_SHAPES
        if not self._sizes_tried and many and self._taken_s >= ANY_SIZE_RECORDINGS * RECORDING_S:
            self._sizes_tried = True
            with _nothing_drawn():
                self._of_any_size = of_any_size(self._step, tensors, self._by_record or 0)
        if self._of_any_size is None or count < ADOPTED_AFTER or key in self._unfit:
            return False
        if not _gives_the_same(self._of_any_size, self._step, tensors):
            self._unfit.add(key)
            return False
        self._programs[key] = self._of_any_size
        return True

    def _record(self, key: Any, tensors: Sequence[Tensor]) -> None:
        began = time.perf_counter()
        # The step itself where it cannot be recorded: that is not to be tried again.
        self._programs[key] = _recorded(self._step, tensors) or self._step
        self._recording_s = time.perf_counter() - began


def _recorded(step: Step, tensors: Sequence[Tensor]) -> Step | None:
    """Return a recording of a step; None if it cannot be recorded, or gives other bits.

    Whatever it is that fails here, the step itself works, and goes on being used.
    """
    with _nothing_drawn():
        try:
            graph = graph_of(step, tensors)
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that torch.jit is not developed any more
                trace: Any = torch.jit.trace
                recorded: Step = torch.no_grad()(
                    trace(graph, tuple(_copies(tensors)), check_trace=False)
                )
        except Exception as error:
            log.debug("A step cannot be recorded: %s", error)
            return None
    return recorded if _gives_the_same(recorded, step, tensors) else None


def _gives_the_same(recorded: Step, step: Step, tensors: Sequence[Tensor]) -> bool:
    """Return whether a recording gives the bits of the step, and leaves those in its tensors."""
    rehearsed, played_on, expected_on = (_copies(tensors) for _ in range(3))
    with _nothing_drawn() as at_the_start:
        try:
            for _ in range(2):  # the first runs are for profiling, and not the last
                recorded(*_copies(rehearsed))
            at_the_start()
            played = recorded(*played_on)
            at_the_start()
            expected = step(*expected_on)
        except Exception as error:
            log.debug("A recording cannot be played: %s", error)
            return False
    pairs = zip([*played, *played_on], [*expected, *expected_on], strict=True)
    return all(_same_bits(one, other) for one, other in pairs)


@contextmanager
def _nothing_drawn() -> Iterator[Callable[[], None]]:
    """Yield what puts torch's generator back to where it was; in the end that is done anyway.

    When a step is recorded must not show in what is drawn after it.
    """
    before = torch.default_generator.get_state()
    try:
        yield partial(_restore, before)
    finally:
        torch.default_generator.set_state(before)


def _restore(state: Tensor) -> None:
    torch.default_generator.set_state(state)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.nan_to_num(0.5), other.nan_to_num(0.5))
