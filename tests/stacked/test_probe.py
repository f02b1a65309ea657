"""A model is computed for many clients at once only where that has been seen to be right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from side_by_side import (
    SGD,
    cohort,
    farthest,
    micro_batches,
    one_by_one,
    plain,
    private,
)
from torch import Tensor, nn
from zoo import (
    ALL,
    CLASSES,
    MAPPED,
    PRIVATE,
    WHOLE,
    WITH_RULES,
    Zoo,
    shaped,
)

from fl_app.stacked.layer import NotStackableError
from fl_app.stacked.probe import Stackable, stackable
from fl_app.training import LocalTraining

# Of torch, where vmap loops over attention.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

TRAINING = LocalTraining(optimizer=SGD, batch_size=5, epochs=2)


def probe(task: Zoo, *, private: bool = False, records: int = 8) -> Stackable:
    return stackable(task.build_model(), task.losses, task.examples(records), private=private)


class Code(nn.Module):
    """A linear layer before any code."""

    def __init__(self, code: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(5, CLASSES)
        self.code = code
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, self.layer(x))


def coded(code: Callable[[nn.Module, Tensor], Tensor]) -> Zoo:
    return Zoo(layers=lambda: [Code(code)])


def counted(self: nn.Module, x: Tensor) -> Tensor:
    self.calls += 1
    return x


def counted_by_attribute(self: nn.Module, x: Tensor) -> Tensor:
    self.steps = getattr(self, "steps", 0) + 1
    return x


def branching(self: nn.Module, x: Tensor) -> Tensor:
    return x if x.sum() > 1e9 else x * 2


# Refused ------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Zoo, str]] = {
    "batch norm": (
        Zoo(layers=lambda: [nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES)]),
        "BatchNorm",
    ),
    "batch norm without statistics": (
        Zoo(layers=lambda: [nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, CLASSES)]),
        "not independent",
    ),
    "mean of the batch": (coded(lambda self, x: x - x.mean(0)), "not independent"),
    "softmax over the batch": (coded(lambda self, x: x.softmax(0)), "not independent"),
    "sorted batch": (coded(lambda self, x: x.sort(0).values), "not independent"),
    "size of the batch": (coded(lambda self, x: x * len(x)), "not independent"),
    "neighbours": (coded(lambda self, x: x + x.roll(1, 0)), "not independent"),
    "item": (coded(lambda self, x: x * x.detach().abs().max().item()), "item"),
    "float": (coded(lambda self, x: x * float(x.detach().abs().max())), "float"),
    "tolist": (coded(lambda self, x: x * x.detach().flatten().tolist()[0]), "tolist"),
    "numpy": (coded(lambda self, x: x * x.detach().numpy().max()), "numpy"),
    "branch": (coded(branching), "decides by the value"),
    "counter": (coded(counted), "buffers change"),
    "counter in an attribute": (coded(counted_by_attribute), "from call to call"),
    "noise": (coded(lambda self, x: x + torch.rand_like(x)), "random"),
    "noise per feature": (coded(lambda self, x: x + torch.rand(CLASSES)), "random"),
    "nothing to train": (Zoo(layers=lambda: [nn.Linear(5, 3).requires_grad_(False)]), "no param"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
def test_a_model_that_is_computed_wrong_is_refused_with_the_reason(name, private) -> None:
    task, reason = REFUSED[name]
    with pytest.raises(NotStackableError, match=reason):
        probe(task, private=private)


@pytest.mark.parametrize("records", [2, 5, 64])
def test_records_that_are_mixed_a_little_are_found_among_few(records: int) -> None:
    task = coded(lambda self, x: x + 1e-4 * x.tanh().mean(0))
    with pytest.raises(NotStackableError, match="not independent"):
        probe(task, records=records)


def test_one_record_shows_nothing() -> None:
    with pytest.raises(NotStackableError, match="a single record"):
        probe(WITH_RULES["linear"], records=1)


class Mixing(nn.Module):
    """Has weights of its own, so that a client's records are computed by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.gate * (x - 0.1 * x.mean(0))


def test_padding_that_a_clients_records_are_mixed_with_is_found() -> None:
    for layers in ([Mixing()], [nn.Linear(5, 5), Mixing()]):
        with pytest.raises(NotStackableError, match="not independent"):
            probe(Zoo(layers=lambda layers=layers: [*layers, nn.Linear(5, CLASSES)]))


@dataclass(frozen=True, kw_only=True)
class Lossy(Zoo):
    """Another loss."""

    made: Callable[[Tensor], Tensor]

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.made(super().losses(outputs, targets))


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda losses: losses / losses.sum(), "not independent"),
        (lambda losses: losses - losses.mean(), "not independent"),
        (lambda losses: losses.mean(), "shape"),
        (lambda losses: losses.unsqueeze(1), "shape"),
        (lambda losses: losses / losses.max().item(), "item"),
        (lambda losses: losses.topk(max(1, len(losses) - 1)).values, "shape|independent"),
    ],
)
def test_a_loss_that_looks_at_other_records_is_refused(made, reason) -> None:
    with pytest.raises(NotStackableError, match=reason):
        probe(Lossy(layers=WITH_RULES["linear"].layers, made=made))


def test_layers_that_share_weights_are_refused_one_by_one_layer_under_privacy() -> None:
    """The norm of a record's gradient is not had of the layers'; of the model as a whole it is."""
    assert not probe(WHOLE["tied weights"]).whole
    assert probe(WHOLE["tied weights"], private=True).whole
    assert probe(WHOLE["layer used twice"], private=True).whole


def test_a_model_that_raises_is_refused_with_what_it_said() -> None:
    def broken(self: nn.Module, x: Tensor) -> Tensor:
        raise ZeroDivisionError("so it is")

    with pytest.raises(NotStackableError, match="ZeroDivisionError: so it is"):
        probe(coded(broken))


# Accepted -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("records", [2, 64])
def test_models_whose_records_are_independent_are_accepted(name: str, records: int) -> None:
    found = probe(ALL[name], records=records)
    assert found.whole == (name in {"attention", "transformer", "positions", "sequence first"})
    assert found.record_bytes > 0
    if name in PRIVATE:
        assert probe(ALL[name], private=True, records=records).whole == (name in WHOLE)


def test_models_of_mapped_layers_are_mapped_layer_by_layer() -> None:
    for task in MAPPED.values():
        assert probe(task).stacked().has_mapped_layers
    for task in WITH_RULES.values():
        assert not probe(task).stacked().has_mapped_layers


class Functional(nn.Module):
    """Drops out without a module."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.share, self.training)


@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
def test_the_model_and_the_generator_are_left_as_they_were(private: bool) -> None:
    task = ALL["conv and pool"]
    model = task.build_model().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    stackable(model, task.losses, task.examples(8), private=private)
    assert torch.equal(torch.rand(4), expected)
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_that_insists_on_single_precision_is_compared_in_that() -> None:
    def insists(self: nn.Module, x: Tensor) -> Tensor:
        return x @ torch.eye(CLASSES)

    task = Zoo(layers=lambda: [Code(insists)], dtype=torch.float32)
    probe(task)
    with pytest.raises(NotStackableError):
        probe(Zoo(layers=lambda: [Code(lambda self, x: insists(self, x - x.mean(0)))], dtype=torch.float32))  # fmt: skip # noqa: E501


# Right or refused ---------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """The last output of a recurrent layer."""

    def __init__(self, layer: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.layer, self.out = layer(5, 4, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x)[0][:, -1])


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer


def normed(layer: nn.Module) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(layer)


def once_more(layer: nn.Module) -> list[nn.Module]:
    return [layer, nn.Tanh(), layer, nn.Linear(5, CLASSES)]


class Counts(nn.Module):
    """Adds how many there are of anything in the first dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(x.shape[0], 1, dtype=x.dtype)


DOUBTFUL: dict[str, Zoo] = {
    **{
        layer.__name__: Zoo(layers=lambda layer=layer: [Recurrent(layer)], records=shaped(4, 5))
        for layer in (nn.LSTM, nn.GRU, nn.RNN)
    },
    "hooked linear": Zoo(layers=lambda: [hooked(nn.Linear(5, CLASSES))]),
    "hooked dropout": Zoo(layers=lambda: [hooked(nn.Dropout(0.0)), nn.Linear(5, CLASSES)]),
    "hooked sequence": Zoo(layers=lambda: [hooked(nn.Sequential(nn.Linear(5, CLASSES)))]),
    "weight norm": Zoo(layers=lambda: [normed(nn.Linear(5, CLASSES))]),
    "same layer in a row": Zoo(layers=lambda: once_more(nn.Linear(5, 5))),
    "bilinear": Zoo(layers=lambda: [Pairs()]),
    "bag": Zoo(
        layers=lambda: [nn.EmbeddingBag(7, CLASSES)],
        records=lambda n, generator: torch.randint(0, 7, (n, 6), generator=generator),
    ),
    "scaled embedding": Zoo(
        layers=lambda: [nn.Embedding(7, 4, max_norm=0.5), nn.Flatten(), nn.Linear(24, CLASSES)],
        records=lambda n, generator: torch.randint(0, 7, (n, 6), generator=generator),
    ),
    "instance norm": Zoo(
        layers=lambda: [nn.InstanceNorm1d(4, affine=True), nn.Flatten(), nn.Linear(20, CLASSES)],
        records=shaped(4, 5),
    ),
    "rms norm": Zoo(layers=lambda: [nn.RMSNorm(5), nn.Linear(5, CLASSES)]),
    "ones": Zoo(layers=lambda: [Counts(), nn.Linear(5, CLASSES)]),
    "flat": Zoo(layers=lambda: [nn.Flatten(0), nn.Unflatten(0, (-1, 5)), nn.Linear(5, CLASSES)]),
    "decoder": Zoo(layers=lambda: [Decoder()], records=shaped(4, 4)),
    "ceiling pool": Zoo(
        layers=lambda: [nn.MaxPool2d(2, ceil_mode=True), nn.Flatten(), nn.Linear(4, CLASSES)],
        records=shaped(1, 3, 3),
    ),
}


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(5, 5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.tanh())


class Decoder(nn.Module):
    """Attention of a mask, which is no record's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(4, 1, batch_first=True)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
        return self.out(self.layer(x, x, x, attn_mask=mask)[0][:, -1])


# Torch has no batching rule for these, and says so.
NO_RULE = {"LSTM", "GRU", "RNN"}
NONE_UNDER_PRIVACY = NO_RULE | {"scaled embedding"}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_any_other_layer_comes_out_right_or_is_refused(name: str) -> None:
    task = DOUBTFUL[name]
    clients = plain(task, [12, 3, 4, 17])
    if name in NO_RULE:
        with pytest.raises(NotStackableError, match="Batching rule not implemented"):
            cohort(task, TRAINING, clients)
    else:
        together = cohort(task, TRAINING, clients)
        assert farthest(together, one_by_one(task, TRAINING, clients)) < 1e-11


@pytest.mark.parametrize("name", DOUBTFUL)
def test_and_so_do_the_gradients_of_its_records(name: str) -> None:
    task = DOUBTFUL[name]
    if name in NONE_UNDER_PRIVACY:
        with pytest.raises(NotStackableError):
            probe(task, private=True)
    else:
        together = cohort(task, TRAINING, private(task, [12, 3, 4, 17]))
        alone = micro_batches(task, private(task, [12, 3, 4, 17]))
        assert farthest(together, alone) < 1e-10
