"""How long the same tiny experiment takes to start, and a round of it, on each way to run it.

    python tests/bench/startup.py [--repeats 3] [--rounds 10]

`flwr run` is timed with a SuperLink that is up already, as from a user's second run on, and with
one that it has to start. The ways take turns, so that a busy moment hits none of them alone; the
table shows medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from contenders import environment

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flower_process import Flower, flower  # noqa: E402 - needs the path above

CLIENTS = 10
POLL_S = 0.02
PATIENCE_S = 300.0


@dataclass(kw_only=True)
class Way:
    """A way to run the experiment.

    Attributes:
        name: Row of the table.
        play: Plays it, once, in a folder of its own.
        first_round_s: From the command to the line of the first round, of each repeat.
        round_s: Median seconds of the rounds after the first, of each repeat.
        end_s: From the command to its end, of each repeat.
    """

    name: str
    play: Callable[[Path, list[str]], None]
    first_round_s: list[float] = field(default_factory=list)
    round_s: list[float] = field(default_factory=list)
    end_s: list[float] = field(default_factory=list)

    def measure(self, folder: Path, overrides: list[str]) -> None:
        """Play once and add what it took."""
        folder.mkdir(parents=True)
        began = time.time()
        self.play(folder, overrides)
        ended = time.time()
        (record,) = folder.rglob("rounds.jsonl")
        seconds = [json.loads(line)["seconds"] for line in record.read_text().splitlines()]
        first = (folder / "first_round").stat().st_mtime
        self.first_round_s.append(first - began)
        self.round_s.append(statistics.median(seconds[1:]))
        self.end_s.append(ended - began)


def await_first_round(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Leave a file `first_round` in a folder once the run below has recorded its first."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if any(path.stat().st_size for path in folder.rglob("rounds.jsonl")):
            (folder / "first_round").touch()
            break
        if process.poll() not in (None, 0):
            break
        time.sleep(POLL_S)
    assert process.wait() == 0, (folder / "log.txt").read_text()[-3000:]


def with_fl_app(*arguments: str) -> Callable[[Path, list[str]], None]:
    """Return what plays ``fl-app run`` with these arguments."""

    def play(folder: Path, overrides: list[str]) -> None:
        command = [sys.executable, "-m", "fl_app", "run", *arguments, *overrides]
        clients = f"partition.num_clients={CLIENTS}"
        await_first_round(folder, started([*command, clients], folder, environment()))

    return play


def with_flwr_run(at_home: Flower | None, *extra: str) -> Callable[[Path, list[str]], None]:
    """Return what plays ``flwr run --stream``, on a SuperLink that runs or a new one for None.

    Args:
        at_home: Where the SuperLink runs.
        extra: Overrides of this way alone.
    """

    def play(folder: Path, overrides: list[str]) -> None:
        if at_home is None:
            with flower(folder) as fresh:
                submit(fresh, folder, overrides)
        else:
            submit(at_home, folder, overrides)

    def submit(flwr: Flower, folder: Path, overrides: list[str]) -> None:
        # The SuperLink keeps the working directory it was started with; this names the folder.
        given = " ".join([*overrides, *extra, f"output_url={folder}"])
        command = [
            *("flwr", "run", str(Path(__file__).resolve().parents[2]), "--stream"),
            *("--run-config", f"overrides={json.dumps(given)}"),
            *("--federation-config", f"num-supernodes={CLIENTS} client-resources-num-cpus=1"),
        ]
        await_first_round(folder, started(command, folder, dict(flwr.variables)))

    return play


def started(command: list[str], folder: Path, variables: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a command whose output goes into a file."""
    with (folder / "log.txt").open("wb") as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def table(ways: list[Way]) -> str:
    """Return the medians as a table in Markdown."""
    rows = [
        "| the same run | first round after | a round | end after |",
        "|---|---|---|---|",
    ]
    for way in ways:
        first, a_round, end = (
            statistics.median(values) for values in (way.first_round_s, way.round_s, way.end_s)
        )
        rows.append(f"| {way.name} | {first:.1f} s | {a_round * 1000:.0f} ms | {end:.1f} s |")
    return "\n".join(rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    overrides = [f"rounds={given.rounds}", "progress=none"]
    with tempfile.TemporaryDirectory() as name, flower(Path(name)) as at_home:
        folder = Path(name)
        ways = [
            Way(name="`fl-app run`", play=with_fl_app()),
            Way(name="`fl-app run engine=simulation`", play=with_fl_app("engine=simulation")),
            Way(name="`flwr run`, its SuperLink up already", play=with_flwr_run(at_home)),
            Way(name="the same, with `engine=local`", play=with_flwr_run(at_home, "engine=local")),
            Way(name="`flwr run`, starting its SuperLink", play=with_flwr_run(None)),
        ]
        (folder / "warm_up").mkdir()
        with_flwr_run(at_home)(folder / "warm_up", overrides)
        for repeat in range(given.repeats):
            for number, way in enumerate(ways):
                way.measure(folder / f"{repeat}_{number}", overrides)
                print(f"{way.name}: {way.end_s[-1]:.1f} s", file=sys.stderr)
    print(table(ways))


if __name__ == "__main__":
    main()
