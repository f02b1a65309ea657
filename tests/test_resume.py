"""Killed at any instant and resumed, a run ends as if it had never been interrupted."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import (
    TINY,
    environment,
    fl_app,
    play,
    play_config,
    rounds_of,
    summary_of,
)

from fl_app.config import resumed_config
from fl_app.types import ConfigError

# Stateful on both sides, with failures, dropout, partial cohorts and an odd checkpoint interval.
RECIPE = (
    "task/model=mlp",
    "task.model.dropout=0.1",
    "strategy=fedadam",
    "partition.num_clients=12",
    "selection.fraction=0.5",
    "client.epochs=1",
    "client.keep_optimizer_state=true",
    "client.optimizer.momentum=0.9",
    "client.failure_fraction=0.1",
    "checkpoint_every=3",
    "progress=none",
)


def resume(run_dir: Path, *overrides: str) -> Path:
    return play_config(resumed_config(str(run_dir), overrides))


def same_result(run_dir: Path, reference: Path) -> None:
    assert summary_of(run_dir)["model_hash"] == summary_of(reference)["model_hash"]
    assert rounds_of(run_dir) == rounds_of(reference)
    for key in ("metrics", "fairness", "communication", "failures", "rounds", "config_hash"):
        assert summary_of(run_dir)[key] == summary_of(reference)[key]


@pytest.mark.parametrize("stop_after", [1, 3, 4, 9])
def test_a_run_cut_at_any_round_and_resumed_equals_the_uninterrupted_one(
    stop_after: int, tmp_path: Path
) -> None:
    reference = play(tmp_path / "whole", *RECIPE, "rounds=10", tiny=False)
    cut = play(tmp_path / "cut", *RECIPE, f"rounds={stop_after}", tiny=False)
    # As a kill would leave it: a checkpoint only where one was due, and a line begun.
    for path in (cut / "checkpoints").iterdir():
        if int(path.stem.removeprefix("round_")) % 3:
            path.unlink()
    with (cut / "rounds.jsonl").open("a") as file:
        file.write('{"round": 11, "coh')
    resume(cut, "rounds=10")
    same_result(cut, reference)
    assert summary_of(cut)["resumed_from_round"] == stop_after // 3 * 3


@pytest.mark.slow
def test_a_run_killed_at_random_instants_ends_like_the_uninterrupted_one(tmp_path: Path) -> None:
    reference = play(tmp_path / "whole", *RECIPE, "rounds=60", tiny=False)
    run_dir = tmp_path / "killed"
    start = ["run", *RECIPE, "rounds=60", f"hydra.run.dir={run_dir}"]
    generator = random.Random(4)
    kills = 0
    for _ in range(20):
        begun = (run_dir / "config.yaml").exists() and (run_dir / "config.yaml").stat().st_size
        arguments = ["run", f"resume={run_dir}"] if begun else start
        if run_dir.exists() and not begun:
            shutil.rmtree(run_dir)
        process = subprocess.Popen(
            [sys.executable, "-m", "fl_app", *arguments],
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        lines = rounds_file_size(run_dir)
        # Killed a random while after it has written something new, so never in vain.
        while process.poll() is None and rounds_file_size(run_dir) == lines:
            time.sleep(0.01)
        time.sleep(generator.uniform(0.0, 0.6))
        if process.poll() is None and kills < 4:
            process.send_signal(signal.SIGKILL)
            kills += 1
        _, errors = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors.decode()
    assert kills >= 2
    same_result(run_dir, reference)


def rounds_file_size(run_dir: Path) -> int:
    path = run_dir / "rounds.jsonl"
    return path.stat().st_size if path.exists() else 0


def test_a_corrupt_checkpoint_is_said_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference = play(tmp_path / "whole", "rounds=5")
    cut = play(tmp_path / "cut", "rounds=3")
    newest = cut / "checkpoints" / "round_000003.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    resume(cut, "rounds=5")
    assert "Checkpoint of round 3 is damaged" in caplog.text
    assert summary_of(cut)["resumed_from_round"] == 2
    same_result(cut, reference)


def test_with_every_checkpoint_damaged_the_run_starts_again_and_its_new_ones_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference = play(tmp_path / "whole", "rounds=4")
    cut = play(tmp_path / "cut", "rounds=9")
    for path in (cut / "checkpoints").iterdir():
        path.write_bytes(b"rubbish")
    resume(cut, "rounds=2")
    assert "starts again from its first round" in caplog.text
    assert summary_of(cut)["resumed_from_round"] == 0
    resume(cut, "rounds=4")
    assert summary_of(cut)["resumed_from_round"] == 2
    same_result(cut, reference)


def test_a_finished_run_resumed_plays_nothing_and_says_the_same(tmp_path: Path) -> None:
    run_dir = play(tmp_path / "run", "stopping.target=0.1", "rounds=9")
    shutil.copytree(run_dir, tmp_path / "copy")
    assert summary_of(run_dir)["stopped_by"] == "target"
    resume(run_dir)
    same_result(run_dir, tmp_path / "copy")
    resume(run_dir, "stopping.target=null")
    assert summary_of(run_dir)["rounds"] == 9


def test_seconds_before_a_resume_count_towards_the_time_limit(tmp_path: Path) -> None:
    run_dir = play(tmp_path / "run", "stopping.max_seconds=0.001", "rounds=9")
    assert summary_of(run_dir)["stopped_by"] == "time"
    assert summary_of(run_dir)["rounds"] == 1
    resume(run_dir, "stopping.max_seconds=1000", "rounds=2")
    assert summary_of(run_dir)["time_s"]["total"] > 0.001


def test_a_run_starts_from_a_given_model(tmp_path: Path) -> None:
    first = play(tmp_path / "first")
    model = first / "model.safetensors"
    second = play(tmp_path / "second", f"initial_model={model}", "client.optimizer.lr=0.0")
    assert summary_of(second)["model_hash"] == summary_of(first)["model_hash"]
    with pytest.raises(ConfigError, match="does not fit"):
        play(tmp_path / "third", f"initial_model={model}", "task/model=cnn")
    with pytest.raises(ConfigError, match=r"initial_model=.*nowhere"):
        play(tmp_path / "fourth", "initial_model=nowhere.safetensors")


def test_a_run_that_another_process_plays_cannot_be_resumed(tmp_path: Path) -> None:
    run_dir = play(tmp_path / "run")
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys, time\n"
            f"file = open({str(run_dir / '.lock')!r}, 'w')\n"
            "fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(ConfigError, match="another process"):
            resume(run_dir)
    finally:
        holder.kill()
        holder.communicate()


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_the_way_to_go_on_and_loses_nothing(tmp_path: Path) -> None:
    reference = play(tmp_path / "whole", "rounds=40")
    run_dir = tmp_path / "run"
    # No file may grow beyond 12 kB: rounds.jsonl hits that first, as it would a full disk.
    script = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))\n"
        "from fl_app.cli import main\n"
        f"sys.argv = ['fl-app', 'run', *{list(TINY)!r}, 'rounds=40', 'hydra.run.dir={run_dir}']\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert f"resume={run_dir}" in done.stderr
    assert "Traceback" not in done.stderr
    finished = fl_app("run", f"resume={run_dir}", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    same_result(run_dir, reference)


def test_a_run_whose_folder_is_gone_is_not_begun_again_in_its_place(tmp_path: Path) -> None:
    run_dir = play(tmp_path / "run", "rounds=1")
    config = resumed_config(str(run_dir), ["rounds=2"])
    shutil.rmtree(run_dir)
    with pytest.raises(ConfigError, match="never began here, or its files are gone"):
        play_config(config)
    assert not run_dir.exists()
