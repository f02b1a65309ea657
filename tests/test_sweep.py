"""Sweeps: members that share nothing, in one process or several, and the table they leave."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import TINY, environment, fl_app, summary_of

from fl_app.cli import _main

JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")

# Members that leave something behind if anything does: clients' memories, dropout's random
# numbers, another number of threads, other shapes, a task of another kind.
RESTLESS = (
    "task/model=mlp",
    "task.model.dropout=0.2",
    "client.keep_optimizer_state=true",
    "client.optimizer.momentum=0.9",
    "client.failure_fraction=0.1",
    "partition.num_clients=6",
    "client.epochs=1",
    "rounds=3",
    "progress=none",
)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv[:])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def alone(tmp_path: Path, *overrides: str) -> str:
    """Return the model_hash of a run in a process of its own."""
    folder = tmp_path / "alone"
    done = fl_app("run", "--json", *overrides, f"hydra.run.dir={folder}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["model_hash"])


def test_the_table_has_a_row_for_each_member_whatever_came_of_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sweep = ["run", "-m", *TINY, "rounds=1,2", "selection.count=3,99", "hydra.sweep.dir=s"]
    assert _main(sweep) == 2
    rows = rows_of(tmp_path / "s")
    assert [(r["number"], r["rounds"], r["selection.count"], r["status"]) for r in rows] == [
        ("0", "1", "3", "ok"),
        ("1", "1", "99", "failed"),
        ("2", "2", "3", "ok"),
        ("3", "2", "99", "failed"),
    ]
    for row in rows[::2]:
        summary = summary_of(Path(row["run_dir"]))
        assert row["model_hash"] == summary["model_hash"]
        for name, value in summary["metrics"].items():
            assert float(row[name]) == value
        for name in ("accuracy_min", "accuracy_p10", "accuracy_std"):
            assert float(row[name]) == summary["fairness"][name]
        assert row["rounds_played"] == row["rounds"]
        assert float(row["seconds"]) == summary["time_s"]["total"]
        assert row["task/model"] == "logistic"
        assert row["error"] == ""
    for row in rows[1::2]:
        assert row["error"].startswith("selection.count=99 exceeds the population")
        assert row["model_hash"] == row["run_dir"] == ""
    printed = capsys.readouterr()
    assert printed.out.strip().splitlines()[-1] == str(tmp_path / "s" / "sweep.csv")
    last = printed.err.strip().splitlines()[-1]
    assert "2 of 4 runs failed: 1 (rounds=1 selection.count=99), 3 (" in last


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), JOBLIB], ids=["basic", "joblib"])
def test_a_member_is_the_run_it_would_be_alone_whatever_stood_before_it(
    launcher: tuple[str, ...], tmp_path: Path
) -> None:
    choices = ("strategy=fedprox,fedadam", "seed=2,1", "hydra.sweep.dir=s")
    done = fl_app("run", "-m", *RESTLESS, *choices, *launcher, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    hashes = {(r["strategy"], r["seed"]): r["model_hash"] for r in rows_of(tmp_path / "s")}
    assert len(set(hashes.values())) == 4
    for strategy, seed in (("fedprox", "1"), ("fedadam", "1")):  # the second and the last
        single = alone(tmp_path, *RESTLESS, f"strategy={strategy}", f"seed={seed}")
        assert hashes[strategy, seed] == single


@pytest.mark.slow
def test_a_member_that_breaks_half_way_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    # One that another number of threads and clients' memories are left by, in mid-round.
    (tmp_path / "own.py").write_text(
        "from dataclasses import dataclass\n"
        "import torch\n"
        "from fl_app.aggregation import WeightedMean\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Breaks(WeightedMean):\n"
        "    at: int = 9\n"
        "    def __call__(self, updates):\n"
        "        if updates[0].round == self.at:\n"
        "            torch.manual_seed(7)\n"
        "            raise ZeroDivisionError('half-way')\n"
        "        return super().__call__(updates)\n"
    )
    recipe = (*RESTLESS, "strategy.aggregation._target_=own.Breaks")
    choices = ("+strategy.aggregation.at=2,9", "engine.threads=2,1", "hydra.sweep.dir=s")
    done = fl_app("run", "-m", *recipe, *choices, cwd=tmp_path, path=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "ZeroDivisionError" in done.stderr
    assert "2 of 4 runs failed" in done.stderr.strip().splitlines()[-1]
    rows = rows_of(tmp_path / "s")
    assert [row["status"] for row in rows] == ["failed", "failed", "ok", "ok"]
    assert "raised ZeroDivisionError (half-way) on 2 updates" in rows[0]["error"]
    assert rows[3]["model_hash"] == alone(tmp_path, *RESTLESS)


@pytest.mark.slow
def test_joblib_leaves_what_the_basic_launcher_leaves(tmp_path: Path) -> None:
    sweep = ("run", "-m", *TINY, "name=a,b", "selection.count=3,99")
    for folder, launcher in (("basic", ()), ("joblib", JOBLIB)):
        done = fl_app(*sweep, *launcher, f"hydra.sweep.dir={folder}", cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert "2 of 4 runs failed: 1 (name=a selection.count=99), 3 (" in done.stderr
        assert done.stderr.count("selection.count=99 exceeds") == 2
        assert done.stdout.strip().splitlines()[-1] == str(tmp_path / folder / "sweep.csv")

    def lasting(folder: str) -> list[dict[str, str]]:
        rows = rows_of(tmp_path / folder)
        return [{k: v for k, v in r.items() if k not in ("seconds", "run_dir")} for r in rows]

    assert lasting("joblib") == lasting("basic")
    for row in rows_of(tmp_path / "joblib")[::2]:
        assert row["run_dir"] == str(tmp_path / "joblib" / row["number"])


@pytest.mark.parametrize(
    "launcher",
    [(), pytest.param(JOBLIB, marks=pytest.mark.slow)],
    ids=["basic", "joblib"],
)
def test_json_gives_one_line_a_member_and_nothing_else_on_stdout(
    launcher: tuple[str, ...], tmp_path: Path
) -> None:
    choices = ("selection.count=3,99", "hydra.sweep.dir=s", *launcher)
    done = fl_app("run", "-m", "--json", *TINY, *choices, cwd=tmp_path)
    assert done.returncode == 2
    good, bad = (json.loads(line) for line in done.stdout.splitlines())
    summary = summary_of(tmp_path / "s" / "0")
    assert {key: good[key] for key in summary} == summary
    assert (good["number"], good["status"], good["error"]) == (0, "ok", "")
    assert good["overrides"]["selection.count"] == "3"
    assert good["run_dir"] == str(tmp_path / "s" / "0")
    assert (bad["number"], bad["status"]) == (1, "failed")
    assert "selection.count=99 exceeds" in bad["error"]
    assert "model_hash" not in bad


@pytest.mark.slow
def test_two_sweeps_into_one_folder_get_two(tmp_path: Path) -> None:
    sweep = ["run", "-m", *TINY, "rounds=1", "seed=1,2", "hydra.sweep.dir=s"]
    assert _main(sweep) == 0
    assert _main(sweep) == 0
    assert len(rows_of(tmp_path / "s")) == len(rows_of(tmp_path / "s_2")) == 2


def test_a_folder_of_any_name_will_do(tmp_path: Path) -> None:
    folder = tmp_path / "it's, a = {new} [folder]"
    quoted = str(folder).replace("'", "\\'")
    sweep = ["run", "-m", *TINY, "rounds=1", "seed=1", f"hydra.sweep.dir='{quoted}'"]
    assert _main(sweep) == 0
    assert [row["status"] for row in rows_of(folder)] == ["ok"]


def test_what_does_not_compose_is_told_before_any_member_begins(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert _main(["run", "-m", *TINY, "strategy=fedavg,fedavgg"]) == 2
    assert "strategy=fedavgg does not exist; did you mean fedavg" in capsys.readouterr().err
    assert not list(tmp_path.rglob("config.yaml"))


def test_a_sweep_may_be_asked_for_by_hydras_own_key(tmp_path: Path) -> None:
    sweep = ["run", *TINY, "rounds=1", "seed=1,2", "hydra.mode=MULTIRUN", "hydra.sweep.dir=s"]
    assert _main(sweep) == 0
    assert len(rows_of(tmp_path / "s")) == 2


@pytest.mark.slow
def test_sweepers_are_told_accuracy_or_nan_of_a_member_that_failed(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from pathlib import Path\n"
        "from hydra.experimental.callback import Callback\n"
        "class Told(Callback):\n"
        "    def on_job_end(self, config, job_return, **kwargs):\n"
        "        with Path('told').open('a') as file:\n"
        "            file.write(f'{job_return.return_value!r} ')\n"
    )
    told = "+hydra.callbacks.mine._target_=own.Told"
    choices = ("selection.count=3,99", told, "hydra.sweep.dir=s")
    fl_app("run", "-m", *TINY, *choices, cwd=tmp_path, path=tmp_path)
    accuracy = summary_of(tmp_path / "s" / "0")["metrics"]["accuracy"]
    assert (tmp_path / "told").read_text().split() == [repr(accuracy), "nan"]


def start(tmp_path: Path, *overrides: str) -> subprocess.Popen[str]:
    """Start a sweep whose first member is quick and whose next ones last for hours."""
    recipe = ("partition.num_clients=6", "client.epochs=1", "rounds=1,100000,100001")
    process = subprocess.Popen(
        [sys.executable, "-m", "fl_app", "run", "-m", *recipe, "hydra.sweep.dir=s", *overrides],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    first = tmp_path / "s" / "0" / "report.html"
    second = tmp_path / "s" / "1" / "rounds.jsonl"
    while process.poll() is None and not (first.exists() and second.exists()):
        time.sleep(0.05)
    time.sleep(0.5)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["the command", "its whole group"])
@pytest.mark.parametrize(
    "launcher",
    [(), pytest.param(JOBLIB, marks=pytest.mark.slow)],
    ids=["basic", "joblib"],
)
def test_ctrl_c_ends_a_sweep_which_leaves_its_table(
    launcher: tuple[str, ...], whom: str, tmp_path: Path
) -> None:
    process = start(tmp_path, *launcher)
    send = os.kill if whom == "the command" else os.killpg  # a terminal tells the whole group
    send(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    rows = rows_of(tmp_path / "s")
    assert [row["status"] for row in rows][:2] == ["ok", "interrupted"]
    assert all(row["status"] == "interrupted" for row in rows[1:])
    assert len(rows) == 2 if not launcher else len(rows) in (2, 3)
    assert f"fl-app run resume={tmp_path}/s/1" in errors
    # What falls into a callback of the interpreter's own, such as a weak reference's, it prints.
    assert errors.count("Traceback") == errors.count("Exception ignored in")
    assert "interrupted" in output
    resumed = fl_app("run", "resume=s/1", "rounds=1", "--json", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr


@pytest.mark.slow
def test_a_sweep_that_is_killed_outright_leaves_what_is_known(tmp_path: Path) -> None:
    process = start(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    assert [row["status"] for row in rows_of(tmp_path / "s")] == ["ok", "running"]
