"""What an update must be: every way to be wrong has its words, and all else passes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fl_app.types import ClientUpdate, ConfigError, Params
from fl_app.validation import UpdateChecks

MODEL: Params = {"w": torch.zeros(2, 2), "b": torch.zeros(2), "scale": torch.tensor(1.0)}


def update(num_examples: int = 10, **changed: Tensor | None) -> ClientUpdate:
    """Return a good update but for the tensors given; None leaves one out."""
    delta = {name: torch.full_like(tensor, 0.1) for name, tensor in MODEL.items()} | changed
    return ClientUpdate(
        client="0",
        round=1,
        delta={name: tensor for name, tensor in delta.items() if tensor is not None},
        num_examples=num_examples,
    )


def test_a_good_update_meets_no_objection() -> None:
    assert UpdateChecks().objection(update(), MODEL) is None


def test_a_zero_update_meets_no_objection() -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in MODEL.items()}
    assert UpdateChecks().objection(update(**zeros), MODEL) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", list(MODEL))
@given(st.data())
def test_one_value_that_is_not_finite_is_enough(value, name, data) -> None:
    broken = torch.full_like(MODEL[name], 0.1)
    position = data.draw(st.integers(0, broken.numel() - 1))
    broken.view(-1)[position] = value
    objection = UpdateChecks().objection(update(**{name: broken}), MODEL)
    assert objection == "update holds NaN or infinite values"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"b": None}, "missing b"),
        ({"b": None, "w": None}, "missing b, w"),
        ({"extra": torch.zeros(1)}, "unexpected extra"),
        ({"w": torch.zeros(2, 3)}, "w has shape (2, 3), not (2, 2)"),
        ({"w": torch.zeros(4)}, "w has shape (4,), not (2, 2)"),
        ({"scale": torch.zeros(1)}, "scale has shape (1,), not ()"),
        ({"w": torch.zeros(0, 2)}, "w has shape (0, 2), not (2, 2)"),
        ({"w": torch.zeros(2, 2, dtype=torch.int64)}, "w has dtype torch.int64"),
        ({"b": torch.zeros(2, dtype=torch.bool)}, "b has dtype torch.bool"),
        ({"b": torch.zeros(2, dtype=torch.complex64)}, "b has dtype torch.complex64"),
        ({"b": torch.zeros(2, dtype=torch.float64)}, "b is torch.float64, not torch.float32"),
        ({"b": torch.zeros(2, dtype=torch.float16)}, "b is torch.float16, not torch.float32"),
    ],
)
def test_an_update_that_does_not_fit_the_model_is_told_where(changed, words) -> None:
    objection = UpdateChecks().objection(update(**changed), MODEL)
    assert objection is not None
    assert objection.startswith("update does not fit the model: ")
    assert words in objection


@pytest.mark.parametrize("num_examples", [0, -1, -(10**30), 10**7 + 1, 10**12, 10**30])
def test_an_impossible_number_of_examples_is_refused(num_examples) -> None:
    objection = UpdateChecks().objection(update(num_examples), MODEL)
    assert objection is not None
    assert f"num_examples={num_examples} " in objection


@pytest.mark.parametrize("num_examples", [1, 10**7])
def test_the_ends_of_the_range_of_examples_are_allowed(num_examples) -> None:
    assert UpdateChecks().objection(update(num_examples), MODEL) is None


@given(st.floats(1e-3, 1e6), st.floats(0.5, 2))
def test_the_bound_on_the_norm_runs_over_all_tensors_as_if_concatenated(bound, factor) -> None:
    # Seven equal entries in three tensors: the norm is sqrt(7) times one of them.
    entry = bound * factor / math.sqrt(7)
    full = {name: torch.full_like(tensor, entry) for name, tensor in MODEL.items()}
    objection = UpdateChecks(max_norm=bound).objection(update(**full), MODEL)
    if factor < 1 - 1e-6:
        assert objection is None
    elif factor > 1 + 1e-6:
        assert "above checks.max_norm" in objection


def test_a_norm_that_overflows_float32_is_still_a_norm() -> None:
    huge = torch.full((2, 2), 3e38)
    objection = UpdateChecks().objection(update(w=huge), MODEL)
    assert "norm 6e+38" in objection


def test_a_model_without_elements_in_one_tensor_is_measured_by_the_rest() -> None:
    model = {"w": torch.zeros(2), "none": torch.zeros(0)}
    good = ClientUpdate(client="0", round=1, delta=dict(model), num_examples=1)
    assert UpdateChecks().objection(good, model) is None


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.inf, math.nan])
def test_a_bound_that_bounds_nothing_is_refused(max_norm) -> None:
    with pytest.raises(ConfigError, match=f"checks.max_norm={max_norm} "):
        UpdateChecks(max_norm=max_norm)


def test_a_largest_count_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="checks.max_num_examples=0 "):
        UpdateChecks(max_num_examples=0)
