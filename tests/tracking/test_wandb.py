"""What W&B is told, read back from the file it writes, and what its failures cost: nothing."""

from __future__ import annotations

import hashlib
import json
import logging
import socket
import struct
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import wandb
from helpers import TINY, play, play_config, summary_of
from wandb.proto import wandb_internal_pb2 as proto

from fl_app.cli import _main
from fl_app.components import make_tracker
from fl_app.config import compose_config, resumed_config
from fl_app.tracking.partition_plot import read_partition
from fl_app.tracking.rounds_file import read_rounds
from fl_app.tracking.wandb_tracker import WandbTracker
from fl_app.types import ConfigError

OFFLINE = ("tracking=wandb", "tracking.mode=offline")
FAILING = ("client.failure_fraction=0.3", "selection.fraction=0.5")


@pytest.fixture(autouse=True)
def nobody_is_logged_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Generator[None, None, None]:
    """Hide this machine's key and settings from W&B, which reads them once a session."""
    wandb.teardown()
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for folder in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{folder}_DIR", str(tmp_path / "home" / folder))
    yield
    wandb.teardown()


class Segment:
    """One ``.wandb`` file: a log of protocol buffers in LevelDB's format.

    W&B reads it in Go only. A file is blocks of 32 KiB, the first of which starts with a header of
    7 bytes, and in them fragments: checksum (4 bytes), length (2), kind (1), and the bytes.
    """

    def __init__(self, path: Path) -> None:
        records = list(_records(path.read_bytes()))
        (self.run,) = [r.run for r in records if r.HasField("run")]
        self.config = {item.key: json.loads(item.value_json) for item in self.run.config.update}
        rows = [_tree(r.history.item) for r in records if r.HasField("history")]
        self.partition = [row for row in rows if "partition" in row]
        self.rows = [row for row in rows if "partition" not in row]
        self.summary: dict[str, Any] = {}
        for record in records:
            if record.HasField("summary"):
                _merge(self.summary, _tree(record.summary.update))
        self.artifacts = [r.artifact for r in records if r.HasField("artifact")]
        self.exit_codes = [r.exit.exit_code for r in records if r.HasField("exit")]


def _records(content: bytes) -> Generator[Any, None, None]:
    assert content[:4] == b":W&B"
    position, whole = 7, b""
    while len(content) - position >= 7:
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, position)
        whole += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last of several fragments
            yield proto.Record.FromString(whole)
            whole = b""


def _tree(items: Any) -> dict[str, Any]:
    """Return items as nested dicts: their key is a name, or a path of names."""
    tree: dict[str, Any] = {}
    for item in items:
        *parents, name = list(item.nested_key) or [item.key]
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = json.loads(item.value_json)
    return tree


def _merge(tree: dict[str, Any], change: dict[str, Any]) -> None:
    for name, value in change.items():
        if isinstance(value, dict) and isinstance(tree.get(name), dict):
            _merge(tree[name], value)
        else:
            tree[name] = value


def segments(run_dir: Path) -> list[Segment]:
    """Return what the offline segments of a run hold, oldest first; ends W&B's own process."""
    wandb.teardown()  # waits until all is written
    found = [Segment(path) for path in run_dir.glob("wandb/offline-run-*/run-*.wandb")]
    return sorted(found, key=lambda segment: segment.run.start_time.ToNanoseconds())


def assert_row_is_round(row: dict[str, Any], entry: dict[str, Any]) -> None:
    assert row["_step"] == entry["round"]
    for group in ("metrics", "client_metrics"):
        logged = {key: value for key, value in row.items() if key.startswith(f"{group}/")}
        assert logged == {f"{group}/{name}": value for name, value in entry[group].items()}
    for key in ("num_updates", "uplink_bytes", "downlink_bytes", "uplink_uncompressed_bytes"):
        assert row[key] == entry[key]
    assert row["seconds"] == entry["seconds"]
    assert row["applied"] == int(entry["applied"])
    assert row["cohort_size"] == len(entry["cohort"])
    for kind in ("offline", "timeout", "error", "rejected"):
        asked = [failure for failure in entry["failures"] if failure["kind"] == kind]
        assert row[f"failures/{kind}"] == len(asked)
    accuracies = entry["client_accuracy"].values()
    if not accuracies:
        assert "client_accuracy" not in row
        return
    counts, edges = row["client_accuracy"]["values"], row["client_accuracy"]["bins"]
    assert (edges[0], edges[-1]) == (0, 1)
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        inside = [a for a in accuracies if low <= a < high or a == high == 1]
        assert count == len(inside)


def participation_of(row: dict[str, Any]) -> dict[int, int]:
    """Return times asked -> clients."""
    counts, edges = row["participation"]["values"], row["participation"]["bins"]
    assert all(high - low == 1 for low, high in zip(edges[:-1], edges[1:], strict=True))
    return {round(low + 0.5): n for low, n in zip(edges[:-1], counts, strict=True) if n}


def times_asked(rounds: list[dict[str, Any]], clients: int) -> dict[int, int]:
    asked = [sum(str(client) in r["cohort"] for r in rounds) for client in range(clients)]
    return {times: asked.count(times) for times in set(asked)}


def test_config_rounds_summary_and_model_can_be_read_back(tmp_path: Path) -> None:
    run_dir = play(
        tmp_path / "run", *OFFLINE, *FAILING, "tracking.tags=[a,b]", "tracking.group=g", "rounds=5"
    )
    (segment,) = segments(run_dir)
    rounds, summary = read_rounds(run_dir / "rounds.jsonl"), summary_of(run_dir)
    assert sum(len(entry["failures"]) for entry in rounds) > 0

    assert segment.run.project == "fl-app"
    assert segment.run.run_group == "g"
    assert list(segment.run.tags) == ["a", "b"]
    assert segment.run.display_name == "run"
    config = compose_config(
        ["task/model=logistic", "partition.num_clients=6", "client.epochs=1", "progress=none"]
    )
    for key in ("task", "partition", "strategy", "seed"):
        assert segment.config[key] == config[key]
    assert segment.config["client"] == {**config["client"], "failure_fraction": 0.3}
    assert segment.config["rounds"] == 5

    assert len(segment.rows) == 5
    for row, entry in zip(segment.rows, rounds, strict=True):
        assert_row_is_round(row, entry)
    assert participation_of(segment.rows[-1]) == times_asked(rounds, clients=6)

    for key, value in summary.items():
        assert segment.summary[key] == value
    assert segment.exit_codes == [0]

    (artifact,) = segment.artifacts
    assert artifact.type == "model"
    assert json.loads(artifact.metadata)["model_hash"] == summary["model_hash"]
    (content,) = artifact.manifest.contents
    assert content.path == "model.safetensors"
    assert Path(content.local_path).is_relative_to(run_dir / "wandb")
    assert digest(Path(content.local_path)) == digest(run_dir / "model.safetensors")


def test_the_partition_is_plotted_once_and_names_no_client(tmp_path: Path) -> None:
    shares = ("client.share_label_counts=true", "partition=exponential", "partition.num_clients=4")
    run_dir = play(tmp_path / "run", *OFFLINE, *shares, "rounds=2")
    play_config(resumed_config(str(run_dir), ["rounds=3"]))
    first, second = segments(run_dir)
    (row,) = first.partition
    assert second.partition == []
    assert row["_step"] == 0
    assert row["partition"]["_type"] == "image-file"
    (picture,) = run_dir.glob(f"wandb/offline-run-*/files/{row['partition']['path']}")
    assert hashlib.sha256(picture.read_bytes()).hexdigest() == row["partition"]["sha256"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    told = read_partition(run_dir)
    assert told is not None
    sizes = [client.num_examples for client in told.described]
    histogram = row["partition_num_examples"]
    assert (histogram["bins"][0], histogram["bins"][-1]) == (min(sizes), max(sizes))
    assert sum(histogram["values"]) == len(sizes) == 4


def test_without_a_question_to_the_clients_there_is_no_plot(tmp_path: Path) -> None:
    run_dir = play(tmp_path / "run", *OFFLINE, "fairness_clients=0", "rounds=1")
    (segment,) = segments(run_dir)
    assert segment.partition == []
    assert not (run_dir / "partition.json").exists()


@pytest.mark.parametrize("given", [None, pytest.param("mine", marks=pytest.mark.slow)])
def test_members_of_a_sweep_are_grouped(
    given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv[:])
    group = [] if given is None else [f"tracking.group={given}"]
    sweep = ["run", "-m", *TINY, *OFFLINE, "seed=1,2", *group, f"hydra.sweep.dir={tmp_path}/sw"]
    assert _main(sweep) == 0
    found = [segments(tmp_path / "sw" / number)[0] for number in ("0", "1")]
    assert [segment.run.run_group for segment in found] == [given or "sw"] * 2
    assert found[0].run.run_id != found[1].run.run_id
    assert [segment.config["seed"] for segment in found] == [1, 2]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_resumed_run_goes_on_under_the_same_id_in_a_second_segment(tmp_path: Path) -> None:
    run_dir = play(tmp_path / "run", *OFFLINE, "selection.fraction=0.3", "rounds=3")
    model = digest(run_dir / "model.safetensors")
    play_config(resumed_config(str(run_dir), ["rounds=5"]))
    first, second = segments(run_dir)
    assert first.run.run_id == second.run.run_id
    assert (first.run.resume, second.run.resume) == (False, True)
    rounds = read_rounds(run_dir / "rounds.jsonl")
    for row, entry in zip([*first.rows, *second.rows], rounds, strict=True):
        assert_row_is_round(row, entry)
    assert participation_of(first.rows[-1]) == times_asked(rounds[:3], clients=6)
    assert times_asked(rounds[:3], clients=6)[0] > 0  # the never asked are counted
    assert participation_of(second.rows[-1]) == times_asked(rounds, clients=6)
    assert second.summary["resumed_from_round"] == 3
    # The first segment still has the model it was recorded with, to be uploaded whenever.
    ((kept,),) = [artifact.manifest.contents for artifact in first.artifacts]
    assert digest(Path(kept.local_path)) == model != digest(run_dir / "model.safetensors")


def test_a_finished_run_resumed_adds_its_result_and_no_round(tmp_path: Path) -> None:
    run_dir = play(tmp_path / "run", *OFFLINE, "tracking.log_model=false")
    play_config(resumed_config(str(run_dir), []))
    first, second = segments(run_dir)
    assert first.run.run_id == second.run.run_id
    assert [row for row in second.rows if "num_updates" in row] == []
    assert second.summary["model_hash"] == first.summary["model_hash"]
    assert first.artifacts == second.artifacts == []


def test_a_run_that_fails_is_marked_as_failed(tmp_path: Path) -> None:
    tracker = make_tracker(compose_config(OFFLINE))
    tracker.start({}, tmp_path)
    tracker.close()
    tracker.close()
    (segment,) = segments(tmp_path)
    assert segment.exit_codes == [1]
    assert tracker.state() == {"run_id": segment.run.run_id}


@pytest.mark.parametrize("fault", ["mode", "folder", "package", "key"])
def test_wandb_failing_costs_a_warning_and_changes_no_bit(
    fault: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    mode = "auto"
    (tmp_path / "run").mkdir()
    if fault == "mode":
        monkeypatch.setenv("WANDB_MODE", "bogus")
    elif fault == "folder":
        mode = "offline"
        (tmp_path / "run" / "wandb").write_text("not a folder")
    elif fault == "package":
        monkeypatch.setitem(sys.modules, "wandb", None)
    else:
        mode = "online"
    run_dir = play(tmp_path / "run", "tracking=wandb", f"tracking.mode={mode}")
    assert caplog.text.count("tracker WandbTracker failed in start and is left out") == 1
    plain = play(tmp_path / "plain")
    assert summary_of(run_dir)["model_hash"] == summary_of(plain)["model_hash"]
    assert summary_of(run_dir)["config_hash"] == summary_of(plain)["config_hash"]


def test_tracking_changes_no_bit(tmp_path: Path) -> None:
    tracked, plain = play(tmp_path / "tracked", *OFFLINE), play(tmp_path / "plain")
    assert summary_of(tracked)["model_hash"] == summary_of(plain)["model_hash"]


def test_a_host_that_never_answers_holds_a_run_up_for_the_time_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        began = time.monotonic()
        run_dir = play(tmp_path / "run", "tracking=wandb", "tracking.timeout_s=1")
        assert time.monotonic() - began < 15
    assert "tracker WandbTracker failed in start" in caplog.text
    assert summary_of(run_dir)["rounds"] == 3


def test_without_a_key_auto_is_offline_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, logger="fl_app")
    run_dir = play(tmp_path / "run", "tracking=wandb")
    assert caplog.text.count("there is no API key") == 1
    assert f"wandb sync {run_dir}/wandb/offline-run-*" in caplog.text
    assert len(segments(run_dir)) == 1
    out, err = capfd.readouterr()
    assert "wandb:" not in out + err


@pytest.mark.parametrize("by", ["key", "environment"])
def test_disabled_leaves_nothing(by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "environment":
        monkeypatch.setenv("WANDB_MODE", "disabled")
    mode = "disabled" if by == "key" else "auto"
    run_dir = play(tmp_path / "run", "tracking=wandb", f"tracking.mode={mode}")
    assert not (run_dir / "wandb").exists()


def test_a_run_tracked_elsewhere_keeps_its_id_while_wandb_is_disabled() -> None:
    tracker = WandbTracker(mode="disabled")
    tracker.restore({"run_id": "abc"})
    tracker.start({}, Path())
    assert tracker.state() == {"run_id": "abc"}


@pytest.mark.parametrize("override", ["mode=on-line", "timeout_s=0", "timeout_s=.inf"])
def test_a_wrong_value_names_its_key(override: str) -> None:
    with pytest.raises(ConfigError, match=f"tracking.{override.split('=')[0]}="):
        make_tracker(compose_config(["tracking=wandb", f"tracking.{override}"]))
