"""Packages of users: what the documents show runs as shown, and what is broken is one message."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
from flower_process import flower
from helpers import REPOSITORY, environment, fl_app, rounds_of, summary_of

from fl_app.cli import _main

BLOCK = re.compile(r"^```(python|yaml|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# Another engine is one more entry.
ENGINES = {
    name: ["engine.vectorize=false", f"engine.workers={workers}"]
    for name, workers in {"one process": 1, "two workers": 2}.items()
}

FEW = ("rounds=3", "client.epochs=1", "progress=none", "partition.num_clients=6")


def unpack(folder: Path, document: str, heading: str) -> str:
    """Write the files that a section of a document shows, and return its command."""
    text = (REPOSITORY / document).read_text()
    section = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    commands = []
    for language, content in BLOCK.findall(section):
        if language == "sh":
            commands.append(content)
            continue
        name = re.match(r"# (\S+)\n", content)
        assert name, f"{document}: a block that does not begin with the name of its file"
        path = folder / name[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (command,) = commands
    return command


def shell(command: str, cwd: Path, *overrides: str) -> Path:
    """Run a command of the documents as it stands, with more overrides; return the run's folder."""
    script = f'fl-app() {{ "{sys.executable}" -m fl_app "$@"; }}\n{command.strip()} "$@"'
    # The command names its own PYTHONPATH; fl_app itself is installed, where a person types it.
    script = script.replace("PYTHONPATH=.", f"PYTHONPATH=.{os.pathsep}{REPOSITORY}")
    done = subprocess.run(
        ["bash", "-c", script, "bash", *overrides],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Path(cwd, done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(300)  # two commands, on a machine that may be busy
def test_the_section_of_the_readme_runs_on_every_engine_with_the_same_bits(tmp_path: Path) -> None:
    command = unpack(tmp_path, "README.md", "Your own data and model")
    assert not list((REPOSITORY / "fl_app").rglob("*rings*"))
    summaries = {}
    for name, overrides in ENGINES.items():
        run_dir = shell(command, tmp_path, *overrides)
        summaries[name] = json.loads((run_dir / "summary.json").read_text())
    first, *others = summaries.values()
    assert (first["task"], first["rounds"], first["clients"]) == ("rings", 10, 10)
    assert first["metrics"]["accuracy"] > 0.9
    assert {other["model_hash"] for other in others} == {first["model_hash"]}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_section_of_the_readme_runs_on_flowers_simulation_with_the_same_bits(
    tmp_path: Path,
) -> None:
    """On ours of it, and typed as ``flwr run``."""
    command = unpack(tmp_path, "README.md", "Your own data and model")
    local = shell(command, tmp_path, "rounds=2", "engine.vectorize=false")
    simulated = shell(command, tmp_path, "rounds=2", "engine=simulation")
    with flower(tmp_path / "flwr", PYTHONPATH=f"{REPOSITORY}{os.pathsep}{tmp_path}") as flwr:
        flwr.cwd.mkdir()
        overrides = f"--config-dir={tmp_path / 'my_conf'} task=rings task.model.hidden=32 rounds=2"
        played = flwr.run(overrides=overrides, supernodes=10)
        assert played.status == "finished:completed", played.log
        (typed,) = flwr.run_dirs()
    for run_dir in (simulated, typed):
        assert rounds_of(run_dir) == rounds_of(local)
        assert summary_of(run_dir)["model_hash"] == summary_of(local)["model_hash"]


def test_that_section_is_short() -> None:
    text = (REPOSITORY / "README.md").read_text()
    section = text.split("## Your own data and model\n", 1)[1].split("\n## ", 1)[0]
    assert len(section.strip().splitlines()) < 40


@pytest.mark.slow
def test_a_rule_a_selector_and_a_metric_of_ones_own_run_as_contributing_shows(
    tmp_path: Path,
) -> None:
    command = unpack(tmp_path, "CONTRIBUTING.md", "Adding a thing")
    damped = shell(command, tmp_path, *FEW, "name=damped")
    summary = json.loads((damped / "summary.json").read_text())
    assert summary["strategy"] == "damped"
    assert [entry["cohort"] for entry in rounds_of(damped)] == [["0", "1", "2"]] * 3
    assert summary["metrics"]["accuracy"] < summary["metrics"]["top3"] <= 1
    # In the limit: undamped, it is the mean.
    undamped = shell(command, tmp_path, *FEW, "strategy.aggregation.factor=1.0")
    mean = shell(
        command.replace("strategy=damped", "strategy=fedavg"),
        tmp_path,
        *FEW,
        "strategy.aggregation.weighting=uniform",
    )
    for before, after in zip(rounds_of(undamped), rounds_of(mean), strict=True):
        assert before["metrics"] == pytest.approx(after["metrics"], abs=1e-4)


BROKEN = """
import torch
from dataclasses import dataclass
from torch import nn

from fl_app.aggregation import WeightedMean
from fl_app.selection import Uniform
from fl_app.tasks.digits import Digits


def records():
    return torch.randn(60, 2), torch.arange(60) % 2


def no_records():
    raise FileNotFoundError("heart.csv")


def three():
    return 1, 2, 3


def net():
    return nn.Linear(2, 2)


def no_net():
    return "a net"


def closed():
    raise RuntimeError("no licence")


class Forgetful(nn.Linear):
    def forward(self, inputs):
        return self.nothing_of_the_kind(inputs)


class Two(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs), inputs


def loss_of_batch(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets)


def bad_metric(outputs, targets):
    return outputs


@dataclass(frozen=True, kw_only=True)
class Fussy(WeightedMean):
    def __post_init__(self):
        raise KeyError("fussy")


class NotARule:
    pass


class Nothing:
    def __call__(self, updates):
        return None


class OtherNames:
    def __call__(self, updates):
        return {"x": torch.zeros(3)}


class OtherShapes:
    def __call__(self, updates):
        return {name: t.flatten()[:1] for name, t in updates[0].delta.items()}


class NotANumber:
    def __call__(self, updates):
        return {name: t * float("nan") for name, t in updates[0].delta.items()}


class Divides:
    def __call__(self, updates):
        return 1 / 0


@dataclass(frozen=True, kw_only=True)
class NoCohort(Uniform):
    def select(self, clients, *, round, seed):
        return None


@dataclass(frozen=True, kw_only=True)
class Strangers(Uniform):
    def select(self, clients, *, round, seed):
        return [f"stranger-{n}" for n in range(5)]


@dataclass(frozen=True, kw_only=True)
class Twice(Uniform):
    def select(self, clients, *, round, seed):
        return [clients[0]] * 5


class NoTask:
    pass


class Late:
    calls = 0

    def __call__(self, updates):
        Late.calls += 1  # the first is the trial before the run
        bad = Late.calls > 2
        return {name: t / 0 if bad else t for name, t in updates[0].delta.items()}
"""

OWN = """
_target_: fl_app.tasks.own.OwnTask
records: {_target_: broken.records, _partial_: true}
model: {_target_: broken.net, _partial_: true}
"""


def own(**targets: str) -> list[str]:
    """Return the overrides that name other parts for a task of one's own."""
    return ["task=own", *(f"task.{key}._target_=broken.{t}" for key, t in targets.items())]


def module(target: str) -> list[str]:
    return [*own(model=target), "+task.model.in_features=2", "+task.model.out_features=2"]


def rule(target: str) -> list[str]:
    return ["strategy=median", f"strategy.aggregation._target_=broken.{target}"]


def selector(target: str) -> list[str]:
    return [f"selection._target_=broken.{target}"]


Check: TypeAlias = Callable[..., tuple[int, str]]


@pytest.fixture
def check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Check:
    """Return what gives the exit code and the message of `fl-app check` over broken parts."""
    (tmp_path / "broken.py").write_text(BROKEN)
    (tmp_path / "empty_error.py").write_text("raise ImportError\n")
    (tmp_path / "my_conf" / "task").mkdir(parents=True)
    (tmp_path / "my_conf" / "task" / "own.yaml").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(*overrides: str) -> tuple[int, str]:
        code = _main(["check", "--config-dir=my_conf", *overrides])
        return code, capsys.readouterr().err

    yield run
    sys.modules.pop("broken", None)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (rule("Missing"), ["strategy.aggregation._target_=broken.Missing", "cannot be imported"]),
        (["task._target_=empty_error.Task"], ["task._target_=empty_error.Task", "ImportError"]),
        (rule("NotARule"), ["strategy.aggregation", "NotARule", "__call__"]),
        (rule("Fussy"), ["strategy.aggregation cannot be made", "KeyError", "fussy"]),
        (rule("Nothing"), ["Nothing", "returned a NoneType", "every name"]),
        (rule("OtherNames"), ["OtherNames", "missing", "mend"]),
        (rule("OtherShapes"), ["OtherShapes", "has shape (1,)", "mend"]),
        (rule("NotANumber"), ["NotANumber", "NaN", "mend"]),
        (rule("Divides"), ["Divides", "ZeroDivisionError", "HYDRA_FULL_ERROR=1"]),
        (selector("NoTask"), ["selection", "NoTask", "is not a key of"]),
        (selector("NoCohort"), ["select() gave None", "list of client ids"]),
        (selector("Strangers"), ["stranger-0", "entries of `clients`"]),
        (selector("Twice"), ["1 different clients in a list of 5"]),
        (["~task", "+task={_target_: broken.NoTask}"], ["task is a NoTask", "no name"]),
        (own(), []),
        (own(records="no_records"), ["task failed to give its records", "FileNotFoundError"]),
        (own(records="three"), ["task.records gave a tuple", "(inputs, targets)"]),
        (own(model="no_net"), ["build_model() gave a str", "torch.nn.Module"]),
        (own(model="closed"), ["task failed to build its model", "no licence"]),
        (
            [*own(), "+task.loss={_target_: broken.loss_of_batch, _partial_: true}"],
            ["losses of shape ()", "one number per record"],
        ),
        (module("Forgetful"), ["nothing_of_the_kind", "AttributeError", "forward()"]),
        (module("Two"), ["gives a tuple", "one tensor"]),
        ([*own(), "task.model._partial_=false"], ["task.model is a Linear", "_partial_: true"]),
        (
            ["+task.extra_metrics.bad={_target_: broken.bad_metric, _partial_: true}"],
            ["task.extra_metrics.bad", "must return a float"],
        ),
    ],
    ids=lambda value: " ".join(value)[-60:] if isinstance(value, list) else None,
)
def test_a_broken_component_is_one_message_that_names_its_key(
    overrides: list[str], words: list[str], check: Check
) -> None:
    code, message = check(*overrides)
    if not words:  # what all the others are a change of
        assert (code, message) == (0, "")
        return
    assert code == 2
    assert message.startswith("Error: ")
    assert len(message.strip().splitlines()) == 1
    for word in words:
        assert word in message


@pytest.mark.slow
def test_a_rule_that_breaks_in_the_middle_ends_the_run_with_one_message(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    done = fl_app("run", *rule("Late"), *FEW, cwd=tmp_path, path=tmp_path)
    assert done.returncode == 1
    assert "Late" in done.stderr
    assert "NaN or infinite" in done.stderr
    assert "Traceback" not in done.stderr
    full = {"HYDRA_FULL_ERROR": "1"}
    (tmp_path / "broken.py").write_text(BROKEN)
    done = fl_app("check", *rule("Divides"), cwd=tmp_path, path=tmp_path, extra=full)
    assert "return 1 / 0" in done.stderr
