"""The benchmark's end of the pipes: starting contenders, giving them turns, clearing up."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turns import PIPES

BENCH = Path(__file__).resolve().parent
PATIENCE_S = 300.0
"""Seconds after which a contender that says nothing counts as hanging."""


class ContenderError(RuntimeError):
    """A contender ended or hung; the message ends with the last lines it printed."""


def environment(*, threads: int | None = 1, **extra: str) -> dict[str, str]:
    """Return the environment of a contender: no telemetry, our modules, memory as glibc has it.

    Args:
        threads: Torch's intra-op threads, or None to leave them to the contender.
        **extra: Further variables, which win.
    """
    paths = [str(BENCH), str(BENCH.parents[1]), os.environ.get("PYTHONPATH", "")]
    inherited = {
        key: value
        for key, value in os.environ.items()
        if key not in ("OMP_NUM_THREADS", "LD_PRELOAD") and not key.startswith("MALLOC_")
    }
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        **({} if threads is None else {"OMP_NUM_THREADS": str(threads)}),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        **extra,
    }


@dataclass(kw_only=True)
class Contender:
    """One way to train, in a process of its own.

    Attributes:
        name: Row of the table.
        path: What a round goes through, in words.
        command: Arguments of the Python interpreter.
        folder: Folder of its own; its working directory, ``FLWR_HOME`` and log are there.
        python: The interpreter.
        threads: Torch's intra-op threads, or None to leave them to it.
        variables: Further variables of its environment.
        training: What ``training`` must be in its summary; "" for any, None if it writes none.
        frozen_between_turns: Stop the process while others play: Flower's runtime keeps polling
            for messages of 1,000 nodes ten times a second, which others would pay for.
        rounds_s: Seconds of each round so far, warm-up included.
        cohorts: Clients of each round so far, if it tells.
        memory_mib: Resident memory of it and its processes, by the round after which it was read.
        versions: Of its packages, if it tells.
        start_up_s: Seconds from its start until it was ready for its first turn.
    """

    name: str
    path: str
    command: Sequence[str]
    folder: Path
    frozen_between_turns: bool = False
    python: str = sys.executable
    threads: int | None = 1
    variables: Mapping[str, str] = field(default_factory=dict)
    training: str | None = None
    rounds_s: list[float] = field(default_factory=list)
    cohorts: list[list[str]] = field(default_factory=list)
    memory_mib: dict[int, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    start_up_s: float = 0.0
    _process: subprocess.Popen[bytes] | None = None
    _turn_pipe: int = -1
    _told_pipe: int = -1
    _told: bytes = b""
    _family: set[int] = field(default_factory=set)

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start the process, and wait until it is ready for its first turn."""
        began = time.perf_counter()
        (self.folder / "flwr").mkdir(parents=True)
        reading, self._turn_pipe = os.pipe()
        self._told_pipe, writing = os.pipe()
        with (self.folder / "log.txt").open("wb") as log:
            self._process = subprocess.Popen(
                [self.python, *self.command],
                cwd=self.folder,
                env=environment(
                    threads=self.threads,
                    **{
                        PIPES: f"{reading},{writing}",
                        "FLWR_HOME": str(self.folder / "flwr"),
                        **self.variables,
                    },
                ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(reading, writing),
            )
        os.close(reading)
        os.close(writing)
        self.versions = self._hear().get("versions", {})
        self.start_up_s = time.perf_counter() - began
        self._freeze()

    def play(self, *, clients: int | None = None, steps: int | None = None) -> dict[str, Any]:
        """Have it play one round; return what it told.

        Args:
            clients: How many clients must have trained, if it tells; None for any number.
            steps: How many steps they must have taken together, if it tells; None for any number.
        """
        if self.frozen_between_turns:
            os.kill(self.pid, signal.SIGCONT)
        os.write(self._turn_pipe, b"\n")
        told = self._hear()
        self._freeze()
        for what, wanted in (("clients", clients), ("steps", steps)):
            if wanted is not None and told.get(what, wanted) != wanted:
                raise ContenderError(f"{self.name}: {told[what]} {what} instead of {wanted}.")
        if told.get("moved") == 0.0:
            raise ContenderError(f"{self.name}: the round left the model as it was.")
        self.rounds_s.append(told["seconds"])
        self.cohorts.append(told.get("cohort", []))
        return told

    def read_memory(self) -> None:
        """Note how much memory it has now, if the system tells."""
        family = [self.pid, *descendants(self.pid)]
        self.memory_mib[len(self.rounds_s)] = sum(memory_mib(pid) or 0.0 for pid in family)

    def told_training(self) -> str | None:
        """Return which way to train its summary names, once it has ended; None if it does not."""
        for path in self.folder.glob("outputs/*/*/summary.json"):
            found: str | None = json.loads(path.read_text()).get("training")
            return found
        return None

    def finish(self) -> int:
        """Let it end by itself, with whatever it has started; return how many had to be killed."""
        if self._process is None:
            return 0
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)
        self._family |= set(descendants(self.pid))
        os.close(self._turn_pipe)
        killed = 0
        try:
            self._process.wait(timeout=60.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            killed += 1
        os.close(self._told_pipe)
        self._process = None
        return killed + _end(self._family)

    def _freeze(self) -> None:
        self._family |= set(descendants(self.pid))
        if self.frozen_between_turns:
            os.kill(self.pid, signal.SIGSTOP)

    def _hear(self) -> dict[str, Any]:
        while b"\n" not in self._told:
            ready, _, _ = select.select([self._told_pipe], [], [], PATIENCE_S)
            part = os.read(self._told_pipe, 65536) if ready else b""
            if not part:
                log = (self.folder / "log.txt").read_text(errors="replace")
                what = "ended" if ready else f"said nothing for {PATIENCE_S:.0f} s"
                raise ContenderError(f"{self.name} {what}:\n{log[-3000:]}")
            self._told += part
        line, _, self._told = self._told.partition(b"\n")
        told: dict[str, Any] = json.loads(line)
        return told


@contextmanager
def on_stage(contenders: Sequence[Contender]) -> Iterator[None]:
    """Start contenders, one after another, and end all of them whatever happens."""
    try:
        for contender in contenders:
            contender.start()
        yield
    finally:
        for contender in contenders:
            contender.finish()


def descendants(pid: int) -> Iterator[int]:
    """Yield the processes that a process has started, and theirs (Linux; elsewhere none)."""
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield int(child)
                yield from descendants(int(child))


def memory_mib(pid: int, key: str = "VmRSS") -> float | None:
    """Return a process' resident memory in MiB (``VmHWM``: its peak), or None if not on Linux."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) / 1024
    return None


def _end(family: set[int]) -> int:
    """Kill those of a contender's processes that outlived it by ten seconds; return how many."""
    deadline = time.monotonic() + 10.0
    alive = family
    while alive and time.monotonic() < deadline:
        time.sleep(0.1)
        alive = {pid for pid in alive if _is_alive(pid)}
    for pid in alive:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(alive)


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
