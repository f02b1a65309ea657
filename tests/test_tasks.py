"""The bundled tasks, classification metrics against scikit-learn, and the checks before a run."""

from __future__ import annotations

import math
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy

from fl_app.tasks.base import GeneratedTask, PooledExamples, PooledTask
from fl_app.tasks.checks import check_model
from fl_app.tasks.classification import Classification, accuracy, hold_out, losses, metrics
from fl_app.tasks.digits import Digits
from fl_app.tasks.models import Logistic, Mlp
from fl_app.tasks.tabular import BreastCancer, standardise
from fl_app.types import ConfigError, Examples

TASKS = [Digits(model=Mlp()), BreastCancer(model=Mlp())]


@dataclass(frozen=True, kw_only=True)
class Toy(Classification):
    """Three columns, three classes."""

    name: ClassVar[str] = "toy"
    input_shape: ClassVar[tuple[int, ...]] = (3,)
    num_classes: ClassVar[int] = 3

    def load(self) -> PooledExamples:
        return hold_out(toy_examples(), self.test_fraction)


TOY = Toy(model=Logistic())


def toy_examples(n: int = 30) -> Examples:
    return Examples(
        inputs=torch.randn(n, 3, generator=torch.Generator().manual_seed(0)),
        targets=torch.arange(n) % 3,
    )


def scored(n: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random logits, and targets of which some classes may be missing."""
    generator = torch.Generator().manual_seed(seed)
    outputs = 3 * torch.randn(n, classes, generator=generator)
    highest = int(torch.randint(1, classes + 1, (), generator=generator))
    return outputs, torch.randint(0, highest, (n,), generator=generator)


# Loss and metrics ---------------------------------------------------------------------------


def test_the_loss_of_a_record_is_minus_the_log_of_its_class_probability():
    outputs = torch.log(torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
    expected = torch.tensor([-math.log(0.75), -math.log(0.5)])
    torch.testing.assert_close(losses(outputs, torch.tensor([1, 0])), expected)


def test_metrics_of_four_records_are_those_worked_out_by_hand():
    # Predicted 0, 0, 1, 1; true 0, 1, 1, 1.
    outputs = torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    values = metrics(outputs, torch.tensor([0, 1, 1, 1]))
    assert values == pytest.approx(
        {
            "accuracy": 3 / 4,
            "precision": (1 / 2 + 1) / 2,
            "recall": (1 + 2 / 3) / 2,
            "f1": (2 / 3 + 4 / 5) / 2,
            "auroc": 1.0,
        }
    )


@given(st.integers(1, 60), st.integers(2, 6), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_metrics_equal_those_of_scikit_learn_also_where_classes_are_missing(n, classes, seed):
    from sklearn import metrics as sk

    outputs, targets = scored(n, classes, seed)
    values = metrics(outputs, targets)
    truth, predicted = targets.numpy(), outputs.argmax(dim=1).numpy()
    expected = {
        "accuracy": sk.accuracy_score(truth, predicted),
        "precision": sk.precision_score(truth, predicted, average="macro", zero_division=0),
        "recall": sk.recall_score(truth, predicted, average="macro", zero_division=0),
        "f1": sk.f1_score(truth, predicted, average="macro", zero_division=0),
    }
    if len(np.unique(truth)) == classes:
        shares = outputs.double().softmax(dim=1).numpy()
        expected["auroc"] = (
            sk.roc_auc_score(truth, shares[:, 1])
            if classes == 2
            else sk.roc_auc_score(truth, shares, multi_class="ovr", average="macro")
        )
    assert values == pytest.approx(expected, abs=1e-6)


@given(st.integers(1, 60), st.integers(2, 6), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_cheap_accuracy_is_the_micro_accuracy_of_torchmetrics(n, classes, seed):
    outputs, targets = scored(n, classes, seed)
    reference = multiclass_accuracy(outputs, targets, classes, average="micro")
    assert accuracy(outputs, targets) == pytest.approx(float(reference), abs=1e-6)
    assert accuracy(outputs, targets) == metrics(outputs, targets)["accuracy"]


def test_auroc_is_absent_and_silent_where_a_class_does_not_occur():
    outputs = torch.randn(8, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = metrics(outputs, torch.tensor([0, 1] * 4))
    assert set(values) == {"accuracy", "precision", "recall", "f1"}


def test_auroc_ranks_by_probability_even_if_all_logits_look_like_probabilities():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.rand(60, 3, generator=generator)
    targets = torch.arange(60) % 3
    shifted = metrics(outputs + 100, targets)  # the same probabilities
    assert metrics(outputs, targets)["auroc"] == pytest.approx(shifted["auroc"], abs=2e-3)
    assert metrics(outputs, targets)["auroc"] == metrics(outputs - 1, targets)["auroc"]


def test_confident_predictions_keep_their_rank():
    # softmax in float32 rounds both first rows to (1, 0); the second is the less confident.
    outputs = torch.tensor([[40.0, 0.0], [20.0, 0.0], [0.0, 1.0]])
    assert metrics(outputs, torch.tensor([0, 1, 1]))["auroc"] == 1.0


def test_a_diverged_model_has_no_auroc():
    outputs = torch.full((4, 2), float("nan"))
    assert "auroc" not in metrics(outputs, torch.tensor([0, 1, 0, 1]))


def test_the_cheap_accuracy_of_twenty_records_takes_well_under_a_millisecond():
    outputs, targets = scored(20, 10, seed=0)
    took = []
    for _ in range(200):
        start = time.perf_counter()
        accuracy(outputs, targets)
        took.append(time.perf_counter() - start)
    assert sorted(took)[100] < 500e-6  # 14 us on a quiet machine


@pytest.mark.parametrize("score", [losses, accuracy, metrics])
@pytest.mark.parametrize(
    ("outputs", "targets"),
    [((0, 3), (0,)), ((4, 3), (5,)), ((4,), (4,)), ((4, 1), (4,)), ((4, 3), (4, 1))],
    ids=str,
)
def test_no_records_or_shapes_that_do_not_fit_are_refused(score, outputs, targets):
    with pytest.raises(ConfigError, match="must have shapes"):
        score(torch.zeros(outputs), torch.zeros(targets, dtype=torch.int64))


# Data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_bundled_task_is_pooled_and_its_records_fit_its_model(task):
    assert isinstance(task, PooledTask)
    assert not isinstance(task, GeneratedTask)
    pooled = task.load()
    for part in (pooled.train, pooled.held_out):
        assert part.inputs.dtype == torch.float32
        assert part.inputs.shape[1:] == task.input_shape
        assert sorted(set(part.targets.tolist())) == list(range(task.num_classes))
        check_model(task, task.build_model(), part)


def test_digits_are_all_there_with_pixels_from_0_to_1():
    pooled = TASKS[0].load()
    assert (len(pooled.train), len(pooled.held_out)) == (1437, 360)
    inputs = torch.cat([pooled.train.inputs, pooled.held_out.inputs])
    assert (inputs.min(), inputs.max()) == (0, 1)


def test_breast_cancer_is_scaled_by_the_training_part_alone():
    pooled = TASKS[1].load()
    assert (len(pooled.train), len(pooled.held_out)) == (455, 114)
    columns = pooled.train.inputs.double()
    torch.testing.assert_close(columns.mean(0), torch.zeros(30).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(columns.std(0, correction=0), torch.ones(30).double())
    assert pooled.held_out.inputs.mean(0).abs().max() > 0.01


def test_a_constant_column_becomes_zero():
    examples = Examples(inputs=torch.full((4, 1), 7.0), targets=torch.zeros(4).long())
    assert standardise(PooledExamples(train=examples)).train.inputs.tolist() == [[0.0]] * 4


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_loading_again_gives_the_same_records_and_reads_nothing(task):
    assert task.load() is task.load()
    assert task.load() is replace(task, model=Logistic()).load()


@given(st.integers(10, 60), st.integers(2, 4), st.sampled_from([0.1, 0.2, 0.25, 0.5]))
@settings(max_examples=40, deadline=None)
def test_the_held_out_split_covers_the_records_once_and_each_class_alike(per_class, classes, share):
    n = per_class * classes
    examples = Examples(
        inputs=torch.arange(n, dtype=torch.float32), targets=torch.arange(n) % classes
    )
    pooled = hold_out(examples, share)
    records = torch.cat([pooled.train.inputs, pooled.held_out.inputs])
    assert records.sort().values.tolist() == list(range(n))
    assert pooled.train.inputs.tolist() == sorted(pooled.train.inputs.tolist())
    counts = torch.bincount(pooled.held_out.targets, minlength=classes)
    assert (counts - share * per_class).abs().max() <= 1


def test_a_share_of_zero_holds_nothing_out():
    pooled = replace(TASKS[0], test_fraction=0.0).load()
    assert pooled.held_out is None
    assert len(pooled.train) == 1797


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_out_of_range_is_named_with_its_key(share):
    with pytest.raises(ConfigError, match=f"task.test_fraction={share} must lie in"):
        replace(TASKS[0], test_fraction=share)


def test_a_share_too_small_to_hold_every_class_is_named_with_its_key():
    with pytest.raises(ConfigError, match="task.test_fraction=0.001 does not split 1797 records"):
        replace(TASKS[0], test_fraction=0.001).load()


def test_importing_the_tasks_imports_no_data_or_metrics_library():
    code = (
        "import sys, fl_app.tasks.digits, fl_app.tasks.tabular, fl_app.tasks.checks\n"
        "import fl_app.tasks.flower_partition\n"
        "print({'sklearn', 'torchmetrics', 'datasets', 'flwr_datasets'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


# Checks -------------------------------------------------------------------------------------


def test_the_check_leaves_model_mode_and_randomness_as_they_were():
    model = Mlp(hidden=[4], dropout=0.5)((3,), 3).train()
    state = torch.get_rng_state()
    check_model(TOY, model, toy_examples())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def with_input(value: float) -> Examples:
    examples = toy_examples()
    examples.inputs[7, 1] = value
    return examples


@pytest.mark.parametrize(
    ("model", "examples", "named"),
    [
        (
            nn.Linear(3, 2),
            toy_examples(),
            "task.model gives outputs of shape (n, 2) but the labels of task=toy reach 2",
        ),
        (nn.Linear(4, 3), toy_examples(), "task.model cannot take inputs of shape (n, 3)"),
        (nn.Linear(3, 3), with_input(float("nan")), "in 1 of 30 records, first in record 7"),
        (nn.Linear(3, 3), with_input(float("inf")), "a NaN or infinite input"),
        (
            nn.Linear(3, 3),
            replace(toy_examples(), targets=(torch.arange(30) % 3).int()),
            "targets of type torch.int32",
        ),
        (
            nn.Linear(3, 3),
            replace(toy_examples(), targets=torch.zeros(30)),
            "the loss of task=toy cannot compare",
        ),
        (
            nn.Linear(3, 3),
            replace(toy_examples(), targets=torch.arange(30) % 3 - 1),
            "task=toy has the label -1",
        ),
        (
            nn.Linear(3, 3),
            replace(toy_examples(), targets=torch.arange(29) % 3),
            "inputs of shape (30, 3) and targets of shape (29,)",
        ),
        (nn.Linear(3, 3), toy_examples(0), "the same length n >= 1"),
        (
            nn.Linear(3, 3),
            replace(toy_examples(), inputs=torch.ones(30, 3).long()),
            "inputs of type torch.int64",
        ),
    ],
)
def test_what_does_not_fit_is_named_before_the_first_round(model, examples, named):
    with pytest.raises(ConfigError) as raised:
        check_model(TOY, model, examples)
    assert named in str(raised.value)


def test_a_loss_that_is_a_mean_is_refused():
    class MeanLoss(Toy):
        def losses(self, outputs, targets):
            return super().losses(outputs, targets).mean()

    with pytest.raises(ConfigError, match="losses\\(\\) must return one number per record"):
        check_model(MeanLoss(model=Logistic()), nn.Linear(3, 3), toy_examples())
