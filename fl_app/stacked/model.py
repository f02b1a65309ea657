"""A model's architecture with weights of many clients in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn

from fl_app.params import copy_into, entries_of
from fl_app.stacked.layer import Entry, NotStackableError, Pass, StackedLayer
from fl_app.stacked.layers import StackedConv, StackedEmbedding, StackedLinear, StackedScale
from fl_app.stacked.pooling import MaxPool2x2, replaces
from fl_app.stacked.vmapped import VmappedLayer
from fl_app.types import Params

_RULES = frozenset(
    {
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.GroupNorm,
        nn.LayerNorm,
        nn.Embedding,
    }
)
"""Layers with a rule; a subclass of one may compute anything, and has none."""


class StackedModel:
    """Computes a model for a stack of clients, each with weights of its own.

    Layers that most models consist of have rules of their own; any other module with weights of
    its own is mapped over clients by ``torch.func``. What has no weights is used as it is, on all
    records at once: a module in which records, or clients, are not independent of one another is
    not computed right, which `fl_app.stacked.probe` finds out.

    Args:
        model: The model, on the device to compute on; copied.
        whole: Map the whole model by ``torch.func``, whatever it consists of.

    Attributes:
        names: Names of the trainable parameters, in the order in which weights are taken.
        device: Where it is computed.
    """

    def __init__(self, model: nn.Module, *, whole: bool = False) -> None:
        skeleton = deepcopy(model).train()
        entries = entries_of(skeleton)
        self.names = tuple(name for name, tensor in entries.items() if tensor.requires_grad)
        if not self.names:
            raise NotStackableError("the model has no parameter to train")
        self.device = entries[self.names[0]].device
        self._shared = {n: tensor for n, tensor in entries.items() if not tensor.requires_grad}
        self._names_by_id = {id(tensor): name for name, tensor in entries.items()}
        # With the module that was replaced, whose id could be another's once it is gone.
        self._made: dict[int, tuple[nn.Module, nn.Module]] = {}
        self._coming = Pass()
        self._layers: list[StackedLayer] = []
        self.root = self._mapped(skeleton) if whole else self._stacked(skeleton)

    def load(self, params: Params) -> bool:
        """Set what all clients share: buffers, and parameters that are not trained.

        Returns:
            Whether any of it has changed.
        """
        changed = any(not torch.equal(own, params[n]) for n, own in self._shared.items())
        if changed:
            copy_into(self._shared, params)
        return changed

    def signatures(self) -> list[tuple[bool, ...] | None]:
        """Return which arguments of mapped layers have a dimension of records, as passes told."""
        return [layer.signature for layer in self._layers if isinstance(layer, VmappedLayer)]

    def settle(self, signatures: Sequence[tuple[bool, ...] | None]) -> None:
        """Have that known beforehand."""
        layers = [layer for layer in self._layers if isinstance(layer, VmappedLayer)]
        for layer, signature in zip(layers, signatures, strict=True):
            layer.signature, layer.is_settled = signature, True

    def bind(self, weights: Sequence[Tensor], records: int) -> None:
        """Set the weights of the coming passes, and how many records these will have in all.

        Args:
            weights: Each ``(clients, *shape)``, in the order of `names`.
            records: A multiple of the number of clients.
        """
        self._coming.weights = dict(zip(self.names, weights, strict=True))
        self._coming.records = records

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the outputs ``(n, *)`` of records ``(n, *)``, client by client."""
        outputs: Tensor = self.root(inputs)
        return outputs

    @contextmanager
    def taping(self) -> Iterator[list[Entry]]:
        """Have backward passes leave entries in the list in place of gradients of weights."""
        tape = self._coming.tape = []
        try:
            yield tape
        finally:
            self._coming.tape = None

    @contextmanager
    def descending(self, rate: float) -> Iterator[None]:
        """Have backward passes step the weights down their gradients, and leave none."""
        self._coming.rate = rate
        try:
            yield
        finally:
            self._coming.rate = None

    def by_name(
        self, gradients: Sequence[tuple[StackedLayer, Sequence[Tensor]]]
    ) -> list[Tensor | None]:
        """Return gradients of layers in the order of `names`; None where there is none."""
        named: dict[str, Tensor] = {}
        for layer, tensors in gradients:
            for name, tensor in zip(layer.parameter_names, tensors, strict=True):
                named[name] = named[name] + tensor if name in named else tensor
        return [named.get(name) for name in self.names]

    @property
    def uses_weights_once(self) -> bool:
        """Whether the one pass made so far has used each weight in one place, by a rule."""
        once = all(layer.passes == 1 for layer in self._layers)
        return once and not self.shares_weights and not self.has_mapped_layers

    @property
    def has_mapped_layers(self) -> bool:
        """Whether some layer has no rule of its own."""
        return any(isinstance(layer, VmappedLayer) for layer in self._layers)

    @property
    def shares_weights(self) -> bool:
        """Whether some weight belongs to several layers."""
        names = [name for layer in self._layers for name in layer.parameter_names]
        return len(names) != len(set(names))

    def _stacked(self, module: nn.Module) -> nn.Module:
        """Return what stands for a module: itself, with its parts replaced, or a stacked layer."""
        if id(module) not in self._made:
            self._made[id(module)] = (module, self._new(module))
        return self._made[id(module)][1]

    def _new(self, module: nn.Module) -> nn.Module:
        if replaces(module):
            return MaxPool2x2()
        if not any(p.requires_grad for p in module.parameters()):
            return self._with_parts(module)
        own = list(module.parameters(recurse=False))
        if not own and not _is_hooked(module):
            return self._with_parts(module)
        if all(p.requires_grad for p in own) and not _is_hooked(module):
            names = [self._names_by_id[id(p)] for p in own]
            layer = _with_rule(module, names, self._coming)
            if layer is not None:
                self._layers.append(layer)
                return layer
        return self._mapped(module)

    def _with_parts(self, module: nn.Module) -> nn.Module:
        for name, part in module.named_children():
            setattr(module, name, self._stacked(part))
        return module

    def _mapped(self, module: nn.Module) -> nn.Module:
        names = [self._names_by_id[id(p)] for p in module.parameters() if p.requires_grad]
        layer = VmappedLayer(names, self._coming, module)
        self._layers.append(layer)
        return layer


def _with_rule(module: nn.Module, names: Sequence[str], coming: Pass) -> StackedLayer | None:
    """Return the stacked layer that stands for a module by a rule, or None."""
    if type(module) not in _RULES:
        return None
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return StackedConv(names, coming, module) if module.padding_mode == "zeros" else None
    if isinstance(module, nn.GroupNorm | nn.LayerNorm):
        return StackedScale(names, coming, module)
    if isinstance(module, nn.Embedding):
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        return StackedEmbedding(names, coming, module) if plain else None
    return StackedLinear(names, coming)


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
