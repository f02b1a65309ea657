"""Checkpoints: the newest readable one counts, and brings back the randomness of the process."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from fl_app.checkpoint import Checkpoints


def saved(folder: Path, *rounds: int, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep=keep)
    for round in rounds:
        checkpoints.save(round, {"round": round, "w": torch.full((2,), float(round))})
    return checkpoints


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_without_a_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "never made").load_latest() is None


def test_the_newest_counts(tmp_path: Path) -> None:
    saved(tmp_path / "checkpoints", 5, 10)
    content = Checkpoints(tmp_path / "checkpoints").load_latest()
    assert content["round"] == 10
    assert content["w"].tolist() == [10.0, 10.0]


def test_the_newest_is_the_highest_round_also_beyond_six_digits(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 999_999, 1_000_000)
    assert checkpoints.load_latest()["round"] == 1_000_000


@pytest.mark.parametrize(("keep", "kept"), [(2, 2), (3, 3), (1, 2), (0, 2)])
def test_as_many_are_kept_as_asked_but_never_fewer_than_two(tmp_path, keep, kept) -> None:
    saved(tmp_path, 1, 2, 3, 4, 5, keep=keep)
    assert files(tmp_path) == [f"round_{r:06d}.safetensors" for r in range(6 - kept, 6)]


def test_saving_a_round_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    checkpoints.save(2, {"round": 2, "again": True})
    assert checkpoints.load_latest()["again"] is True


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_a_damaged_newest_is_named_in_the_log_and_the_one_before_used(
    tmp_path, caplog, cut
) -> None:
    checkpoints = saved(tmp_path, 5, 10)
    newest = tmp_path / "round_000010.safetensors"
    newest.write_bytes(newest.read_bytes()[:cut])
    with caplog.at_level(logging.WARNING):
        assert checkpoints.load_latest()["round"] == 5
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "round 10 is damaged" in record.getMessage()
    assert "round_000010.safetensors" in record.getMessage()


def test_if_all_are_damaged_there_is_none(tmp_path, caplog) -> None:
    checkpoints = saved(tmp_path, 5, 10)
    for path in tmp_path.iterdir():
        damage(path)
    assert checkpoints.load_latest() is None
    assert len(caplog.records) == 2


def test_a_half_written_draft_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 5)
    (tmp_path / ".round_000010.safetensors.123.tmp").write_bytes(b"half")
    (tmp_path / "round_1.safetensors").write_bytes(b"not ours")
    assert checkpoints.load_latest()["round"] == 5


def test_damaged_ones_that_a_resumed_run_has_passed_are_set_aside(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 5, 10)
    damage(tmp_path / "round_000010.safetensors")
    checkpoints.set_aside_after(checkpoints.load_latest()["round"])
    damaged = "round_000010.safetensors.damaged"
    assert files(tmp_path) == ["round_000005.safetensors", damaged]
    assert checkpoints.load_latest()["round"] == 5


def draws() -> tuple[list[float], list[float], list[float], list[float]]:
    return (
        [random.random() for _ in range(3)],
        np.random.rand(3).tolist(),
        # An odd number of normal draws leaves one in store, in Python's and NumPy's generators.
        [random.gauss(0, 1), float(np.random.randn())],
        torch.rand(3).tolist(),
    )


def test_the_generators_of_the_process_go_on_where_they_were(tmp_path: Path) -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    draws()
    checkpoints = saved(tmp_path, 1)
    expected = draws()
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    assert draws() != expected
    checkpoints.load_latest()
    assert draws() == expected


def test_saving_draws_nothing(tmp_path: Path) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    saved(tmp_path, 1)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert before == after


def test_a_damaged_checkpoint_sets_no_generator(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    damage(tmp_path / "round_000001.safetensors")
    before = random.getstate()
    random.random()
    moved = random.getstate()
    assert checkpoints.load_latest() is None
    assert random.getstate() == moved != before


def test_what_was_saved_is_not_touched(tmp_path: Path) -> None:
    content = {"w": torch.ones(1)}
    Checkpoints(tmp_path).save(1, content)
    assert list(content) == ["w"]
