"""What clients remember: the same in memory and on disk, by round, and in a folder of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fl_app.client_state import ClientStateStore, DiskClientState, MemoryClientState
from fl_app.storage import CorruptFileError

HOSTILE = ["../../x", "..", ".", "", "a/b", "/etc/passwd", "a\\b", "a\0b", "~", "%2E%2E"]
HOSTILE += ["C:", "ü ✓", "round_000001.safetensors", "con", "x" * 80]


def state(value: float) -> dict[str, Any]:
    return {"optimizer": {"state": {0: {"momentum_buffer": torch.tensor([value])}}, "n": value}}


def value_of(remembered: Any) -> float | None:
    return None if remembered is None else remembered["optimizer"]["n"]


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ClientStateStore:
    return MemoryClientState() if request.param == "memory" else DiskClientState(tmp_path)


def test_a_client_remembers_nothing_at_first(store) -> None:
    assert store.get("a", before_round=1) is None


def test_a_state_is_seen_in_later_rounds_only(store) -> None:
    store.put("a", state(1.5), round=3)
    assert store.get("a", before_round=3) is None
    assert store.get("a", before_round=2) is None
    assert value_of(store.get("a", before_round=4)) == 1.5
    assert value_of(store.get("a", before_round=100)) == 1.5


def test_clients_do_not_see_each_other(store) -> None:
    store.put("a", state(1.0), round=1)
    store.put("A", state(2.0), round=1)
    store.put("a.b", state(3.0), round=1)
    assert value_of(store.get("a", before_round=2)) == 1.0
    assert value_of(store.get("A", before_round=2)) == 2.0
    assert value_of(store.get("a.b", before_round=2)) == 3.0
    assert store.get("b", before_round=2) is None


def test_the_latest_of_several_rounds_counts(store) -> None:
    for round in (1, 2, 9, 10):
        store.put("a", state(float(round)), round=round)
    assert value_of(store.get("a", before_round=11)) == 10.0


STEPS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.booleans()), max_size=25)


@given(STEPS)
def test_memory_and_disk_give_the_same_answers_round_after_round(tmp_path_factory, steps) -> None:
    """As a run asks: rounds never go back, and a client reads its state before it writes it."""
    memory, disk = MemoryClientState(), DiskClientState(tmp_path_factory.mktemp("states"))
    round, written = 1, set()
    for number, (client, pause, write) in enumerate(steps):
        round += pause
        if (client, round) not in written:
            answers = [value_of(s.get(client, before_round=round)) for s in (memory, disk)]
            assert answers[0] == answers[1]
        if write:
            written.add((client, round))
            for s in (memory, disk):
                s.put(client, state(float(number)), round=round)


# In memory ----------------------------------------------------------------------------------------


def test_a_snapshot_restores_all_states_and_drops_the_others() -> None:
    store, other = MemoryClientState(), MemoryClientState()
    store.put("a", state(1.0), round=1)
    other.put("b", state(2.0), round=1)
    other.restore(store.snapshot())
    assert value_of(other.get("a", before_round=2)) == 1.0
    assert other.get("b", before_round=2) is None


def test_merging_replaces_the_clients_of_a_snapshot_alone() -> None:
    store, other = MemoryClientState(), MemoryClientState()
    store.put("a", state(1.0), round=1)
    store.put("b", state(2.0), round=1)
    other.put("b", state(3.0), round=2)
    store.merge(other.of("b"))
    store.merge(other.of("unknown"))
    assert value_of(store.get("a", before_round=9)) == 1.0
    assert store.get("b", before_round=2) is None
    assert value_of(store.get("b", before_round=3)) == 3.0


def test_a_snapshot_does_not_follow_later_states() -> None:
    store = MemoryClientState()
    store.put("a", state(1.0), round=1)
    snapshot = store.snapshot()
    store.put("a", state(2.0), round=2)
    store.restore(snapshot)
    assert value_of(store.get("a", before_round=9)) == 1.0


# On disk ------------------------------------------------------------------------------------------


def test_a_state_outlives_its_process(tmp_path: Path) -> None:
    DiskClientState(tmp_path).put("a", state(1.5), round=1)
    remembered = DiskClientState(tmp_path).get("a", before_round=2)
    assert remembered["optimizer"]["state"][0]["momentum_buffer"].tolist() == [1.5]


def test_a_resume_further_back_sees_what_was_remembered_then(tmp_path: Path) -> None:
    store = DiskClientState(tmp_path)
    for round in range(1, 7):
        store.put("a", state(float(round)), round=round)
    assert value_of(store.get("a", before_round=4)) == 3.0
    store.put("a", state(40.0), round=4)  # the resumed run's; rounds 5 and 6 never were
    assert value_of(store.get("a", before_round=9)) == 40.0
    assert value_of(store.get("a", before_round=4)) == 3.0


def test_the_oldest_rounds_beyond_keep_are_dropped(tmp_path: Path) -> None:
    store = DiskClientState(tmp_path, keep=2)
    for round in (1, 2, 3):
        store.put("a", state(float(round)), round=round)
        store.put("b", state(float(round)), round=round)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4
    assert store.get("a", before_round=2) is None
    assert value_of(store.get("a", before_round=3)) == 2.0


def test_round_numbers_sort_as_numbers_beyond_six_digits(tmp_path: Path) -> None:
    store = DiskClientState(tmp_path)
    for round in (999_999, 1_000_000):
        store.put("a", state(float(round)), round=round)
    assert value_of(store.get("a", before_round=10**7)) == 1e6


def test_a_damaged_state_is_an_error_not_an_older_state(tmp_path: Path) -> None:
    store = DiskClientState(tmp_path)
    store.put("a", state(1.0), round=1)
    store.put("a", state(2.0), round=2)
    newest = max(tmp_path.rglob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.raises(CorruptFileError, match="round_000002"):
        store.get("a", before_round=3)
    assert value_of(store.get("a", before_round=2)) == 1.0


def test_files_of_others_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    store = DiskClientState(tmp_path, keep=1)
    store.put("a", state(1.0), round=1)
    foreign = [tmp_path / "a" / name for name in ("round_x.safetensors", "notes.txt")]
    for path in foreign:
        path.write_text("mine")
    store.put("a", state(2.0), round=2)
    assert value_of(store.get("a", before_round=3)) == 2.0
    assert all(path.read_text() == "mine" for path in foreign)


@pytest.mark.parametrize("client", HOSTILE, ids=ascii)
def test_no_name_of_a_client_leaves_the_folder(tmp_path: Path, client) -> None:
    folder = tmp_path / "inner" / "states"
    store = DiskClientState(folder)
    store.put(client, state(1.0), round=1)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 1
    assert written[0].resolve().is_relative_to(folder.resolve())
    assert value_of(store.get(client, before_round=2)) == 1.0


def test_no_two_names_share_a_place(tmp_path: Path) -> None:
    store = DiskClientState(tmp_path)
    names = [*HOSTILE, "a", "b", "a%2Fb", "%", "%25", "x", "2E"]
    for number, client in enumerate(names):
        store.put(client, state(float(number)), round=1)
    for number, client in enumerate(names):
        assert value_of(store.get(client, before_round=2)) == number


def test_runs_that_share_a_folder_do_not_see_each_others_states(tmp_path: Path) -> None:
    store = DiskClientState(tmp_path)
    store.of_run("first").put("a", {"x": 1}, round=1)
    assert store.of_run("second").get("a", before_round=9) is None
    assert store.of_run("first").get("a", before_round=9) == {"x": 1}
    store.of_run("../../out").put("a", {"x": 1}, round=1)
    assert all(path.is_relative_to(tmp_path) for path in tmp_path.rglob("*"))
    assert not (tmp_path.parent / "out").exists()
