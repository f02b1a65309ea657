"""Small models of every kind, and tasks made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fl_app.params import read_params
from fl_app.types import Examples, Params

CLASSES = 3


class Sequences(nn.Module):
    """A linear layer on every position of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 6)
        self.outer = nn.Linear(6, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x).tanh()).mean(1)


class Words(nn.Module):
    """Means of embeddings."""

    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4, padding_idx=padding)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.words(x).mean(1).tanh())


class Attention(nn.Module):
    """Self-attention by torch's own layer, or a whole encoder layer."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layer = layer()
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.TransformerEncoderLayer):
            return self.out(self.layer(x).mean(1))
        return self.out(self.layer(x, x, x, need_weights=False)[0].mean(1))


class Blend(nn.Module):
    """A layer that nobody has a rule for."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(width))
        self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate * x + self.mix(x).tanh() * self.gate.sigmoid()


class Gain(nn.Module):
    """Has a parameter that is a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.out = nn.Parameter(torch.tensor(1.5)), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x * self.gain)


class Direction(nn.Module):
    """Length counts for nothing, which has no gradient at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.gate * x / x.square().sum(1, keepdim=True).sqrt()


class Tied(nn.Module):
    """The matrix that reads is the one that writes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.out = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.first(x).tanh()).tanh())


class Frozen(nn.Module):
    """Has a layer that is not trained, one of which half is not, and a float buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.still, self.mixed, self.out = nn.Linear(5, 5), nn.Linear(5, 4), nn.Linear(4, CLASSES)
        self.still.requires_grad_(False)
        self.mixed.bias.requires_grad_(False)
        self.register_buffer("scale", torch.tensor([0.5, 1.0, 2.0, 3.0]))
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mixed(self.still(x).tanh()).tanh() * self.scale)


class Unreached(nn.Module):
    """Has parameters that the loss does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(5, CLASSES), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Twice(nn.Module):
    """Uses one layer twice, at different lengths, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer(x).tanh()
        return self.out(self.layer(x.unsqueeze(1).expand(-1, 3, -1)).tanh().sum(1))


class Positions(nn.Module):
    """Looks up positions, which have no dimension of records."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(7, 4), nn.Embedding(6, 4)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(torch.arange(x.shape[1], device=x.device))
        return self.out((self.words(x) + places).tanh().mean(1))


class SequenceFirst(nn.Module):
    """Turns records and positions round before its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(5, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x.transpose(0, 1)).tanh().mean(0))


def vectors(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 5, generator=generator)


def words(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 7, (n, 6), generator=generator)


def shaped(*shape: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda n, generator: torch.randn(n, *shape, generator=generator)


@dataclass(frozen=True, kw_only=True)
class Zoo:
    """A task: the model is a sequence of layers, the records are random.

    Attributes:
        layers: Make the model.
        records: (n, generator) -> inputs.
        dtype: Of the model and of inputs that are no whole numbers.
    """

    layers: Callable[[], list[nn.Module]]
    records: Callable[[int, torch.Generator], Tensor] = vectors
    dtype: torch.dtype = torch.float64
    name: str = "zoo"

    def build_model(self) -> nn.Module:
        return nn.Sequential(*self.layers()).to(self.dtype)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, float]:
        return {}

    def examples(self, n: int, seed: int = 0) -> Examples:
        generator = torch.Generator().manual_seed(seed)
        inputs = self.records(n, generator)
        targets = torch.randint(0, CLASSES, (n,), generator=generator)
        if inputs.is_floating_point():
            inputs = inputs.to(self.dtype)
        return Examples(inputs=inputs, targets=targets)

    def initial(self, seed: int = 5) -> Params:
        torch.manual_seed(seed)
        return read_params(self.build_model())


def convolved(layer: Callable[[], nn.Module], *shape: int) -> Zoo:
    return Zoo(
        layers=lambda: [layer(), nn.Tanh(), nn.Flatten(), nn.Linear(_flat(layer, shape), CLASSES)],
        records=shaped(*shape),
    )


def _flat(layer: Callable[[], nn.Module], shape: Sequence[int]) -> int:
    return layer()(torch.zeros(1, *shape)).numel()


LINEAR = Zoo(layers=lambda: [nn.Linear(5, CLASSES)])
MLP = Zoo(layers=lambda: [nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, CLASSES)])

WITH_RULES: dict[str, Zoo] = {
    "linear": LINEAR,
    "linear without bias": MLP,
    "linear on sequences": Zoo(layers=lambda: [Sequences()], records=shaped(4, 5)),
    "linear on long sequences": Zoo(layers=lambda: [Sequences()], records=shaped(2, 5)),
    "conv1d": convolved(lambda: nn.Conv1d(2, 4, 3, stride=2, padding=1, bias=False), 2, 7),
    "conv1d same": convolved(lambda: nn.Conv1d(2, 3, 4, padding="same", dilation=2), 2, 7),
    "conv2d": convolved(lambda: nn.Conv2d(1, 3, (3, 2)), 1, 5, 4),
    "conv2d with all": convolved(
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2),
        *(4, 6, 5),
    ),
    "conv3d": convolved(lambda: nn.Conv3d(2, 2, 2, stride=2, padding=1, groups=2), 2, 3, 4, 3),
    "conv and pool": Zoo(
        layers=lambda: [
            *(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(4 * 2 * 3, CLASSES)),
        ],
        records=shaped(1, 5, 7),
    ),
    "group norm": Zoo(
        layers=lambda: [nn.GroupNorm(3, 6), nn.Flatten(), nn.Linear(18, CLASSES)],
        records=shaped(6, 3),
    ),
    "layer norm": Zoo(
        layers=lambda: [nn.LayerNorm([4, 5]), Sequences(), nn.LayerNorm(CLASSES)],
        records=shaped(4, 5),
    ),
    "layer norm without bias": Zoo(layers=lambda: [nn.LayerNorm(5, bias=False), *LINEAR.layers()]),
    "embedding": Zoo(layers=lambda: [Words()], records=words),
    "embedding with padding": Zoo(layers=lambda: [Words(padding=2)], records=words),
    "parts without a gradient": Zoo(layers=lambda: [Unreached()]),
}
"""Models that Opacus and our rules know every layer of."""

MAPPED: dict[str, Zoo] = {
    "own parameters": Zoo(layers=lambda: [nn.Linear(5, 4), Blend(4), nn.Linear(4, CLASSES)]),
    "single number": Zoo(layers=lambda: [Gain()]),
    "circular conv": convolved(
        lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), 2, 5
    ),
    "transposed conv": convolved(lambda: nn.ConvTranspose1d(2, 3, 2, stride=2), 2, 4),
    "frozen parts and buffers": Zoo(layers=lambda: [Frozen()]),
}
"""Models some layers of which have no rule, and are mapped by ``torch.func``."""

WHOLE: dict[str, Zoo] = {
    "attention": Zoo(
        layers=lambda: [Attention(lambda: nn.MultiheadAttention(4, 2, batch_first=True))],
        records=shaped(3, 4),
    ),
    "transformer": Zoo(
        layers=lambda: [
            Attention(lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True))
        ],
        records=shaped(3, 4),
    ),
    "layer used twice": Zoo(layers=lambda: [Twice()]),
    "tied weights": Zoo(layers=lambda: [Tied()]),
    "positions": Zoo(layers=lambda: [Positions()], records=words),
    "sequence first": Zoo(layers=lambda: [SequenceFirst()], records=shaped(4, 5)),
}

"""Models that are mapped as a whole where gradients of records are wanted."""

PRIVATE = {**WITH_RULES, **MAPPED, **WHOLE}
ALL = {
    **PRIVATE,
    # Torch's vmap in a vmap gets its gradient wrong, so under privacy it is refused.
    "prelu": Zoo(layers=lambda: [nn.Linear(5, 4), nn.PReLU(4), nn.Linear(4, CLASSES)]),
}
