"""What a round costs at the guard: ``python tests/bench/ledger_round.py [--rounds N]``.

A cohort of 100 simulated clients, each with a sample rate of its own, is admitted by a guard with
a limit: counted, written, synced, and every epsilon reported. The first round also solves how
many rounds each client may take part in. Much of it is the disk's sync, printed beside it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from fl_app.privacy.accounting import GaussianEvent
from fl_app.privacy.base import Budget, Request
from fl_app.privacy.guard import LedgerGuard
from fl_app.privacy.ledger import LEDGER_NAME, Ledger
from fl_app.privacy.policy import Terms
from fl_app.types import PrivacyUnit

COHORT, BATCH = 100, 32


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="fl-app-bench-") as scratch:
        folder = Path(scratch)
        guard = LedgerGuard(
            ledger=Ledger(folder / LEDGER_NAME),
            terms=Terms(data_set="bench", delta=1e-5, epsilon=50.0, unit=PrivacyUnit.RECORD),
        )
        seconds = [_admit(guard, round) for round in range(1, options.rounds + 2)]
        syncs = [_sync(folder) for _ in range(options.rounds)]
    first, *rest = (1000 * value for value in seconds)
    rest.sort()
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"first round, with {COHORT} limits solved: {first:.0f} ms")
    print(f"later rounds: median {statistics.median(rest):.1f} ms, p90 {_p90(rest):.1f} ms")
    print(f"of which one sync of as many bytes: median {1000 * statistics.median(syncs):.1f} ms")


def _admit(guard: LedgerGuard, round: int) -> float:
    requests = [
        Request(
            client=str(client),
            run="bench",
            round=round,
            unit=PrivacyUnit.RECORD,
            event=GaussianEvent(
                noise_multiplier=1.0, sample_rate=BATCH / (4000 + client), count=125
            ),
            delta=1e-5,
            num_examples=4000 + client,
        )
        for client in range(COHORT)
    ]
    began = time.perf_counter()
    verdicts = guard.admit(requests)
    seconds = time.perf_counter() - began
    if not all(isinstance(verdict, Budget) for verdict in verdicts):
        raise SystemExit("a client declined: take fewer rounds")
    return seconds


def _sync(folder: Path) -> float:
    began = time.perf_counter()
    with (folder / "sync").open("ab") as file:
        file.write(b"x" * 300 * COHORT)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - began


def _p90(values: list[float]) -> float:
    return values[int(0.9 * len(values))]


if __name__ == "__main__":
    main()
