"""Killed, torn, altered, cut, full, locked: a ledger loses nothing that it acknowledged."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fl_app.privacy.accounting import GaussianEvent
from fl_app.privacy.ledger import Ledger
from fl_app.privacy.ledger_format import Account, Charge, LedgerError
from fl_app.types import PrivacyUnit

EVENT = GaussianEvent(noise_multiplier=1.1, sample_rate=0.1, count=10)
NOW = datetime(2026, 11, 23, 3, 0, tzinfo=UTC)


def account(client: str) -> Account:
    return Account(client=client, data_set="digits")


def cohort(round: int, *, run: str = "run", size: int = 3, event: GaussianEvent = EVENT):
    return [
        Charge(
            account=account(str(client)),
            unit=PrivacyUnit.RECORD,
            run=run,
            round=round,
            event=event,
        )
        for client in range(size)
    ]


def written(folder: Path, *, rounds: int = 3) -> Path:
    """Return a ledger of some rounds, with one clock for all."""
    path = folder / "ledger.jsonl"
    ledger = Ledger(path, now=lambda: NOW)
    for round in range(1, rounds + 1):
        ledger.charge(cohort(round))
    return path


def head_of(path: Path) -> Path:
    return path.with_name("ledger.jsonl.head")


def both(path: Path) -> tuple[bytes, bytes]:
    return path.read_bytes(), head_of(path).read_bytes()


def in_a_child(work: Callable[[], None]) -> int:
    """Fork, do the work there, and return the child's process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def ended_well(child: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# What is written.


def test_what_is_charged_is_read_by_this_ledger_and_by_any_other(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, now=lambda: NOW)
    assert ledger.events_of(account("0")) == []
    assert list(ledger) == []
    assert not path.exists()
    ledger.charge(cohort(1))
    ledger.charge(cohort(2, event=GaussianEvent(noise_multiplier=0.1 + 0.2, sample_rate=1 / 3)))
    for reader in (ledger, Ledger(path)):
        assert reader.events_of(account("2")) == [
            EVENT,
            GaussianEvent(noise_multiplier=0.1 + 0.2, sample_rate=1 / 3),
        ]
        assert [entry.seq for entry in reader] == [1, 2, 3, 4, 5, 6]
        assert [entry.charge for entry in reader][:3] == cohort(1)
        assert {entry.time for entry in reader} == {NOW}
        assert reader.verify().entries == 6
    assert ledger.events_of(Account(client="0", data_set="other")) == []


def test_the_lines_are_json_that_anybody_can_read(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in written(tmp_path, rounds=1).read_text().splitlines()]
    assert lines[0] == {
        "format": "fl-app privacy ledger",
        "version": 1,
        "created": "2026-11-23T03:00:00.000+00:00",
    }
    del lines[1]["sha256"]
    assert lines[1] == {
        "seq": 1,
        "time": "2026-11-23T03:00:00.000+00:00",
        "client": "0",
        "data_set": "digits",
        "unit": "record",
        "run": "run",
        "round": 1,
        "noise_multiplier": 1.1,
        "sample_rate": 0.1,
        "count": 10,
    }


def test_odd_names_come_back_as_they_were(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    names = ["", "ward 7\n", '"}', "Zürich \U0001f3e5", "\ud800", "a/../b"]
    charges = [
        Charge(
            account=Account(client=name, data_set=name),
            unit=PrivacyUnit.CLIENT,
            run=name,
            round=1,
            event=EVENT,
        )
        for name in names
    ]
    ledger.charge(charges)
    assert [entry.charge for entry in Ledger(ledger.path)] == charges


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = written(tmp_path)
    finally:
        os.umask(before)
    assert {p.name for p in tmp_path.iterdir()} == {"ledger.jsonl", "ledger.jsonl.head"}
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o600}
    for target in (path, head_of(path)):
        target.chmod(0o620)
        with pytest.raises(LedgerError, match=rf"chmod 600 {target}"):
            Ledger(path).charge(cohort(4))
        target.chmod(0o600)
    Ledger(path).charge(cohort(4))


def test_what_others_append_is_read_without_reading_the_file_again(tmp_path: Path) -> None:
    path = written(tmp_path, rounds=200)
    ledger = Ledger(path, now=lambda: NOW)
    ledger.tallies()
    other = Ledger(path, now=lambda: NOW)
    other.tallies()
    for round in range(201, 204):
        other.charge(cohort(round))
        before = bytes_read()
        assert ledger.events_of(account("1")) == [EVENT.times(round)]
        assert bytes_read() - before < path.stat().st_size / 10


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


# Killed.


def kill_and_compare(folder: Path, kills: int, seed: int) -> None:
    """Kill trainers at random instants; what each had trained must be in the ledger."""
    path, trained = folder / "ledger.jsonl", folder / "trained.log"
    generator = random.Random(seed)

    def train(life: int) -> None:
        ledger = Ledger(path)
        log = os.open(trained, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for round in range(1, 100_000):
            ledger.charge(cohort(round, run=str(life), size=20))
            os.write(log, b"%d %d\n" % (life, round))
            os.fsync(log)

    for life in range(kills):
        size = path.stat().st_size if path.exists() else 0
        child = in_a_child(lambda life=life: train(life))
        # Also in the first instants of a new ledger, and otherwise never in vain.
        while life >= kills // 3 and path.stat().st_size == size:
            time.sleep(0.001)
        time.sleep(generator.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        if generator.random() < 0.3 and path.exists():
            Ledger(path).tallies()
    lines = trained.read_bytes().splitlines(keepends=True)
    acknowledged = {tuple(map(int, line.split())) for line in lines if line.endswith(b"\n")}
    Ledger(path).verify()
    held: dict[tuple[int, int], int] = {}
    for entry in Ledger(path):
        key = (int(entry.charge.run), entry.charge.round)
        held[key] = held.get(key, 0) + 1
    assert len(acknowledged) > kills // 3
    assert all(held.get(key) == 20 for key in acknowledged)
    # Nobody is charged for more than the one cohort that was being written at each kill.
    assert len(held.keys() - acknowledged) <= kills


def test_what_was_trained_before_a_kill_is_in_the_ledger(tmp_path: Path) -> None:
    kill_and_compare(tmp_path, kills=40, seed=1)


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_kill_before_or_after_any_call_of_the_system_does_no_damage(
    tmp_path: Path, rounds: int
) -> None:
    """The instants between two calls are short: here each is hit, in a first charge and a later."""

    def charge_and_die(path: Path, instant: int) -> None:
        ledger, seen = Ledger(path, now=lambda: NOW), 0

        def profile(frame: object, event: str, called: object) -> None:
            nonlocal seen
            if event in ("c_call", "c_return") and called.__module__ in ("posix", "fcntl", "_io"):
                seen += 1
                if seen == instant:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(profile)
        ledger.charge(cohort(9))
        sys.setprofile(None)

    instant, killed, contents = 0, True, set()
    while killed:
        instant += 1
        folder = tmp_path / str(instant)
        folder.mkdir()
        path = folder / "ledger.jsonl"
        if rounds:
            written(folder, rounds=rounds)
        child = in_a_child(lambda path=path, instant=instant: charge_and_die(path, instant))
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
        found = len(list(Ledger(path)))
        assert found in (3 * rounds, 3 * rounds + 3)
        contents.add(found)
        if path.exists():
            Ledger(path).verify()
        Ledger(path, now=lambda: NOW).charge(cohort(10))
        assert Ledger(path).verify().entries == found + 3
    assert instant > 20
    assert len(contents) == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(2))
def test_what_was_trained_before_many_kills_is_in_the_ledger(tmp_path: Path, seed: int) -> None:
    for begun in range(5):  # a new ledger each time: its beginning is the tender part
        folder = tmp_path / str(begun)
        folder.mkdir()
        kill_and_compare(folder, kills=40, seed=100 * seed + begun)


@pytest.mark.parametrize("instant", ["empty", "part of the header", "no head", "no header's end"])
def test_a_ledger_whose_making_was_cut_short_is_made_anew(tmp_path: Path, instant: str) -> None:
    path = written(tmp_path, rounds=0)
    Ledger(path, now=lambda: NOW).charge([])
    header = path.read_bytes()
    head_of(path).unlink()
    kept = {"empty": 0, "part of the header": 20, "no header's end": -1}.get(instant, len(header))
    path.write_bytes(header[:kept])
    with Ledger(path).exclusively():
        assert head_of(path).exists()  # before any entry is
    Ledger(path).charge(cohort(1))
    assert Ledger(path).verify().entries == 3


def test_a_torn_last_line_is_cut_off_and_told_wherever_it_was_torn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path, rounds=1)
    whole = both(path)
    Ledger(path, now=lambda: NOW).charge(cohort(2, size=1))
    line = path.read_bytes()[len(whole[0]) :]
    for length in range(len(line)):
        path.write_bytes(whole[0] + line[:length])
        head_of(path).write_bytes(whole[1])
        found = Ledger(path).verify()
        assert (found.entries, found.torn_bytes) == (3, length)
        assert len(list(Ledger(path))) == 3
        caplog.clear()
        ledger = Ledger(path, now=lambda: NOW)
        ledger.charge(cohort(2, size=1))
        assert path.read_bytes() == whole[0] + line
        assert (f"{length} bytes" in caplog.text) == (length > 0)
        assert ledger.events_of(account("0")) == [EVENT.times(2)]
    assert Ledger(path).verify().torn_bytes == 0


def test_a_head_that_lags_is_no_damage(tmp_path: Path) -> None:
    path = written(tmp_path, rounds=1)
    head = head_of(path).read_bytes()
    Ledger(path, now=lambda: NOW).charge(cohort(2))
    head_of(path).write_bytes(head)
    assert Ledger(path).verify().ahead == 3
    Ledger(path).charge(cohort(3))
    assert Ledger(path).verify() == Ledger(path).verify()
    assert Ledger(path).verify().ahead == 0


# Altered.


def refused(path: Path, match: str) -> None:
    """Nothing can be charged or counted, and nothing is changed."""
    before = [p.read_bytes() if p.exists() else None for p in (path, head_of(path))]
    for use in (lambda ledger: ledger.charge(cohort(9)), Ledger.tallies, Ledger.verify):
        with pytest.raises(LedgerError, match=match):
            use(Ledger(path))
    assert before == [p.read_bytes() if p.exists() else None for p in (path, head_of(path))]


def test_every_flipped_byte_is_found_and_named(tmp_path: Path) -> None:
    path = written(tmp_path, rounds=1)
    content = path.read_bytes()
    generator = random.Random(3)
    for place in range(len(content)):
        altered = bytearray(content)
        altered[place] ^= 1 << generator.randrange(8)
        path.write_bytes(altered)
        with pytest.raises(LedgerError, match=rf"{path.name}.*(line \d|missing at its end|vers)"):
            Ledger(path).verify()
    path.write_bytes(content)
    assert Ledger(path).verify().entries == 3


def test_every_flipped_byte_of_the_head_is_found(tmp_path: Path) -> None:
    path = written(tmp_path, rounds=1)
    content = head_of(path).read_bytes()
    for place in range(len(content)):
        altered = bytearray(content)
        altered[place] ^= 1
        head_of(path).write_bytes(altered)
        # A head that names an earlier entry, with that entry's seal, would merely lag.
        with pytest.raises(LedgerError):
            Ledger(path).verify()


def test_lines_taken_out_put_in_or_changed_places_are_found(tmp_path: Path) -> None:
    path = written(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    for altered in (
        [*lines[:4], *lines[5:]],
        [*lines[:4], lines[5], lines[4], *lines[6:]],
        [*lines[:4], lines[4], *lines[4:]],
        [lines[0].replace(b"23T", b"22T"), *lines[1:]],
    ):
        path.write_bytes(b"".join(altered))
        refused(path, r"ledger.jsonl, line \d+ is damaged: .*PRIVACY.md")


def test_an_edit_that_mends_its_own_seal_breaks_the_next(tmp_path: Path) -> None:
    path = written(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    seal = json.loads(lines[3])["sha256"]
    body = lines[4][: lines[4].index(b',"sha256"')].replace(b'"count":10', b'"count":1')
    forged = hashlib.sha256(seal.encode() + body).hexdigest()
    lines[4] = body + b',"sha256":"%s"}\n' % forged.encode()
    path.write_bytes(b"".join(lines))
    refused(path, r"ledger.jsonl, line 6 is damaged")


def test_an_edit_of_the_last_line_that_mends_its_own_seal_does_not_fit_the_head(
    tmp_path: Path,
) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    (tmp_path / "less").mkdir()
    less = Ledger(tmp_path / "less" / "ledger.jsonl", now=lambda: NOW)
    less.charge(cohort(1))
    less.charge(cohort(2))
    less.charge([*cohort(3, size=2), *cohort(3, event=replace(EVENT, count=1))[2:]])
    assert len(whole) - len(less.path.read_bytes()) == 1
    path.write_bytes(less.path.read_bytes())
    refused(path, "not of the same ledger")


def test_entries_missing_at_the_end_are_found(tmp_path: Path) -> None:
    path = written(tmp_path, rounds=1)
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(LedgerError, match="missing at its end"):
            Ledger(path).verify()
    refused(path, "missing at its end")


def test_a_ledger_cut_while_it_is_in_use_is_found(tmp_path: Path) -> None:
    path = written(tmp_path)
    ledger = Ledger(path)
    ledger.tallies()
    whole = both(path)
    path.write_bytes(whole[0][: len(whole[0]) // 2])
    with pytest.raises(LedgerError, match="missing at its end"):
        ledger.charge(cohort(4))
    path.write_bytes(whole[0])
    ledger.charge(cohort(4))
    assert ledger.events_of(account("0")) == [EVENT.times(4)]


@pytest.mark.parametrize("lost", ["ledger", "head", "ledger while in use"])
def test_a_lost_file_is_no_new_beginning(tmp_path: Path, lost: str) -> None:
    path = written(tmp_path)
    if lost == "ledger while in use":
        ledger = Ledger(path)
        ledger.tallies()
        path.unlink()
        head_of(path).unlink()
        with pytest.raises(LedgerError, match="is gone"):
            ledger.charge(cohort(4))
    else:
        (path if lost == "ledger" else head_of(path)).unlink()
        refused(path, "is gone")
    assert path.exists() == (lost == "head")


def test_the_head_of_another_ledger_is_found(tmp_path: Path) -> None:
    path = written(tmp_path)
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "ledger.jsonl"
    Ledger(other).charge(cohort(1, run="other"))
    head_of(path).write_bytes(head_of(other).read_bytes())
    refused(path, "not of the same ledger")


def test_a_newer_version_is_left_alone_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"format":"fl-app privacy ledger","version":2,"created":"x","new":1}\n{}\n')
    path.chmod(0o600)
    refused(path, r"line 1: it is of version 2, and this fl-app knows 1. Use the fl-app that wrote")


@pytest.mark.parametrize("content", ["rounds: 3", "[]\n", '{"format":"other","version":1}\n'])
def test_a_file_that_is_no_ledger_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(LedgerError, match="does not begin as a ledger does|line 1 is damaged"):
        Ledger(path).charge(cohort(1))
    assert path.read_text() == content
    assert not head_of(path).exists()


# Time, disk, locks.


def test_a_clock_that_went_back_is_refused_beyond_the_tolerance(tmp_path: Path) -> None:
    path = written(tmp_path)
    for minutes, tolerance, fine in ((4, 300, True), (6, 300, False), (60, 3601, True)):
        back = NOW - timedelta(minutes=minutes)
        ledger = Ledger(path, now=lambda back=back: back, clock_tolerance_s=tolerance)
        if fine:
            ledger.charge(cohort(4, size=1))
            Ledger(path, now=lambda: NOW).charge(cohort(4, size=1))
        else:
            content = both(path)
            with pytest.raises(LedgerError, match=r"clock says 2026-11-23 02:54.*set the clock"):
                ledger.charge(cohort(4))
            assert both(path) == content


def test_a_full_disk_acknowledges_nothing_and_changes_nothing(tmp_path: Path) -> None:
    path = written(tmp_path)
    before = both(path)

    def charge_without_room() -> None:
        size = len(before[0])
        for room in (0, 1, 100, 400):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, size + 500))
            with pytest.raises(LedgerError, match=r"cannot be written \(File too large\)"):
                Ledger(path, now=lambda: NOW).charge(cohort(4))
            assert both(path) == before

    assert ended_well(in_a_child(charge_without_room))
    Ledger(path).charge(cohort(4))
    assert Ledger(path).verify().entries == 12


def test_a_disk_too_full_for_a_new_ledger_leaves_none_that_counts(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"

    def begin_without_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (90, 90))
        for _ in range(2):
            with pytest.raises(LedgerError, match="cannot be written"):
                Ledger(path).charge(cohort(1))
        assert not head_of(path).exists()

    assert ended_well(in_a_child(begin_without_room))
    Ledger(path).charge(cohort(1))
    assert Ledger(path).verify().entries == 3


@pytest.fixture
def tiny_disk(tmp_path: Path):
    """Yield a folder on a disk of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_loses_no_round_and_makes_none_up(tiny_disk: Path) -> None:
    ledger, round = Ledger(tiny_disk / "ledger.jsonl"), 0
    with pytest.raises(LedgerError, match=r"No space left on device\): make room"):
        while True:
            ledger.charge(cohort(round + 1, size=7))
            round += 1
    assert round > 10
    assert ledger.verify().entries == 7 * round
    assert ledger.verify().torn_bytes == 0
    with pytest.raises(LedgerError, match="No space left"):
        Ledger(ledger.path).charge(cohort(round + 1, size=7))
    assert ledger.events_of(account("0")) == [EVENT.times(round)]


def test_a_read_only_disk_refuses_to_charge_and_can_be_shown(tiny_disk: Path) -> None:
    path = written(tiny_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(LedgerError, match="cannot be opened.*Nothing was trained"):
        Ledger(path).charge(cohort(4))
    assert Ledger(path).verify().entries == 9


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    """A volume that is not mounted must not be a new beginning."""
    with pytest.raises(LedgerError, match="make its folder"):
        Ledger(tmp_path / "volume" / "ledger.jsonl").charge(cohort(1))
    assert list(tmp_path.iterdir()) == []


def test_a_ledger_that_another_process_holds_is_waited_for_and_then_refused(
    tmp_path: Path,
) -> None:
    path = written(tmp_path)
    ready, told = os.pipe()

    def hold() -> None:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            os.write(told, b"x")
            time.sleep(0.4)

    child = in_a_child(hold)
    os.read(ready, 1)
    with pytest.raises(LedgerError, match=r"held by another process for 0.1 s.*Nothing was"):
        Ledger(path, lock_timeout_s=0.1).charge(cohort(4))
    Ledger(path).charge(cohort(4))
    assert ended_well(child)


def test_processes_that_charge_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"

    def charge(process: int) -> None:
        ledger = Ledger(path)
        for round in range(1, 41):
            ledger.charge(cohort(round, run=str(process)))

    children = [in_a_child(lambda process=process: charge(process)) for process in range(3)]
    assert all([ended_well(child) for child in children])
    assert Ledger(path).verify().entries == 3 * 40 * 3
    assert Ledger(path).events_of(account("2")) == [EVENT.times(120)]
    runs = [(entry.charge.run, entry.charge.round) for entry in Ledger(path)]
    assert runs[::3] == runs[1::3] == runs[2::3]  # no cohort was cut apart
    for process in range(3):
        assert [round for run, round in runs[::3] if run == str(process)] == list(range(1, 41))


def test_an_interrupt_in_the_middle_of_a_charge_leaves_a_whole_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger, generator, acknowledged = Ledger(path), random.Random(5), 0

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for round in range(1, 201):
            try:
                signal.setitimer(signal.ITIMER_REAL, generator.uniform(0.0001, 0.01))
                ledger.charge(cohort(round))
                signal.setitimer(signal.ITIMER_REAL, 0)
                acknowledged += 1
            except KeyboardInterrupt:
                continue
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert 0 < acknowledged < 200
    held = Ledger(path).events_of(account("1"))[0].count // EVENT.count
    assert acknowledged <= held < 200
    assert held <= ledger.events_of(account("1"))[0].count // EVENT.count
    Ledger(path).verify()
