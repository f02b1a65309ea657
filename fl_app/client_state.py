"""What a client remembers from one round to the next, in stores of our own.

Not in Flower's ``Context.state``: a simulation keeps that under random node ids, and a SuperNode
loses it when it restarts. A state is a tree (`fl_app.storage`) and is keyed by client id and
round, so that a run resumed at round r sees what its clients remembered then.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias
from urllib.parse import quote

from fl_app.storage import read_tree, write_tree
from fl_app.types import ClientId

ClientState: TypeAlias = Mapping[str, Any]
"""What one client remembers: a tree of tensors and plain values."""


class ClientStateStore(Protocol):
    """Keeps the states of clients."""

    def of_run(self, run: str) -> ClientStateStore:
        """Return the part of the store that belongs to a run of that name."""
        ...

    def get(self, client: ClientId, *, before_round: int) -> ClientState | None:
        """Return what ``client`` remembered last before that round, or None."""
        ...

    def put(self, client: ClientId, state: ClientState, *, round: int) -> None:
        """Keep what ``client`` remembers after that round."""
        ...


class MemoryClientState:
    """States in memory, the latest of each client: for ``engine=local``.

    Holds nothing for clients that never had a state; `snapshot` goes into the run's checkpoints.
    """

    def __init__(self) -> None:
        self._latest: dict[ClientId, tuple[int, ClientState]] = {}

    def of_run(self, run: str) -> MemoryClientState:
        """Return itself: its engine empties it for each run."""
        return self

    def get(self, client: ClientId, *, before_round: int) -> ClientState | None:
        """Return the latest state if it is of an earlier round, or None."""
        round_and_state = self._latest.get(client)
        if round_and_state is None or round_and_state[0] >= before_round:
            return None
        return round_and_state[1]

    def put(self, client: ClientId, state: ClientState, *, round: int) -> None:
        """Replace the client's state."""
        self._latest[client] = (round, state)

    def of(self, client: ClientId) -> dict[str, Any]:
        """Return the snapshot of one client alone."""
        return {client: self._latest[client]} if client in self._latest else {}

    def merge(self, snapshot: Mapping[str, Any]) -> None:
        """Replace the states of the clients in a snapshot, and no others."""
        self._latest |= {client: (entry[0], entry[1]) for client, entry in snapshot.items()}

    def snapshot(self) -> dict[str, Any]:
        """Return all states as one tree."""
        return dict(self._latest)

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Replace all states by those of a snapshot."""
        self._latest = {client: (entry[0], entry[1]) for client, entry in snapshot.items()}


class DiskClientState:
    """States on disk, one file a client and round: for clients that must outlive their process.

    Args:
        folder: Where the files lie; made when the first state is kept.
        keep: Rounds kept for each client, >= 1; as many as a resume may go back.
    """

    def __init__(self, folder: Path, *, keep: int = 20) -> None:
        self._folder = folder
        self._keep = keep

    def of_run(self, run: str) -> DiskClientState:
        """Return a store in a folder of the run's own."""
        return DiskClientState(self._folder / _file_name(run), keep=self._keep) if run else self

    def get(self, client: ClientId, *, before_round: int) -> ClientState | None:
        """Return the state of the latest round before ``before_round``, or None.

        Raises:
            CorruptFileError: That file is damaged; an older one would silently be another state.
        """
        earlier = [round for round in self._rounds(client) if round < before_round]
        if not earlier:
            return None
        state: ClientState = read_tree(self._path(client, max(earlier)))
        return state

    def put(self, client: ClientId, state: ClientState, *, round: int) -> None:
        """Write the state, synced to disk, and drop the oldest beyond ``keep``.

        Files of this round or later are those of a run that was killed and has been resumed
        further back: they are replaced or dropped, so that they cannot be taken for newer.
        """
        self._folder_of(client).mkdir(parents=True, exist_ok=True)
        write_tree(self._path(client, round), dict(state))
        rounds = self._rounds(client)
        stale = [r for r in rounds if r > round]
        for old in stale + [r for r in rounds if r <= round][: -self._keep]:
            self._path(client, old).unlink(missing_ok=True)

    def _folder_of(self, client: ClientId) -> Path:
        return self._folder / _file_name(client)

    def _path(self, client: ClientId, round: int) -> Path:
        return self._folder_of(client) / f"round_{round:06d}.safetensors"

    def _rounds(self, client: ClientId) -> list[int]:
        names = (path.name for path in self._folder_of(client).glob("round_*.safetensors"))
        matches = (re.fullmatch(r"round_(\d+)\.safetensors", name) for name in names)
        return sorted(int(match[1]) for match in matches if match)


def _file_name(name: str) -> str:
    """Return a name as that of one file: a site's name must not be able to leave the folder."""
    return quote(name, safe="").replace(".", "%2E")


def forget_runs(folder: Path, *, keep: int) -> None:
    """Delete the states of all runs but those used last.

    Args:
        folder: Of a `DiskClientState`.
        keep: How many runs are kept.
    """
    if not folder.is_dir():
        return
    runs = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for run in runs[: max(0, len(runs) - keep)]:
        shutil.rmtree(run, ignore_errors=True)
