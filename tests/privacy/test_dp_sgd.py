"""DP-SGD is a micro-batch loop with noise; without noise and clipping it is SGD, and only then."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from fl_app.privacy.dp_sgd import DpSgd, GradientMode
from fl_app.privacy.private_steps import private_steps
from fl_app.privacy.randomness import PrivacyRandomness, secret_randomness
from fl_app.types import ConfigError

losses = functools.partial(nn.functional.cross_entropy, reduction="none")
LR = 0.1


class NoNoise:
    """Draws zeros, so that what is left can be compared."""

    def normal(self, like: Tensor, *, std: float) -> Tensor:
        return torch.zeros_like(like)

    def coins(self, count: int, *, heads: float) -> None:
        raise NotImplementedError


class _Attention(nn.Module):
    """A layer that Opacus knows no rule for by name, beside an embedding and a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6)
        self.norm = nn.LayerNorm(6)
        self.mix = nn.Linear(6, 6, bias=False)
        self.out = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.norm(self.words(inputs.long()))  # (b, t, 6)
        weights = (self.mix(x) @ x.transpose(1, 2)).softmax(dim=-1)  # (b, t, t)
        return self.out((weights @ x).mean(dim=1))


class _Unused(nn.Module):
    """Has parameters that the loss does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.used(inputs)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        lambda n: torch.randn(n, 4),
    ),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * 25, 3),
        ),
        lambda n: torch.randn(n, 1, 5, 5),
    ),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(12, 3)),
        lambda n: torch.randn(n, 2, 5),
    ),
    "attention": (_Attention, lambda n: torch.randint(0, 7, (n, 4))),
    "unused": (_Unused, lambda n: torch.randn(n, 4)),
}
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)
EVERY_MODE = pytest.mark.parametrize("mode", list(GradientMode))


def made(name: str, n: int = 12) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    build, records = MODELS[name]
    return build(), records(n), torch.randint(0, 3, (n,))


def private(
    name: str,
    batches: Sequence[Sequence[int]],
    *,
    randomness: PrivacyRandomness | NoNoise | None = None,
    max_norm: float = 0.5,
    noise: float = 0.0,
    mode: str = GradientMode.HOOKS,
    part: int | None = None,
) -> nn.Module:
    model, inputs, targets = made(name)
    mechanism = DpSgd(
        noise_multiplier=noise,
        max_grad_norm=max_norm,
        expected_batch_size=4,
        gradients=mode,
        max_physical_batch=part,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    source = randomness or NoNoise()
    with private_steps(model, optimizer, losses, mechanism, source) as stepper:
        for batch in batches:
            stepper.step(inputs[list(batch)], targets[list(batch)])
    return model


def micro_batches(name: str, batches: Sequence[Sequence[int]], max_norm: float) -> nn.Module:
    """Abadi et al. 2016, Algorithm 1, record by record, without noise."""
    model, inputs, targets = made(name)
    parameters = list(model.parameters())
    for batch in batches:
        sums = [torch.zeros_like(p) for p in parameters]
        for k in batch:
            model.zero_grad()
            losses(model(inputs[k : k + 1]), targets[k : k + 1]).sum().backward()
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            norm = torch.cat([g.flatten() for g in gradients]).norm().item()
            for total, gradient in zip(sums, gradients, strict=True):
                total += gradient * min(1.0, max_norm / (norm + 1e-6))
        with torch.no_grad():
            for parameter, total in zip(parameters, sums, strict=True):
                parameter -= LR * total / 4
    return model


def distance(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


BATCHES = [[0, 3, 4, 9], [], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [5]]


@EVERY_MODEL
@EVERY_MODE
@pytest.mark.parametrize("part", [None, 3])
def test_a_step_is_the_micro_batch_loop_for_all_layers_and_ragged_batches(name, mode, part) -> None:
    ours = private(name, BATCHES, mode=mode, part=part)
    assert distance(ours, micro_batches(name, BATCHES, 0.5)) < 1e-6
    assert distance(ours, made(name)[0]) > 1e-3


@settings(max_examples=10)
@given(
    st.lists(st.lists(st.integers(0, 11), max_size=6, unique=True), min_size=1, max_size=3),
    st.floats(0.01, 10),
)
def test_and_for_any_batches_and_bound(batches, max_norm) -> None:
    ours = private("mlp", batches, max_norm=max_norm)
    assert distance(ours, micro_batches("mlp", batches, max_norm)) < 1e-5


def sgd(name: str, batches: Sequence[Sequence[int]]) -> nn.Module:
    model, inputs, targets = made(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for batch in batches:
        optimizer.zero_grad()
        (losses(model(inputs[batch]), targets[batch]).sum() / 4).backward()
        optimizer.step()
    return model


@EVERY_MODE
def test_private_is_plain_sgd_if_there_is_no_noise_and_no_clipping_and_only_then(mode) -> None:
    batches = [[0, 1, 2, 3], [4, 5, 6, 7]]
    plain = sgd("cnn", batches)
    assert distance(private("cnn", batches, max_norm=1e9, mode=mode), plain) < 1e-6
    assert distance(private("cnn", batches, max_norm=0.1, mode=mode), plain) > 1e-4
    noisy = private("cnn", batches, max_norm=1e3, noise=1e-3, randomness=secret_randomness())
    assert distance(noisy, plain) > 1e-4


@EVERY_MODE
def test_the_noise_of_a_step_is_gaussian_with_sigma_times_the_bound(mode) -> None:
    """Of an empty batch: the step is noise alone, on every parameter, reached or not."""
    before = torch.nn.utils.parameters_to_vector(made("unused")[0].parameters())
    drawn = []
    for _ in range(100):
        after = private(
            "unused", [[]], noise=2.0, max_norm=0.3, randomness=secret_randomness(), mode=mode
        )
        drawn.append(torch.nn.utils.parameters_to_vector(after.parameters()) - before)
    std = LR * 2.0 * 0.3 / 4
    noise = torch.cat(drawn).detach().double().numpy()
    assert stats.kstest(noise, "norm", args=(0, std)).pvalue > 1e-6
    assert stats.kstest(noise, "norm", args=(0, 1.3 * std)).pvalue < 1e-6


@pytest.fixture
def traces() -> Iterator[Callable[[nn.Module], list[str]]]:
    def find(model: nn.Module) -> list[str]:
        found = [name for p in model.parameters() for name in vars(p)]
        for module in model.modules():
            found += [n for n in vars(module) if "grad_sample" in n or n == "activations"]
            found += ["hook"] * len(module._forward_hooks) + ["hook"] * len(module._backward_hooks)
        return found

    yield find


@EVERY_MODE
def test_nothing_is_left_on_the_model_which_can_be_made_private_again(mode, traces) -> None:
    model, inputs, targets = made("cnn")
    names = list(model.state_dict())
    mechanism = DpSgd(
        noise_multiplier=0.0, max_grad_norm=0.5, expected_batch_size=4, gradients=mode
    )
    for _ in range(3):
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        with private_steps(model, optimizer, losses, mechanism, NoNoise()) as stepper:
            stepper.step(inputs[:4], targets[:4])
        assert traces(model) == []
        assert list(model.state_dict()) == names
    assert distance(model, private("cnn", [[0, 1, 2, 3]] * 3, mode=mode)) < 1e-6


def test_nothing_is_left_either_when_a_step_raises(traces) -> None:
    model, inputs, targets = made("mlp")
    mechanism = DpSgd(noise_multiplier=0.0, max_grad_norm=0.5, expected_batch_size=4)

    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        raise ZeroDivisionError

    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with (
        pytest.raises(ZeroDivisionError),
        private_steps(model, optimizer, broken, mechanism, NoNoise()) as stepper,
    ):
        stepper.step(inputs, targets)
    assert traces(model) == []


@EVERY_MODE
@pytest.mark.parametrize("extreme", [1e38, float("inf"), float("nan")])
def test_a_record_without_a_finite_gradient_counts_as_zero(mode, extreme) -> None:
    """It would make the whole sum NaN otherwise, and so show that it is there."""
    model, inputs, targets = made("mlp")
    twin, _, _ = made("mlp")
    mechanism = DpSgd(
        noise_multiplier=0.0, max_grad_norm=0.5, expected_batch_size=4, gradients=mode
    )
    spoilt = inputs[:5].clone()
    spoilt[2] = extreme
    for net, kept in ((model, slice(None)), (twin, [0, 1, 3, 4])):
        optimizer = torch.optim.SGD(net.parameters(), lr=LR)
        with private_steps(net, optimizer, losses, mechanism, NoNoise()) as stepper:
            stepper.step(spoilt[kept], targets[:5][kept])
    assert distance(model, twin) < 1e-6 or extreme == 1e38
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_what_is_added_after_the_noise_is_not_clipped() -> None:
    model, inputs, targets = made("mlp")
    before = [p.detach().clone() for p in model.parameters()]
    mechanism = DpSgd(noise_multiplier=0.0, max_grad_norm=1e-9, expected_batch_size=4)

    def pull() -> None:
        for parameter in model.parameters():
            parameter.grad += 1.0

    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with private_steps(model, optimizer, losses, mechanism, NoNoise()) as stepper:
        stepper.step(inputs, targets, then=pull)
    for parameter, start in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), start - LR)


@pytest.mark.parametrize(
    "values",
    [{"max_grad_norm": 0.0}, {"max_grad_norm": -1.0}, {"gradients": "magic"}]
    + [{"max_physical_batch": 0}],
)
def test_a_mechanism_that_cannot_be_is_refused(values) -> None:
    good = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": 4}
    with pytest.raises(ConfigError, match=f"privacy.{next(iter(values))}"):
        DpSgd(**{**good, **values})
