"""Any other layer with weights, computed for all clients at once by ``torch.func``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fl_app.stacked.layer import NotStackableError, Pass, Reduce, StackedLayer, along


class VmappedLayer(StackedLayer):
    """A module, and all within it, mapped over clients by ``torch.vmap``.

    Which of its arguments have a dimension of records, and which are the same for all (a mask), is
    found out by two passes of different sizes (`fl_app.stacked.probe`), and then known.

    Args:
        parameter_names: As of `StackedLayer`; trainable ones, in the module's own order.
        coming: As of `StackedLayer`.
        module: The module; those of its parameters that are trained are not used.
    """

    def __init__(self, parameter_names: Sequence[str], coming: Pass, module: nn.Module) -> None:
        super().__init__(parameter_names, coming)
        self._own_names = tuple(n for n, p in module.named_parameters() if p.requires_grad)
        # In a list, so that torch does not take it for a part of this one.
        self._held = [module]
        self.signature: tuple[bool, ...] | None = None
        self.is_settled = False

    def train(self, mode: bool = True) -> VmappedLayer:
        """Set the mode of the module that is mapped, too."""
        self._held[0].train(mode)
        super().train(mode)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns, with all records in the first dimension."""
        leaves, structure = tree_flatten((args, kwargs))
        records = self.coming.records
        mapped = tuple(isinstance(v, Tensor) and v.dim() > 0 and len(v) == records for v in leaves)
        if self.is_settled and self.signature is not None:
            # A mask may happen to be as long as there are records: it is one all the same.
            known = zip(self.signature, mapped, strict=True)
            mapped = tuple(expected and is_so for expected, is_so in known)
        elif self.signature is None:
            self.signature = mapped
        if mapped != self.signature or not any(mapped):
            raise NotStackableError(
                f"{type(self._held[0]).__name__} got arguments whose first dimension is not always "
                "that of the records"
            )
        a = self.clients
        if self.coming.tape is not None:
            return self._taped(leaves, structure, mapped)
        folded = [
            _split(v, a) if is_mapped else v for v, is_mapped in zip(leaves, mapped, strict=True)
        ]

        def call(weights: Sequence[Tensor], *values: Any) -> Any:
            inner_args, inner_kwargs = tree_unflatten(list(values), structure)
            return self._call(weights, inner_args, inner_kwargs)

        dims = (0, *(0 if is_mapped else None for is_mapped in mapped))
        mapped_call: Any = torch.vmap(call, in_dims=dims, randomness="different")
        outputs = mapped_call(self.weights, *folded)
        return tree_map(_merged, outputs)

    def run(self, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """Keep the inputs."""
        a = weights[0].shape[0]

        def call(own: Sequence[Tensor], part: Tensor) -> Any:
            return self._call(own, (part,), {})

        mapped: Any = torch.vmap(call, randomness="error")
        outputs = mapped(tuple(weights), _split(x, a))
        if not isinstance(outputs, Tensor):
            raise NotStackableError(f"{type(self._held[0]).__name__} returns more than one tensor")
        return outputs.flatten(0, 1), (x,)

    def pull(self, kept: Sequence[Tensor], weights: Sequence[Tensor], d: Tensor) -> Tensor:
        """Return the input gradient, from a pass made again."""

        def one(w: Sequence[Tensor], part: Tensor, of_part: Tensor) -> Tensor:
            pull: Any = torch.func.vjp(lambda inputs: self._call(w, (inputs,), {}), part)[1]
            (of_inputs,) = pull(of_part)
            result: Tensor = of_inputs
            return result

        a = weights[0].shape[0]
        mapped: Any = torch.vmap(one)
        parts: Tensor = mapped(tuple(weights), _split(kept[0], a), _split(d, a))
        return parts.flatten(0, 1)

    def gradients(self, kept: Sequence[Tensor], d: Tensor) -> Sequence[Tensor]:
        """Return the sums of `_made`."""
        return [made.sum(1) for made in self._made(kept[0], d)]

    def per_record(self, kept: Sequence[Tensor], d: Tensor) -> tuple[Tensor, Reduce]:
        """Return squared norms of the gradients, which are made."""
        all_made = self._made(kept[0], d)  # each (a, b, *shape)
        if len(kept) > 1:
            blanked = kept[1].view(all_made[0].shape[0], -1)
            all_made = [made.masked_fill(along(blanked, made), 0) for made in all_made]
        squared = torch.stack([_flat(made).square().sum(2) for made in all_made]).sum(0)

        def reduce(factors: Tensor) -> Sequence[Tensor]:
            by_client = factors.view(squared.shape).unsqueeze(1)  # (a, 1, b)
            return [
                torch.bmm(by_client, _flat(made)).view(made.shape[0], *made.shape[2:])
                for made in all_made
            ]

        return squared.view(-1), reduce

    def blank(self, kept: Sequence[Tensor], records: Tensor) -> Sequence[Tensor]:
        """Return the inputs with zeros for some records, and which: at 0 norms have no gradient."""
        return [*super().blank(kept[:1], records), records]

    def _taped(self, leaves: Sequence[Any], structure: Any, mapped: Sequence[bool]) -> Tensor:
        if len(leaves) != 1:
            raise NotStackableError(
                f"{type(self._held[0]).__name__} has several arguments, and gradients of single "
                "records are had of layers with one"
            )
        return self.apply_to(leaves[0])

    def _made(self, x: Tensor, d: Tensor) -> Sequence[Tensor]:
        """Return each record's gradients, ``(a, b, *shape)``, from a pass made again."""

        def one(w: Sequence[Tensor], record: Tensor, of_record: Tensor) -> Any:
            pull: Any = torch.func.vjp(
                lambda inner: self._call(inner, (record.unsqueeze(0),), {}), tuple(w)
            )[1]
            return pull(of_record.unsqueeze(0))[0]

        over_records: Callable[..., Any] = torch.vmap(one, in_dims=(None, 0, 0))
        weights = tuple(weight.detach() for weight in self.weights)
        a = weights[0].shape[0]
        made: Sequence[Tensor] = torch.vmap(over_records)(weights, _split(x, a), _split(d, a))
        return made

    def _call(self, weights: Sequence[Tensor], args: Any, kwargs: Any) -> Any:
        named = dict(zip(self._own_names, weights, strict=True))
        return torch.func.functional_call(self._held[0], named, args, kwargs)


def _split(tensor: Tensor, clients: int) -> Tensor:
    return tensor.reshape(clients, tensor.shape[0] // clients, *tensor.shape[1:])


def _flat(made: Tensor) -> Tensor:
    """Return gradients ``(a, b, *shape)``, where a shape may be empty, as ``(a, b, size)``."""
    return made.reshape(*made.shape[:2], -1)


def _merged(value: Any) -> Any:
    return value.flatten(0, 1) if isinstance(value, Tensor) else value
