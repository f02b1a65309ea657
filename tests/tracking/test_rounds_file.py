from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fl_app.tracking.rounds_file import (
    RoundsFile,
    iter_reports,
    read_rounds,
    report_from_json,
    report_to_json,
)
from fl_app.types import ConfigError, Failure, FailureKind, RoundReport

KEYS = [
    "round",
    "cohort",
    "num_updates",
    "applied",
    "failures",
    "metrics",
    "client_metrics",
    "client_accuracy",
    "epsilon",
    "epsilon_budget",
    "uplink_bytes",
    "downlink_bytes",
    "uplink_uncompressed_bytes",
    "seconds",
]

quick = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
counts = st.integers(0, 2**53)
finite = st.floats(allow_nan=False, allow_infinity=False)
named_numbers = st.dictionaries(st.text(max_size=8), finite, max_size=3)
reports = st.builds(
    RoundReport,
    round=st.integers(1, 10_000),
    cohort=st.lists(st.text(max_size=8), max_size=4).map(tuple),
    num_updates=counts,
    applied=st.booleans(),
    failures=st.lists(
        st.builds(Failure, client=st.text(), kind=st.sampled_from(FailureKind), reason=st.text()),
        max_size=3,
    ).map(tuple),
    metrics=named_numbers,
    client_metrics=named_numbers,
    client_accuracy=named_numbers,
    epsilon=st.none() | finite,
    uplink_bytes=counts,
    downlink_bytes=counts,
    uplink_uncompressed_bytes=counts,
    seconds=finite,
)


def report(round: int, **changes: object) -> RoundReport:
    return RoundReport(
        **{"round": round, "cohort": ("0", "1"), "num_updates": 2, "applied": True, **changes}  # type: ignore[arg-type]
    )


def write(path: Path, *entries: RoundReport) -> RoundsFile:
    file = RoundsFile(path)
    for entry in entries:
        file.append(entry)
    return file


@quick
@given(st.lists(reports, max_size=4))
def test_what_is_appended_is_what_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, entries: list[RoundReport]
) -> None:
    path = tmp_path_factory.mktemp("run") / "rounds.jsonl"
    path.touch()
    write(path, *entries).close()
    assert list(iter_reports(path)) == entries
    assert path.read_bytes().count(b"\n") == len(entries)


@quick
@given(st.lists(reports, min_size=1, max_size=4), st.data())
def test_a_cut_at_any_byte_leaves_only_whole_lines_and_the_file_can_go_on(
    tmp_path_factory: pytest.TempPathFactory, entries: list[RoundReport], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("run") / "rounds.jsonl"
    file = write(path, *entries)
    before = path.read_bytes()
    cut = data.draw(st.integers(0, len(before)))

    file.truncate(cut)
    kept = path.read_bytes()
    whole = before[:cut].count(b"\n")
    assert before.startswith(kept)
    assert kept == b"" or kept.endswith(b"\n")
    assert list(iter_reports(path)) == entries[:whole]
    assert file.position() == len(kept)

    file.append(entries[0])
    file.close()
    assert list(iter_reports(path)) == [*entries[:whole], entries[0]]


@quick
@given(st.lists(reports, min_size=1, max_size=3), st.data())
def test_a_kill_within_a_line_loses_that_line_only(
    tmp_path_factory: pytest.TempPathFactory, entries: list[RoundReport], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("run") / "rounds.jsonl"
    write(path, *entries).close()
    whole = path.read_bytes()
    torn = whole[: data.draw(st.integers(0, len(whole)))]
    path.write_bytes(torn)

    lines = torn.count(b"\n")
    assert list(iter_reports(path)) == entries[:lines]
    assert len(read_rounds(path)) == lines
    assert RoundsFile(path).position() == torn.rfind(b"\n") + 1
    write(path, entries[-1]).close()
    assert list(iter_reports(path)) == [*entries[:lines], entries[-1]]


def test_the_keys_of_a_line_are_those_of_the_contract_in_order(tmp_path: Path) -> None:
    failure = Failure(client="1", kind=FailureKind.TIMEOUT, reason="30 s are over")
    write(tmp_path / "r", report(1, failures=(failure,))).close()
    (entry,) = read_rounds(tmp_path / "r")
    assert list(entry) == KEYS
    assert entry["failures"] == [{"client": "1", "kind": "timeout", "reason": "30 s are over"}]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_in_the_file_and_nan_when_read(
    tmp_path: Path, value: float
) -> None:
    path = tmp_path / "rounds.jsonl"
    write(path, report(1, metrics={"loss": value}, epsilon=value, seconds=value)).close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not strict JSON")

    entry = json.loads(path.read_bytes(), parse_constant=refuse)
    assert entry["metrics"] == {"loss": None}
    assert entry["epsilon"] is None
    (back,) = iter_reports(path)
    assert math.isnan(back.metrics["loss"])
    assert math.isnan(back.seconds)
    assert back.epsilon is None


def test_a_line_is_in_the_file_as_soon_as_append_returns(tmp_path: Path) -> None:
    file = write(tmp_path / "r", report(1))
    assert len(read_rounds(tmp_path / "r")) == 1
    file.sync()
    assert file.position() == (tmp_path / "r").stat().st_size
    file.close()


def test_a_run_resumed_from_a_checkpoint_writes_each_round_once(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    killed = write(path, report(1), report(2))
    killed.sync()
    position = killed.position()
    killed.append(report(3))
    killed.close()
    with path.open("ab") as file:
        file.write(b'{"round":4,"coh')

    resumed = RoundsFile(path)
    resumed.truncate(position)
    resumed.append(report(3))
    resumed.append(report(4))
    resumed.close()
    assert [entry.round for entry in iter_reports(path)] == [1, 2, 3, 4]


def test_a_file_shorter_than_its_checkpoint_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "rounds.jsonl", report(1))
    with pytest.raises(ConfigError, match="put the file of that run back"):
        file.truncate(file.position() + 1)
    with pytest.raises(ConfigError, match="0 bytes"):
        RoundsFile(tmp_path / "missing").truncate(1)
    RoundsFile(tmp_path / "missing").truncate(0)


def test_a_broken_line_that_ends_is_refused_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    write(path, report(1)).close()
    with path.open("ab") as file:
        file.write(b'{"round": \n')
    with pytest.raises(ConfigError, match=r"rounds\.jsonl, line 2 is not JSON"):
        read_rounds(path)


@pytest.mark.parametrize(
    "change",
    [{"cohort": 3}, {"metrics": []}, {"failures": [{"client": "0", "kind": "shy", "reason": ""}]}],
)
def test_an_object_that_is_no_round_is_refused_by_line(
    tmp_path: Path, change: dict[str, object]
) -> None:
    path = tmp_path / "rounds.jsonl"
    path.write_text(json.dumps(report_to_json(report(1)) | change) + "\n")
    with pytest.raises(ConfigError, match="line 1: not a round"):
        list(iter_reports(path))


@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_a_round_is_needed(key: str) -> None:
    entry = report_to_json(report(1))
    del entry[key]
    with pytest.raises(ConfigError, match=key):
        report_from_json(entry)


def test_a_disk_error_reaches_the_loop(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="rounds"):
        RoundsFile(tmp_path / "no such folder" / "rounds.jsonl").append(report(1))


def test_the_last_line_end_is_found_across_blocks(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    path.write_bytes(b"{}\n" + b"x" * 200_000)
    assert RoundsFile(path).position() == 3
    path.write_bytes(b"x" * 200_000)
    assert RoundsFile(path).position() == 0
