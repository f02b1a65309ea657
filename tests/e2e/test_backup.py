"""What a lost server machine costs, with the backup that DEPLOYMENT.md says to make."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest
from federation_process import federation
from federation_run import Playing, ledgers_hold_what_was_trained

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

RUN = (
    "experiment=federation",
    "privacy=record",
    "privacy.target_epsilon=null",
    "privacy.noise_multiplier=1.0",
    "task/model=logistic",
    "selection.min_clients=2",
    "partition.num_clients=2",
    "client.batch_size=16",
    "fairness_clients=0",
    "checkpoint_every=1",
)


def test_a_lost_server_is_restored_and_the_run_resumed(tmp_path: Path) -> None:
    with federation(tmp_path, sites=2, unit="record") as parties:
        first = Playing(parties, tmp_path, *RUN, "rounds=6", *parties.engine, "hydra.run.dir=run")
        first.wait_for_round(2)
        # While the run goes on: the SuperLink's state, and the folders of runs.
        state, backup = parties.superlink.folder / "state.db", tmp_path / "backup"
        backup.mkdir()
        with sqlite3.connect(state) as live, sqlite3.connect(backup / "state.db") as copy:
            live.backup(copy)
        shutil.copytree(parties.outputs, backup / "outputs")
        first.wait_for_round(3)

        for party in (parties.serverapp, parties.superlink):
            party.kill()
        for lost in parties.superlink.folder.glob("state.db*"):
            lost.unlink()
        shutil.rmtree(parties.outputs)
        first.process.kill()
        first.process.communicate()

        shutil.copy(backup / "state.db", state)
        shutil.copytree(backup / "outputs", parties.outputs)
        parties.superlink.start()
        parties.healthy()
        parties.serverapp.start()
        for site in parties.sites.values():  # known by their keys, without being registered again
            if not site.supernode.running:
                site.supernode.come_back()
        engine = [option for option in parties.engine if not option.startswith("engine=")]
        resumed = Playing(parties, tmp_path, f"resume={first.here}", *engine)
        played = resumed.end()
        summary = played.completed()
        assert (summary["rounds"], summary["failures"]["clients"]) == (6, 0)
        assert summary["resumed_from_round"] == 2
        assert [entry["round"] for entry in played.rounds] == list(range(1, 7))
        ledgers_hold_what_was_trained(parties, played)
