"""The command: what it prints, what it leaves, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import TINY, environment, fl_app, rounds_of, summary_of
from safetensors.torch import load_file

from fl_app.cli import _main
from fl_app.params import model_hash


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv[:])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


def test_a_run_leaves_the_files_of_the_contract_and_prints_its_folder_last(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert _main(["run", *TINY, "name=mine"]) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    run_dir = Path(printed[-1])
    assert run_dir.parent.parent == tmp_path / "outputs"
    assert run_dir.name.endswith("_mine")
    assert any("accuracy" in line for line in printed)
    names = {path.name for path in run_dir.iterdir()}
    assert names >= {
        "config.yaml",
        "rounds.jsonl",
        "summary.json",
        "model.safetensors",
        "checkpoints",
        "report.html",
    }
    summary = summary_of(run_dir)
    assert set(summary) >= {
        *("task", "engine", "strategy", "seed", "rounds", "clients", "cohort_size"),
        *("config_hash", "model_hash", "metrics", "fairness", "privacy", "communication"),
        *("failures", "time_s", "resumed_from_round"),
    }
    assert set(summary["metrics"]) >= {"loss", "accuracy", "precision", "recall", "f1", "auroc"}
    assert set(summary["fairness"]) == {"accuracy_min", "accuracy_p10", "accuracy_std", "clients"}
    assert summary["privacy"]["unit"] == "none"
    assert set(summary["communication"]) == {
        "uplink_bytes",
        "downlink_bytes",
        "uplink_uncompressed_bytes",
    }
    assert set(summary["time_s"]) == {"setup", "total", "per_round"}
    assert (summary["clients"], summary["cohort_size"], summary["rounds"]) == (6, 3, 3)
    assert model_hash(load_file(run_dir / "model.safetensors")) == summary["model_hash"]
    assert [entry["round"] for entry in rounds_of(run_dir)] == [1, 2, 3]
    # The bytes of a round: three clients, a logistic model of 64 x 10 + 10 floats, each way.
    assert rounds_of(run_dir)[0]["uplink_bytes"] == 3 * 650 * 4
    assert summary["communication"]["downlink_bytes"] == 3 * 3 * 650 * 4


def test_json_prints_the_summary_alone(capfd: pytest.CaptureFixture[str]) -> None:
    assert _main(["run", "--json", *TINY]) == 0
    printed = capfd.readouterr()
    assert json.loads(printed.out)["task"] == "digits"
    assert printed.err == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "taskk=digits"],
        ["run", "task=digit"],
        ["run", "selection.fraction=2"],
        ["run", "rounds=0"],
        ["run", "~task"],
        ["run", "++resume=somewhere"],
        ["run", "name=../../escape"],
        ["run", "selection.min_clients=50", *TINY],
        ["check", "--config-dir", "nowhere"],
        ["check", "resume=nowhere"],
        ["run", "task=null"],
        ["run", "privacy=record", "privacy.delta=2"],
        ["run", "task/model=cnn", "task=breast_cancer"],
        ["run", "partition.num_clients=2000"],
        ["run", "resume=nowhere"],
        ["run", "initial_model=nowhere", *TINY],
        ["run", "output_url=/proc/nowhere", *TINY],
        ["run", "output_url=s3://bucket", *TINY],
        ["run", "--config-dir", "nowhere"],
        ["check", "strategy=fedavgg"],
        ["report", "."],
        ["walk"],
    ],
    ids=" ".join,
)
def test_a_bad_input_is_one_message_and_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert _main(arguments) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert printed.err.startswith("Error: ")
    assert len(printed.err.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("config.yaml"))


def test_an_unknown_flag_is_answered_with_the_usage_and_exit_code_2() -> None:
    with pytest.raises(SystemExit) as caught:
        _main(["run", "--no-such-flag"])
    assert caught.value.code == 2


def test_check_says_what_would_run_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert _main(["check", "strategy=fedyogi", "selection.count=3"]) == 0
    assert "fedyogi" in capsys.readouterr().out
    assert _main(["check", "--json", "task=breast_cancer"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["task"], plan["model_parameters"], plan["clients"]) == ("breast_cancer", 62, 10)
    assert not list(tmp_path.iterdir())


def test_a_sweep_plays_every_member_and_a_failed_one_does_not_end_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sweep = ["run", "-m", *TINY, "rounds=1", "strategy=fedavg,fedadam", "selection.count=3,99"]
    assert _main(sweep) == 2
    summaries = sorted((tmp_path / "multirun").rglob("summary.json"))
    assert [json.loads(path.read_text())["strategy"] for path in summaries] == ["fedavg", "fedadam"]
    assert capsys.readouterr().err.count("selection.count=99 exceeds") == 2


def test_each_member_of_a_sweep_has_a_clock_of_its_own_and_the_folder_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if the command had been started an hour ago: only the first member may feel it.
    monkeypatch.setattr("fl_app.cli.LAUNCHED_AT", time.time() - 3600)
    sweep = ["run", "-m", *TINY, "seed=1,2", "stopping.max_seconds=600", f"output_url={tmp_path}/o"]
    assert _main(sweep) == 0
    summaries = sorted((tmp_path / "o" / "multirun").rglob("summary.json"))
    assert [json.loads(path.read_text())["stopped_by"] for path in summaries] == ["time", "rounds"]
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


def test_a_broken_yaml_of_ones_own_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    for content in (b"rounds: [1\n", b"name: \xff\n"):
        (tmp_path / "mine" / "experiment" / "broken.yaml").write_bytes(content)
        assert _main(["run", "--config-dir", "mine", "experiment=broken"]) == 2
        assert "cannot be read" in capsys.readouterr().err


@pytest.mark.slow
def test_hydras_flags_pass_through(tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "short.yaml").write_text(
        "# @package _global_\nrounds: 1\nname: short\n"
    )
    shown = fl_app("run", "--cfg", "job", "strategy=fedprox", cwd=tmp_path)
    assert "mu: 0.01" in shown.stdout, shown.stderr
    played = fl_app(
        "run", "--config-dir", "mine", "experiment=short", "progress=none", cwd=tmp_path
    )
    assert played.returncode == 0, played.stderr
    assert summary_of(Path(played.stdout.strip().splitlines()[-1]))["rounds"] == 1


def test_two_runs_of_the_same_second_get_two_folders(tmp_path: Path) -> None:
    folder = f"hydra.run.dir={tmp_path}/same"
    assert _main(["run", *TINY, "rounds=1", folder]) == 0
    assert _main(["run", *TINY, "rounds=1", folder]) == 0
    assert (tmp_path / "same" / "summary.json").exists()
    assert (tmp_path / "same_2" / "summary.json").exists()


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    assert _main(["run", *TINY, "rounds=1", f"output_url=file://{tmp_path}/there"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert list((tmp_path / "there").rglob("summary.json"))


@pytest.mark.slow
def test_a_users_task_that_breaks_is_answered_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from dataclasses import dataclass\n"
        "from torch import nn\n"
        "from fl_app.tasks.digits import Digits\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class TooFew(Digits):\n"
        "    def build_model(self):\n"
        "        return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))\n"
    )
    done = fl_app("run", "task._target_=own.TooFew", cwd=tmp_path, path=tmp_path)
    assert done.returncode == 2
    assert "5" in done.stderr
    assert "9" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("sweep", [[], ["-m", "seed=1,2"]], ids=["run", "sweep"])
def test_an_interrupted_run_says_how_to_go_on(sweep: list[str], tmp_path: Path) -> None:
    folders = ["hydra.run.dir=run/0", "hydra.sweep.dir=run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fl_app", "run", "rounds=100000", *sweep, *folders],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    path = tmp_path / "run" / "0" / "rounds.jsonl"
    while process.poll() is None and not (path.exists() and path.stat().st_size):
        pass
    process.send_signal(2)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert "resume=" in errors
    assert "Traceback" not in errors
    assert [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()] == ["0"]


def test_training_leaves_torchs_threads_as_the_configuration_says() -> None:
    assert _main(["run", *TINY, "rounds=1", "engine.threads=1"]) == 0
    assert torch.get_num_threads() == 1
