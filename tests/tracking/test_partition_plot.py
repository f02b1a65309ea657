"""What clients tell of their records, and the plot of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import TINY, play, play_config, summary_of

from fl_app.components import build
from fl_app.config import compose_config, resumed_config, to_json
from fl_app.tracking.partition_plot import (
    Partition,
    partition_chart,
    partition_png,
    read_partition,
    write_partition,
)
from fl_app.tracking.report import write_report
from fl_app.types import ClientDescription


def told(*label_counts: tuple[int, ...] | None, size: int = 5) -> Partition:
    return Partition(
        population=len(label_counts),
        described=tuple(
            ClientDescription(
                client=f"clinic-{number}",
                num_examples=size if counts is None else sum(counts),
                label_counts=counts,
            )
            for number, counts in enumerate(label_counts)
        ),
    )


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_records_what_its_clients_are_willing_to_tell(
    share: bool, workers: int, tmp_path: Path
) -> None:
    overrides = (f"client.share_label_counts={str(share).lower()}", f"engine.workers={workers}")
    run_dir = play(tmp_path / "run", *overrides, "rounds=1")
    partition = read_partition(run_dir)
    assert partition is not None
    assert partition.population == 6
    data = build(to_json(compose_config([*TINY, *overrides]))).data
    assert [c.client for c in partition.described] == list(data.clients)
    for client in partition.described:
        targets = data.examples_of(client.client).train.targets
        assert client.num_examples == len(targets)
        counts = tuple(torch.bincount(targets).tolist()) if share else None
        assert client.label_counts == counts
    page = (run_dir / "report.html").read_text()
    assert page.count("Who owns what") == 1
    assert ("label 9" in page) == share
    assert ("none of which tells its labels" in page) == (not share)


def test_a_resumed_run_does_not_ask_again_and_whether_it_asks_changes_no_bit(
    tmp_path: Path,
) -> None:
    run_dir = play(tmp_path / "run", "rounds=2")
    marked = {"population": 6, "clients": {}}
    (run_dir / "partition.json").write_text(json.dumps(marked))
    play_config(resumed_config(str(run_dir), ["rounds=3"]))
    assert json.loads((run_dir / "partition.json").read_text()) == marked
    silent = play(tmp_path / "silent", "rounds=3", "fairness_clients=0")
    assert not (silent / "partition.json").exists()
    assert "Who owns what" not in (silent / "report.html").read_text()
    assert summary_of(silent)["model_hash"] == summary_of(run_dir)["model_hash"]


def test_of_many_clients_a_hundred_are_asked(tmp_path: Path) -> None:
    run_dir = play(tmp_path / "run", "partition.num_clients=140", "selection.count=2", "rounds=1")
    partition = read_partition(run_dir)
    assert partition is not None
    assert (partition.population, len(partition.described)) == (140, 100)
    again = play(tmp_path / "again", "partition.num_clients=140", "selection.count=2", "rounds=1")
    assert read_partition(again) == partition


def test_the_bars_are_as_high_as_the_counts() -> None:
    from fl_app.tracking.partition_plot import _layers

    partition = told((3, 0, 2), None, (0, 4))
    layers = {name: counts for name, _, counts in _layers(partition.described)}
    assert layers == {
        "label 0": [3, 0, 0],
        "label 1": [0, 0, 4],
        "label 2": [2, 0, 0],
        "labels not told": [0, 5, 0],
    }


def test_of_many_labels_the_frequent_ones_are_told_apart() -> None:
    from fl_app.tracking.partition_plot import _layers

    counts = tuple(range(1, 31))
    layers = {name: column for name, _, column in _layers(told(counts).described)}
    assert list(layers) == [*(f"label {label}" for label in range(21, 30)), "other labels"]
    assert sum(column[0] for column in layers.values()) == sum(counts)


def test_the_plot_names_no_client(tmp_path: Path) -> None:
    partition = told((3, 1), None, (1, 4))
    write_partition(partition, tmp_path)
    assert read_partition(tmp_path) == partition
    chart = partition_chart(tmp_path)
    assert chart is not None
    assert "clinic" not in chart.svg + chart.caption
    assert "by label, which 1 of them do not tell" in chart.caption
    assert [label for label, _ in chart.legend] == ["label 0", "label 1", "labels not told"]
    assert partition_png(partition).startswith(b"\x89PNG")


def test_the_plot_of_a_hundred_clients_stays_small(tmp_path: Path) -> None:
    write_partition(told(*[tuple(range(10))] * 100), tmp_path)
    chart = partition_chart(tmp_path)
    assert chart is not None
    assert len(chart.svg) < 400_000


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"population": 1, "clients": {"a": 3}}'])
def test_a_broken_file_costs_the_plot_alone(content: str, tmp_path: Path) -> None:
    (tmp_path / "partition.json").write_text(content)
    (tmp_path / "rounds.jsonl").touch()
    assert partition_chart(tmp_path) is None
    assert "Who owns what" not in write_report(tmp_path).read_text()
