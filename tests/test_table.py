"""A CSV file becomes records, or is refused by line and column, and never by a value."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import play, summary_of

from fl_app.tasks.partition import OneOwner
from fl_app.tasks.table import Table, read_table
from fl_app.types import ConfigError


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_every_column_but_the_targets_is_an_input_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "a,target,b\n1,0,-2.5\n3e2,1,4\n")
    examples = read_table(path, target="target")
    assert examples.inputs.tolist() == [[1.0, -2.5], [300.0, 4.0]]
    assert examples.inputs.dtype is torch.float32
    assert examples.targets.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must begin with a line of column names"),
        ("a,b\n1,2\n", "target .task.target. among them"),
        ("a,target\n", "at least one record"),
        ("a,target\n1,0\n4711-secret,1\n", "line 3: a is no finite number"),
        ("a,target\nnan,0\n", "line 2: a is no finite number"),
        ("a,target\n1,0,4711-secret\n", "line 2: 3 values for 2 columns"),
    ],
)
def test_a_file_that_is_no_table_is_refused_without_its_values(
    tmp_path: Path, text: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        read_table(written(tmp_path / "t.csv", text), target="target")
    assert "4711" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"path": None}, "task.path=null names no file"),
        ({"path": "gone.csv"}, "task.path=gone.csv cannot be read"),
        ({"inputs": 7}, "task.inputs=7, but .* has 1 columns besides target"),
        ({"classes": 2}, "task.classes=2, but column target of .* holds other numbers"),
    ],
)
def test_what_does_not_fit_the_file_is_named(
    tmp_path: Path, keys: dict[str, object], words: str
) -> None:
    path = written(tmp_path / "t.csv", "a,target\n1,0\n2,1\n3,2\n")
    with pytest.raises(ConfigError, match=words):
        Table(**{"path": path, "inputs": 1, "classes": 3, "test_fraction": 0.0, **keys}).load()  # type: ignore[arg-type]


def test_one_owner_owns_all_records(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "a,target\n" + "".join(f"{n},{n % 2}\n" for n in range(20)))
    task = Table(path=path, inputs=1, test_fraction=0.0)
    data = OneOwner(client="ward-7", test_fraction=0.25)(task, 1)
    assert data.clients == ("ward-7",)
    own = data.examples_of("ward-7")
    assert (len(own.train), own.test is not None and len(own.test)) == (15, 5)
    assert data.held_out is None


def test_a_table_is_a_task_like_any_other(tmp_path: Path) -> None:
    rows = "".join(f"{n % 5},{(n * 3) % 7},{n % 2}\n" for n in range(80))
    path = written(tmp_path / "t.csv", f"a,b,target\n{rows}")
    overrides = ("task=table", f"task.path={path}", "task.inputs=2", "task.hidden=4")
    run = play(tmp_path / "run", *overrides, "partition.num_clients=3", "rounds=1", tiny=False)
    assert summary_of(run)["task"] == "table"
