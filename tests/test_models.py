"""The model recipes: shapes, sizes, and what federated and private training need of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fl_app.tasks.models import Logistic, Mlp, ModelBuilder, SmallCnn
from fl_app.types import ConfigError

IMAGES = [(1, 8, 8), (1, 28, 28), (3, 32, 32)]
RECIPES = [Logistic(), Mlp(hidden=(7, 5), dropout=0.2), SmallCnn(dropout=0.2)]


def num_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_every_recipe_maps_images_of_any_size_to_one_row_of_logits_each(recipe, shape):
    assert recipe(shape, 5)(torch.randn(3, *shape)).shape == (3, 5)


def test_the_default_mlp_on_mnist_is_784_10_10():
    model = Mlp()((1, 28, 28), 10)
    assert [type(layer) for layer in model] == [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear]
    assert num_params(model) == 784 * 10 + 10 + 10 * 10 + 10


def test_the_number_of_parameters_of_the_cnn_is_that_of_its_layers():
    convolutions = (1 * 9 * 16 + 16) + (16 * 9 * 32 + 32)
    norms = 2 * 16 + 2 * 32
    linear = (32 * 2 * 2 * 64 + 64) + (64 * 10 + 10)
    assert num_params(SmallCnn()((1, 8, 8), 10)) == convolutions + norms + linear


def test_an_mlp_without_hidden_layers_is_logistic_regression():
    torch.manual_seed(0)
    mlp = Mlp(hidden=[])((30,), 2)
    torch.manual_seed(0)
    logistic = Logistic()((30,), 2)
    records = torch.randn(4, 30)
    assert torch.equal(mlp(records), logistic(records))


@given(st.lists(st.integers(1, 9), max_size=3), st.integers(1, 6), st.integers(2, 5))
@settings(max_examples=25, deadline=None)
def test_an_mlp_has_the_layers_its_key_names(hidden, columns, classes):
    model = Mlp(hidden=hidden)((columns,), classes)
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in linear] == [*hidden, classes]
    assert [layer.in_features for layer in linear] == [columns, *hidden]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
def test_the_seed_of_the_caller_decides_the_parameters(recipe):
    def built(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return recipe((1, 8, 8), 10).state_dict()

    first, again, other = built(1), built(1), built(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
def test_no_record_of_a_batch_changes_the_output_of_another(recipe):
    model = recipe((1, 8, 8), 10).eval()
    records = torch.randn(6, 1, 8, 8)
    alone = torch.cat([model(record[None]) for record in records])
    torch.testing.assert_close(model(records), alone)


@pytest.mark.parametrize(
    "recipe", [Logistic(), Mlp(), SmallCnn()], ids=lambda recipe: type(recipe).__name__
)
def test_gradients_of_single_records_are_what_torch_func_computes_at_once(recipe):
    model = recipe((1, 8, 8), 3)
    params = dict(model.named_parameters())
    records, targets = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 1])

    def loss(params, record, target):
        outputs = torch.func.functional_call(model, params, (record[None],))
        return nn.functional.cross_entropy(outputs, target[None])

    at_once = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(
        {name: p.detach() for name, p in params.items()}, records, targets
    )
    for i in range(len(records)):
        one = torch.autograd.grad(loss(params, records[i], targets[i]), list(params.values()))
        for name, gradient in zip(params, one, strict=True):
            torch.testing.assert_close(at_once[name][i], gradient, rtol=1e-4, atol=1e-6)


def test_channels_are_normalised_in_four_groups_or_in_as_many_as_divide_them():
    norms = [
        layer for layer in SmallCnn(channels=[16, 6])((1, 8, 8), 10) if hasattr(layer, "num_groups")
    ]
    assert [(norm.num_groups, norm.num_channels) for norm in norms] == [(4, 16), (2, 6)]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
def test_no_recipe_uses_batch_norm_or_works_in_place(recipe):
    for layer in recipe((1, 8, 8), 10).modules():
        assert not isinstance(layer, nn.modules.batchnorm._BatchNorm)
        assert not getattr(layer, "inplace", False)


def test_dropout_acts_in_training_and_never_in_evaluation():
    model = Mlp(hidden=[50], dropout=0.5)((30,), 2)
    records = torch.randn(4, 30)
    assert not torch.equal(model(records), model(records))
    model.eval()
    assert torch.equal(model(records), model(records))


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: Mlp(dropout=1.5), "task.model.dropout=1.5 must lie in [0, 1)"),
        (lambda: Mlp(dropout=1.0), "task.model.dropout=1.0"),
        (lambda: Mlp(dropout=float("nan")), "task.model.dropout=nan"),
        (lambda: SmallCnn(dropout=-0.1), "task.model.dropout=-0.1"),
        (lambda: Mlp(hidden=[10, 0]), "task.model.hidden=[10, 0] must be >= 1"),
        (lambda: SmallCnn(hidden=0), "task.model.hidden=0 must be >= 1"),
        (lambda: SmallCnn(channels=[16, -1]), "task.model.channels=[16, -1] must be >= 1"),
        (lambda: SmallCnn(channels=[]), "task.model.channels=[] must name at least one block"),
        (lambda: SmallCnn()((30,), 2), "use task/model=mlp"),
        (lambda: SmallCnn(channels=[4] * 4)((1, 8, 8), 10), "8x8 pixels"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_key(build, named):
    with pytest.raises(ConfigError) as raised:
        build()
    assert named in str(raised.value)


def test_any_function_of_shape_and_outputs_is_a_recipe():
    def flat(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_outputs))

    recipe: ModelBuilder = flat
    assert recipe((2, 3), 4)(torch.randn(5, 2, 3)).shape == (5, 4)
