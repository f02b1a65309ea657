"""Runs whose clients train side by side are those of one by one, and where they cannot, say why."""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import alike, play, play_config, rounds_of, summary_of
from torch import Tensor

from fl_app.components import build
from fl_app.config import compose_config, resumed_config, to_json
from fl_app.engines.local import LocalEngine
from fl_app.stacked.layer import NotStackableError
from fl_app.types import ConfigError
from fl_app.vectorizing import HeavyModelError, cohort_trainer

TWO_ROUNDS = ("rounds=2",)
NOISE = ("privacy.noise_multiplier=1.0", "privacy.target_epsilon=null")
FOR_TESTS = "privacy.randomness=reproducible_for_tests"


def both(folder: Path, *overrides: str, **options: Any) -> tuple[Path, Path]:
    """Play a run side by side and one by one, and check that it was."""
    runs = [
        play(folder / name, *overrides, f"engine.vectorize={vectorize}", **options)
        for name, vectorize in (("together", "true"), ("alone", "false"))
    ]
    assert [summary_of(run)["training"] for run in runs] == ["cohort", "one by one"]
    return runs[0], runs[1]


# The same run -------------------------------------------------------------------------------------

RECIPES = {
    "faults and momentum": (
        *("partition=dirichlet", "partition.num_clients=12", "strategy=fedprox"),
        *("client.failure_fraction=0.4", "selection.count=4", "selection.over_selection=1.0"),
        *("selection.min_replies=4", "client.keep_optimizer_state=true", "client.epochs=2"),
        "client.optimizer.momentum=0.9",
    ),
    "adam and fedadam": (
        *("client/optimizer=adam", "strategy=fedadam", "client.keep_optimizer_state=true"),
        *("partition=exponential", "rounds=3"),
    ),
    "conspiracy": ("client/attack=alie", "client.attack.fraction=0.4", "selection.fraction=1.0"),
    "not a number": (
        *("client/attack=not_a_number", "client.attack.fraction=0.4", "selection.fraction=1.0"),
        *("task/model=mlp", "rounds=1"),
    ),
    "false labels": ("client/attack=label_flip", "client.attack.fraction=0.4", "rounds=1"),
    "client-level privacy": (
        *("privacy=client", "strategy.aggregation.weighting=uniform", FOR_TESTS),
    ),
    "local privacy": (
        *("privacy=local", "strategy.aggregation.weighting=uniform", FOR_TESTS, "rounds=1"),
    ),
    "record-level privacy": ("privacy=record", *NOISE, FOR_TESTS, "client.batch_size=32"),
    "private cnn": (
        *("privacy=record", *NOISE, FOR_TESTS, "task/model=cnn", "rounds=1", "selection.count=1"),
    ),
}


SLOW = {"adam and fedadam", "conspiracy", "false labels", "local privacy", "private cnn"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in RECIPES]
)
def test_a_run_side_by_side_is_the_run_one_by_one(name: str, tmp_path: Path) -> None:
    together, alone = both(tmp_path, *TWO_ROUNDS, *RECIPES[name])
    assert alike(rounds_of(together), rounds_of(alone))
    first, second = summary_of(together), summary_of(alone)
    for key in ("metrics", "fairness", "communication", "failures", "privacy", "rounds"):
        assert alike(first[key], second[key]), key


def test_auto_trains_side_by_side_in_any_chunks_and_threads(tmp_path: Path) -> None:
    wanted = play(tmp_path / "alone", "engine.vectorize=false", *TWO_ROUNDS)
    # So few clients at a time that there are several chunks.
    several = ("engine.workers=2", "engine.chunk_mib=1", "engine.device=auto")
    for name, overrides in {"auto": (), "several": several}.items():
        run = play(tmp_path / name, *TWO_ROUNDS, *overrides)
        assert summary_of(run)["training"] == "cohort"
        assert alike(rounds_of(run), rounds_of(wanted))


def test_the_same_seed_gives_the_same_bits_with_dropout_and_threads(tmp_path: Path) -> None:
    recipe = ("task/model=mlp", "task.model.dropout=0.2", "engine.workers=2", *TWO_ROUNDS)
    first, again = (play(tmp_path / name, *recipe) for name in ("first", "again"))
    assert summary_of(first)["training"] == "cohort"
    assert summary_of(first)["model_hash"] == summary_of(again)["model_hash"]
    assert rounds_of(first) == rounds_of(again)


def test_a_run_cut_and_resumed_has_the_bits_of_the_uninterrupted_one(tmp_path: Path) -> None:
    recipe = (
        *("task/model=mlp", "task.model.dropout=0.1", "client.optimizer.momentum=0.9"),
        *("client.keep_optimizer_state=true", "client.failure_fraction=0.1"),
        *("selection.fraction=0.5", "strategy=fedadam", "checkpoint_every=2"),
    )
    whole = play(tmp_path / "whole", *recipe, "rounds=5")
    cut = play(tmp_path / "cut", *recipe, "rounds=3")
    play_config(resumed_config(str(cut), ["rounds=5"]))
    assert summary_of(cut)["training"] == summary_of(whole)["training"] == "cohort"
    assert summary_of(cut)["model_hash"] == summary_of(whole)["model_hash"]
    assert rounds_of(cut) == rounds_of(whole)


def test_privacy_is_paid_for_and_ends_as_it_does_one_by_one(tmp_path: Path) -> None:
    """With secret noise: what is paid, and who declines, does not depend on it."""
    record = ("privacy=record", *NOISE, "client.batch_size=32", "privacy.epsilon_budget=5.0")
    together, alone = both(tmp_path, *record, "selection.over_selection=0.5", "rounds=20")
    assert summary_of(together)["privacy"] == summary_of(alone)["privacy"]
    assert summary_of(together)["stopped_by"] == summary_of(alone)["stopped_by"] == "budget"
    assert 4.0 < summary_of(together)["privacy"]["epsilon_max"] <= 5.0
    told = ("cohort", "failures", "epsilon", "num_updates")
    paid = [
        (
            Counter(
                (entry["round"], entry["client"])
                for entry in map(json.loads, (run / "ledger.jsonl").read_text().splitlines()[1:])
            ),
            [[entry[key] for key in told] for entry in rounds_of(run)],
        )
        for run in (together, alone)
    ]
    assert paid[0] == paid[1]


def test_a_round_timeout_that_nobody_can_meet_loses_only_the_round(tmp_path: Path) -> None:
    run = play(tmp_path / "run", "selection.round_timeout_s=0.000001", "rounds=1")
    (entry,) = rounds_of(run)
    assert {failure["kind"] for failure in entry["failures"]} == {"timeout"}
    assert len(entry["failures"]) == len(entry["cohort"])
    assert not entry["applied"]


# Why not ------------------------------------------------------------------------------------------


class Elsewhere(torch.optim.SGD):
    """An optimizer that nobody knows."""


@dataclass(frozen=True, kw_only=True)
class Silent:
    """An objective that says nothing of itself."""

    def add_gradient(self, local: Sequence[Tensor], received: Sequence[Tensor]) -> None:
        for tensor in local:
            if tensor.grad is not None:
                tensor.grad.mul_(1.0)


def target(cls: type) -> str:
    sys.modules.setdefault(__name__, sys.modules[cls.__module__])
    return f"{__name__}.{cls.__name__}"


def unknown_optimizer() -> dict[str, Any]:
    config = compose_config(["task/model=logistic"])
    config["client"]["optimizer"] |= {"_target_": target(Elsewhere)}
    return config


def silent_objective() -> dict[str, Any]:
    config = compose_config(["task/model=logistic"])
    config["strategy"]["objective"] = {"_target_": target(Silent)}
    return config


REASONS = {
    "early stopping": (
        lambda: compose_config(
            ["client.early_stopping_patience=2", "partition.validation_fraction=0.2"]
        ),
        "client.early_stopping_patience",
    ),
    "optimizer": (unknown_optimizer, "client.optimizer"),
    "objective": (silent_objective, "Silent does not say that it is_elementwise"),
    "heavy": (
        lambda: compose_config(
            ["task/model=mlp", "task.model.hidden=[2000,1500]", "client.batch_size=64"]
        ),
        "keeps a core busy",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_auto_falls_back_and_true_is_refused_with_the_reason(name, tmp_path, caplog) -> None:
    make, reason = REASONS[name]
    small = {"rounds": 1, "progress": "none", "fairness_clients": 0}
    config = {**make(), **small, "run_dir": str(tmp_path / "run")}
    config["partition"]["num_clients"] = 6
    config["selection"]["fraction"] = 0.3
    config["client"]["epochs"] = 1
    if name != "heavy":  # which takes its time to train
        with caplog.at_level(logging.INFO, logger="fl_app"):
            run = play_config(config)
        told = [r.getMessage() for r in caplog.records if "one by one" in r.getMessage()]
        assert len(told) == 1
        assert reason in told[0]
        assert summary_of(run)["training"] == "one by one"
    engine = LocalEngine(vectorize="true")
    with pytest.raises(ConfigError) as error:
        engine.run({**config, "run_dir": str(tmp_path / "refused")}, launched_at=0.0)
    for part in ("engine.vectorize=true cannot be done", reason, "Choose engine.vectorize=auto"):
        assert part in str(error.value)


def trainer(config: dict[str, Any], **options: Any) -> Any:
    options = {"device": torch.device("cpu"), "chunk_bytes": None, **options}
    return cohort_trainer(build(to_json(config)), **options)


def test_a_model_that_keeps_a_core_busy_by_itself_is_told_from_one_that_cannot_be_stacked() -> None:
    with pytest.raises(HeavyModelError, match="keeps a core busy"):
        trainer(REASONS["heavy"][0]())
    with pytest.raises(NotStackableError) as error:
        trainer(unknown_optimizer())
    assert not isinstance(error.value, HeavyModelError)


def test_private_training_is_told_to_take_more_memory_than_plain() -> None:
    plain = trainer(compose_config(["task/model=cnn"]))
    private = trainer(compose_config(["task/model=cnn", "privacy=record", *NOISE]))
    parameters = sum(p.numel() for p in plain.task.build_model().parameters())
    assert private.client_bytes > plain.client_bytes > 6 * 4 * parameters
    assert trainer(compose_config([]), chunk_bytes=7).chunk_bytes == 7


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"chunk_mib": 0}, ("engine.chunk_mib=0", ">= 1")),
        ({"threads": 0}, ("engine.threads=0", ">= 1")),
        ({"workers": 0}, ("engine.workers=0", ">= 1")),
        ({"vectorize": "perhaps"}, ("engine.vectorize=perhaps", "auto, true or false")),
        ({"device": "tpu"}, ("engine.device=tpu", "cpu")),
        ({"device": "cuda"}, ("engine.device=cuda", "torch sees", "Choose cpu or auto")),
        ({"device": "cuda:99"}, ("engine.device=cuda:99", "torch sees", "Choose cpu or auto")),
    ],
    ids=str,
)
def test_an_engine_that_cannot_be_is_refused(values, parts, tmp_path: Path) -> None:
    if values.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError) as error:
        config = compose_config(["rounds=1", "progress=none"])
        LocalEngine(**values).run({**config, "run_dir": str(tmp_path / "run")}, launched_at=0.0)
    for part in parts:
        assert part in str(error.value)
