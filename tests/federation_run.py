"""``fl-app run`` on a federation of `federation_process`, and what everybody says came of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federation_process import Federation, Site
from helpers import environment, fl_app, rounds_of, summary_of

PATIENCE_S = 180.0


@dataclass(kw_only=True)
class Played:
    """What came of a run."""

    code: int
    said: str
    status: str
    here: Path
    there: Path

    @property
    def rounds(self) -> list[dict[str, Any]]:
        return rounds_of(self.there)

    def replied(self, client: str) -> set[int]:
        """Return the rounds in which a client's update came."""
        return {entry["round"] for entry in self.rounds if came(entry, client)}

    def completed(self) -> dict[str, Any]:
        """Return the summary of a run that everybody says was completed."""
        assert self.code == 0, self.said
        assert self.status == "finished:completed"
        assert (self.here / "summary.json").read_text() == (self.there / "summary.json").read_text()
        assert rounds_of(self.here) == self.rounds
        return summary_of(self.here)


def came(entry: dict[str, Any], client: str) -> bool:
    return client in entry["cohort"] and client not in {f["client"] for f in entry["failures"]}


class Playing:
    """``fl-app run`` on a federation, in the background."""

    def __init__(self, parties: Federation, cwd: Path, *arguments: str) -> None:
        self.parties, self.here = parties, cwd / "run"
        self._known = {run["run-id"] for run in parties.runs()}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fl_app", "run", "--json", *arguments],
            cwd=cwd,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def there(self) -> Path:
        """The run's folder where the ServerApp is."""
        return (
            self.parties.serverapp.folder
            / json.loads((self.here / ".deployed").read_text())["run_dir"]
        )

    def wait_for_round(self, number: int) -> None:
        """Wait until a round has been played."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.has(number):
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline, self.parties.serverapp.log
            time.sleep(0.05)

    def has(self, number: int) -> bool:
        """Return whether a round has been played."""
        path = (self.here / ".deployed").exists() and self.there / "rounds.jsonl"
        return bool(path and path.exists() and path.read_text().count("\n") >= number)

    def wait_for_charge(self, site: Site, number: int) -> None:
        """Wait until a site has begun to train in a round: charged, and no more than that."""
        deadline = time.monotonic() + PATIENCE_S
        while number not in charged(site, self.there):
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline, site.worker.log
            time.sleep(0.01)

    def end(self) -> Played:
        """Wait for the end, and look at all that says what came of it."""
        _, said = self.process.communicate(timeout=PATIENCE_S * 2)
        new = [run for run in self.parties.runs() if run["run-id"] not in self._known]
        status = new[0]["status"] if new else "not taken"
        return Played(
            code=self.process.returncode,
            said=said,
            status=status,
            here=self.here,
            there=self.there,
        )


def charged(site: Site, run_dir: Path) -> set[int]:
    """Return the rounds of a run that a site's ledger holds."""
    if not (site.ledger.exists() and (run_dir / ".run").exists()):
        return set()
    name = (run_dir / ".run").read_text()
    lines = site.ledger.read_text().splitlines(keepends=True)
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return {entry["round"] for entry in entries if entry.get("run") == name}


def ledgers_hold_what_was_trained(parties: Federation, played: Played) -> None:
    for site in parties.sites.values():
        assert played.replied(site.client) <= charged(site, played.there)
        if site.ledger.exists():
            verified = fl_app("ledger", "verify", str(site.ledger), cwd=site.folder)
            assert verified.returncode == 0, verified.stdout + verified.stderr
