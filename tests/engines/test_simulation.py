"""``engine=simulation``: the bits of ``engine=local``, one message a mistake, and no orphans."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from flower_process import free_port, processes_of
from helpers import TINY, environment, fl_app, play, rounds_of, summary_of

from fl_app.components import make_engine
from fl_app.config import compose_config, resumed_config
from fl_app.engines.simulation import SimulationEngine
from fl_app.plan import describe_plan
from fl_app.types import ConfigError

SIMULATION = "engine=simulation"

STATEFUL = ("client.keep_optimizer_state=true", "client.optimizer.momentum=0.9")
FLAKY = ("client.failure_fraction=0.3",)


def simulate(folder: Path, *overrides: str) -> Path:
    """Play a tiny run on Flower's simulation and return its folder."""
    config = compose_config([*TINY, SIMULATION, *overrides])
    return _played({**config, "run_dir": str(folder)})


def _played(config: dict) -> Path:
    run_dir: Path = make_engine(config).run(config, launched_at=time.time())
    return run_dir


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A word in the environment of all that a test starts; nothing that has it may be left."""
    marker = f"orphan-test-{os.getpid()}-{tmp_path.name}"
    monkeypatch.setenv("FL_APP_TEST", marker)
    yield marker
    deadline = time.monotonic() + 20
    while processes_of(marker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(marker) == {}


def homes_of(marker: str) -> set[Path]:
    """Return the temporary homes of Flower's processes that run now."""
    settings = set()
    for process in processes_of(marker):
        with suppress(OSError):
            settings |= set(Path(f"/proc/{process}/environ").read_bytes().split(b"\0"))
    return {Path(os.fsdecode(s[11:])) for s in settings if s.startswith(b"FLWR_HOME=/")}


# What needs no process -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"client_cpus": 0}, "engine.client_cpus=0 must be >= 1"),
        ({"threads": 0}, "engine.threads=0 must be >= 1"),
        ({"client_gpus": -1.0}, "engine.client_gpus=-1.0 must be >= 0"),
        ({"client_gpus": float("nan")}, "engine.client_gpus=nan must be >= 0"),
        ({"port": 70000}, "engine.port=70000 must lie in"),
        ({"client_cpus": 3, "cpus": 2}, "engine.client_cpus=3 exceeds the 2 cores"),
        ({"client_cpus": 100_000}, "exceeds"),
    ],
)
def test_a_bad_value_is_named_with_its_rule(field: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        SimulationEngine(**field)


def test_without_ray_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError) as caught:
        SimulationEngine()
    assert 'pip install "fl-app[simulation]"' in str(caught.value)
    assert "engine=local" in str(caught.value)


def test_check_says_what_would_run_on_it() -> None:
    plan = describe_plan(compose_config([*TINY, SIMULATION]))
    assert plan["engine"] == "SimulationEngine"


def test_a_port_in_use_is_named_before_anything_starts(tmp_path: Path, marked: str) -> None:
    with socket.socket() as taken:
        port = free_port()
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(ConfigError, match=f"engine.port={port} .*engine.port=0"):
            simulate(tmp_path / "run", f"engine.port={port}")
    assert not (tmp_path / "run").exists()


# Real processes --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "overrides",
    [
        ("strategy=fedavg", *STATEFUL, *FLAKY),
        ("strategy=fedadam", *FLAKY),
        ("strategy=krum", "selection.fraction=1.0"),
        ("strategy=fedprox", "partition=dirichlet", "client/optimizer=adam", *STATEFUL[:1]),
    ],
    ids=["fedavg-stateful-flaky", "fedadam-flaky", "krum-all", "fedprox-stateful-dirichlet"],
)
def test_simulation_gives_the_bits_of_local(
    overrides: tuple[str, ...], tmp_path: Path, marked: str
) -> None:
    simulated = simulate(tmp_path / "simulated", *overrides)
    local = play(tmp_path / "local", "engine.vectorize=false", *overrides)
    assert rounds_of(simulated) == rounds_of(local)
    assert (simulated / "clients.json").read_bytes() == (local / "clients.json").read_bytes()
    one, other = summary_of(simulated), summary_of(local)
    assert one["model_hash"] == other["model_hash"]
    assert (one["engine"], other["engine"]) == ("simulation", "local")
    differ = {key for key in one if one[key] != other[key]}
    assert differ <= {"engine", "time_s", "config_hash"}
    if FLAKY[0] in overrides:
        assert one["failures"]["clients"] > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_whose_command_is_killed_leaves_no_process_and_goes_on_to_the_same_bits(
    tmp_path: Path, marked: str
) -> None:
    rounds, run_dir = "rounds=40", tmp_path / "run"
    process = _command(tmp_path, rounds, *STATEFUL)
    _wait_for_a_round(process, run_dir)
    assert len(processes_of(marked)) > 5
    (home,) = homes_of(marked)
    process.kill()
    process.communicate()
    _wait_until_gone(marked)
    assert not home.exists()
    resumed = _played(resumed_config(str(run_dir), []))
    local = play(tmp_path / "local", "engine.vectorize=false", rounds, *STATEFUL)
    assert summary_of(resumed)["model_hash"] == summary_of(local)["model_hash"]
    assert summary_of(resumed)["resumed_from_round"] is not None
    assert rounds_of(resumed) == rounds_of(local)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_an_interrupted_command_leaves_no_process(number: int, tmp_path: Path, marked: str) -> None:
    process = _command(tmp_path, "rounds=100000")
    _wait_for_a_round(process, tmp_path / "run")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 1, errors
        assert f"fl-app run resume={tmp_path / 'run'}" in errors
        assert "Traceback" not in errors
    _wait_until_gone(marked)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_mistake_that_only_the_server_app_can_see_is_one_message_and_exit_code_2(
    tmp_path: Path, marked: str
) -> None:
    (tmp_path / "own.py").write_text(
        "import sys\n"
        "from fl_app.aggregation import WeightedMean\n"
        "from fl_app.types import ConfigError\n"
        "class Refuses(WeightedMean):\n"
        "    def __post_init__(self):\n"
        "        if 'flwr-simulation' in sys.argv[0]:\n"
        "            raise ConfigError('own.key=5 must be 6: say six.')\n"
        "        super().__post_init__() if hasattr(super(), '__post_init__') else None\n"
    )
    done = fl_app(
        *("run", *TINY, SIMULATION, "strategy.aggregation._target_=own.Refuses"),
        cwd=tmp_path,
        path=tmp_path,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1] == "Error: own.key=5 must be 6: say six."


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_simulation_that_breaks_down_ends_with_the_last_lines_of_its_log_and_exit_code_1(
    tmp_path: Path, marked: str
) -> None:
    (tmp_path / "own.py").write_text(
        "from fl_app.selection import Uniform\n"
        "class Dies(Uniform):\n"
        "    def positions(self, population, size, *, round, seed):\n"
        "        if round == 2:\n"
        "            raise ZeroDivisionError('by nought')\n"
        "        return super().positions(population, size, round=round, seed=seed)\n"
    )
    done = fl_app(
        *("run", "--json", *TINY, SIMULATION, "selection._target_=own.Dies"),
        cwd=tmp_path,
        path=tmp_path,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Error: the run failed with ZeroDivisionError: by nought;")
    assert "own.py" in done.stderr  # the traceback's last lines


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_plays_one_simulation_after_another_and_prints_what_a_local_one_prints(
    tmp_path: Path, marked: str
) -> None:
    sweep = ["run", "-m", "--json", *TINY, "rounds=1", SIMULATION, "seed=1,2"]
    done = fl_app(*sweep, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    decoder, text, summaries = json.JSONDecoder(), done.stdout.strip(), []
    while text:
        summary, end = decoder.raw_decode(text)
        summaries.append(summary)
        text = text[end:].strip()
    assert [summary["seed"] for summary in summaries] == [1, 2]
    assert {summary["engine"] for summary in summaries} == {"simulation"}
    assert len(list((tmp_path / "multirun").rglob("summary.json"))) == 2


def _command(cwd: Path, *overrides: str) -> subprocess.Popen[str]:
    """Start ``fl-app run`` on the simulation, with its run in ``cwd/run``."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "fl_app", "run", *TINY, SIMULATION, *overrides),
            "hydra.run.dir=run",
        ],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for_a_round(process: subprocess.Popen[str], run_dir: Path) -> None:
    path = run_dir / "rounds.jsonl"
    while process.poll() is None and not (path.exists() and path.stat().st_size):
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()


def _wait_until_gone(marker: str) -> None:
    deadline = time.monotonic() + 20
    while processes_of(marker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(marker) == {}
