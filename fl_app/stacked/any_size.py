"""Recordings of a step that are played for any number of clients and of records.

A recording holds sizes as numbers. So the step is recorded for two pairs of numbers that have
nothing in common, and where the two recordings differ, the number is a multiple of the clients, of
the records of a client, or of all records, and of one of these alone; if it is not, there is no
such recording. That the one found is right for further sizes has to be checked for each.
"""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

log = logging.getLogger(__name__)

Step: TypeAlias = Callable[..., Sequence[Tensor]]
"""Tensors -> tensors; a function of their shapes and values, and of nothing else."""

_ASIDE = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
_SIZES = ((3, 5), (4, 7))
"""Clients, and records of each, that are recorded: 3c = 5d and 4c = 7d have no solution but 0."""


class _SizeError(Exception):
    """Two recordings differ in something that is no size."""


def graph_of(step: Step, tensors: Sequence[Tensor]) -> fx.GraphModule:
    """Return the operations of a step, gradients included, on copies of tensors."""
    copies = [tensor.detach().clone() for tensor in tensors]
    made = make_fx(lambda *given: tuple(step(*given)))(*copies)
    for node in list(made.graph.nodes):
        if node.op == "call_function" and node.target in _ASIDE:
            node.replace_all_uses_with(node.args[0])
            made.graph.erase_node(node)
    made.recompile()
    return made


def of_any_size(step: Step, tensors: Sequence[Tensor], by_record: int) -> Step | None:
    """Return a recording of a step; None if it cannot be had.

    Whatever it is that fails here, the step itself works, and goes on being used.

    Args:
        step: The step.
        tensors: What it is given.
        by_record: How many of these, the first ones, have a row for each record, client by client;
            the others have one for each client.
    """
    try:
        one, other = (
            graph_of(step, _resized(tensors, by_record, clients, records))
            for clients, records in _SIZES
        )
        _Sizes(one.graph).put_in(other.graph)
        for node in one.graph.nodes:
            _for_script(node)
        one.recompile()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch.jit is not developed any more
            script: Any = torch.jit.script
            recorded: Step = torch.no_grad()(script(one))
    except Exception as error:
        log.debug("A step cannot be recorded for any size: %s", error)
        return None
    return recorded


def _resized(tensors: Sequence[Tensor], by_record: int, clients: int, records: int) -> list[Tensor]:
    """Return tensors of as many rows, those given over and over."""
    rows = [clients * records if k < by_record else clients for k in range(len(tensors))]
    return [
        tensor.detach()[torch.arange(count) % tensor.shape[0]]
        for tensor, count in zip(tensors, rows, strict=True)
    ]


class _Sizes:
    """The sizes in a recording's graph, of which the first input has the records' number of rows.

    Args:
        graph: For the first of `_SIZES`; sizes are put into it.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._nodes = list(graph.nodes)
        inputs = [node for node in self._nodes if node.op == "placeholder"]
        with graph.inserting_after(inputs[-1]):
            clients = graph.call_method("size", (inputs[-1], 0))
        with graph.inserting_after(clients):
            rows = graph.call_method("size", (inputs[0], 0))
        with graph.inserting_after(rows):
            records = graph.call_function(operator.floordiv, (rows, clients))
        (a, b), (c, d) = _SIZES
        self._known = ((clients, a, c), (records, b, d), (rows, a * b, c * d))
        self._twins: dict[fx.Node, fx.Node] = {}

    def put_in(self, other: fx.Graph) -> None:
        """Put sizes in the place of numbers that differ from those of the second of `_SIZES`.

        Raises:
            _SizeError: Something else differs.
            ValueError: One graph is longer.
        """
        for node, twin in zip(self._nodes, list(other.nodes), strict=True):
            if node.op != twin.op or (node.op != "placeholder" and node.target != twin.target):
                raise _SizeError(f"{node.target} and {twin.target}")
            if node.op == "get_attr":
                self._check_constant(node, twin)
            with self._graph.inserting_before(node):
                node.args = self._merged(node.args, twin.args)
                node.kwargs = self._merged(node.kwargs, twin.kwargs)
            self._twins[node] = twin

    def _check_constant(self, node: fx.Node, twin: fx.Node) -> None:
        one, other = (getattr(n.graph.owning_module, str(n.target)) for n in (node, twin))
        if not (isinstance(one, Tensor) and one.shape == other.shape and torch.equal(one, other)):
            raise _SizeError(f"constant {node.target}")

    def _merged(self, one: Any, other: Any) -> Any:
        if isinstance(one, fx.Node):
            if self._twins.get(one) is not other:
                raise _SizeError(f"{one} and {other}")
            return one
        if isinstance(one, list | tuple):
            merged = [self._merged(*pair) for pair in zip(one, other, strict=True)]
            return merged if isinstance(one, list) else tuple(merged)
        if isinstance(one, dict):
            return {key: self._merged(value, other[key]) for key, value in one.items()}
        if type(one) is type(other) and one == other:
            return one
        if type(one) is type(other) is int:
            return self._size(one, other)
        raise _SizeError(f"{one!r} and {other!r}")

    def _size(self, one: int, other: int) -> fx.Node:
        for node, first, second in self._known:
            times, rest = divmod(one, first)
            if not rest and times * second == other:
                if times == 1:
                    return node
                return self._graph.call_function(operator.mul, (node, times))
        raise _SizeError(f"{one} and {other}")


def _for_script(node: fx.Node) -> None:
    """Write a node as torch.jit.script reads it; which overload is meant, it finds by the types."""
    if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        node.target = node.target.overloadpacket
        node.kwargs = {
            key: value.type if isinstance(value, torch.device) else value
            for key, value in node.kwargs.items()
        }
