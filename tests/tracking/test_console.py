from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from fl_app.tracking.base import Tracker, Trackers
from fl_app.tracking.console import ConsoleProgress, log_handler, print_summary
from fl_app.tracking.json_files import JSON
from fl_app.tracking.sections import human_bytes, human_seconds, printable
from fl_app.types import Failure, FailureKind, RoundReport

SUMMARY: dict[str, object] = {
    "task": "digits",
    "strategy": "fedavg",
    "engine": "local",
    "rounds": 20,
    "metrics": {"loss": 0.123456, "accuracy": 0.9431},
    "fairness": {"accuracy_min": 0.8, "accuracy_p10": 0.85, "accuracy_std": 0.02, "clients": 10},
    "privacy": {
        "unit": "record",
        "epsilon_max": 2.4,
        "epsilon_mean": 1.9,
        "delta": 1e-5,
        "accountant": "prv",
        "noise_multiplier": 1.1,
    },
    "communication": {
        "uplink_bytes": 8_000_000,
        "downlink_bytes": 32_000_000,
        "uplink_uncompressed_bytes": 32_000_000,
    },
    "failures": {"clients": 8, "rejected_updates": 3},
    "time_s": {"setup": 1.2, "total": 185.0, "per_round": 0.922},
    "resumed_from_round": 8,
    "stopped_by": "rounds",
}


def report(round: int, **changes: object) -> RoundReport:
    base = {
        "round": round,
        "cohort": ("0", "1"),
        "num_updates": 2,
        "applied": True,
        "metrics": {"accuracy": 0.5, "loss": 1.25},
        "seconds": 2.0,
    }
    return RoundReport(**{**base, **changes})  # type: ignore[arg-type]


def plain_console() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=False, width=200), text


def terminal_console() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    environment = {"TERM": "xterm-256color"}
    return Console(file=text, force_terminal=True, width=200, _environ=environment), text


def run(progress: ConsoleProgress, rounds: int, first: int = 1) -> None:
    progress.start({"rounds": rounds}, Path())
    for number in range(first, rounds + 1):
        progress.on_round(report(number))
    progress.finish({})
    progress.close()


@pytest.mark.parametrize(("rounds", "most"), [(1, 1), (3, 3), (10, 10), (20, 11), (997, 11)])
def test_off_a_terminal_there_are_some_ten_plain_lines(rounds: int, most: int) -> None:
    console, text = plain_console()
    run(ConsoleProgress(console=console), rounds)
    lines = text.getvalue().splitlines()
    assert len(lines) == most
    assert lines[0].split()[:2] == ["round", f"1/{rounds}"]
    assert lines[-1].split()[:2] == ["round", f"{rounds}/{rounds}"]
    assert "\x1b" not in text.getvalue()


def test_a_line_says_how_far_how_good_who_failed_and_how_long() -> None:
    console, text = plain_console()
    progress = ConsoleProgress(console=console)
    progress.start({"rounds": 4}, Path())
    failure = Failure(client="1", kind=FailureKind.OFFLINE, reason="gone")
    progress.on_round(report(1, num_updates=1, failures=(failure,), applied=False))
    assert text.getvalue().split("  ") == [
        "round 1/4",
        "accuracy 0.5",
        "loss 1.25",
        "replies 1/2",
        "failed 1",
        "old model kept",
        "2 s/round",
        "ETA 6 s\n",
    ]


def test_a_round_without_evaluation_shows_the_last_figures() -> None:
    console, text = plain_console()
    progress = ConsoleProgress(console=console)
    progress.start({"rounds": 2}, Path())
    progress.on_round(report(1))
    progress.on_round(report(2, metrics={}))
    assert "accuracy 0.5" in text.getvalue().splitlines()[1]


def test_without_a_held_out_set_the_clients_own_figures_are_shown() -> None:
    console, text = plain_console()
    progress = ConsoleProgress(console=console)
    progress.start({"rounds": 2}, Path())
    progress.on_round(report(1, metrics={}, client_metrics={"train_loss": 0.5}))
    assert "train_loss 0.5" in text.getvalue()


def test_an_open_ended_run_has_no_eta_and_ever_fewer_lines() -> None:
    console, text = plain_console()
    progress = ConsoleProgress(console=console)
    progress.start({}, Path())
    for number in range(1, 101):
        progress.on_round(report(number))
    shown = [line.split()[1] for line in text.getvalue().splitlines()]
    assert shown == ["1", "2", "4", "8", "16", "32", "64"]
    assert "ETA" not in text.getvalue()


def test_a_resumed_run_starts_where_it_was() -> None:
    console, text = plain_console()
    run(ConsoleProgress(console=console), 100, first=95)
    assert [line.split()[1] for line in text.getvalue().splitlines()] == ["95/100", "100/100"]


def test_a_terminal_gets_a_bar_that_ends_at_the_last_round() -> None:
    console, text = terminal_console()
    run(ConsoleProgress(console=console), 5)
    assert "round 5/5" in text.getvalue()
    assert text.getvalue().endswith("\x1b[?25h")  # the cursor is back


def test_a_log_line_during_the_bar_is_whole_and_stays() -> None:
    console, text = terminal_console()
    log = logging.getLogger("test_console")
    handler = log_handler(console)
    log.addHandler(handler)
    progress = ConsoleProgress(console=console)
    progress.start({"rounds": 2}, Path())
    try:
        progress.on_round(report(1))
        log.warning("client [bold]7[/bold] left")
        progress.on_round(report(2))
    finally:
        progress.close()
        log.removeHandler(handler)
    assert "client [bold]7[/bold] left" in Text.from_ansi(text.getvalue()).plain


def test_quiet_prints_nothing_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    console, text = terminal_console()
    run(ConsoleProgress(console=console, quiet=True), 5)
    run(ConsoleProgress(quiet=True), 5)
    assert text.getvalue() == ""
    assert capsys.readouterr() == ("", "")


def test_progress_goes_to_stderr_and_the_table_to_stdout(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(ConsoleProgress(), 1)
    out, err = capsys.readouterr()
    assert out == ""
    assert "round 1/1" in err
    print_summary(SUMMARY)
    out, err = capsys.readouterr()
    assert "Final model" in out
    assert err == ""


def test_the_table_shows_every_group_in_human_units() -> None:
    console, text = plain_console()
    print_summary(SUMMARY, console)
    table = " ".join(text.getvalue().split())
    for part in (
        "digits · fedavg · local",
        "loss 0.1235",
        "worst client's accuracy 0.8",
        "largest ε of a client 2.4 at δ = 1e-05",
        "composed over all 20 rounds, by prv",
        "clients to server 8 MB",
        "to server, uncompressed 32 MB (4 ×)",
        "updates refused 3",
        "total 3 min 05 s",
        "a round (median) 922 ms",
        "resumed from round 8",
    ):
        assert part in table


def test_an_epsilon_that_is_not_finite_is_never_shown_as_a_guarantee() -> None:
    console, text = plain_console()
    privacy = {"unit": "record", "epsilon_max": None, "delta": 1e-5}
    print_summary({**SUMMARY, "privacy": privacy}, console)
    assert "no finite guarantee" in text.getvalue()


def test_markup_and_escapes_in_names_are_shown_and_not_obeyed() -> None:
    console, text = plain_console()
    print_summary({"task": "[red]x[/red]\x1b[2J", "metrics": {"[b]m": 1.0}}, console)
    assert "[red]x[/red]�[2J" in text.getvalue()
    assert "[b]m" in text.getvalue()
    assert "\x1b" not in text.getvalue()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_254_000, "1.25 MB"), (None, "not measured")],
)
def test_bytes_are_readable(count: float | None, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12.3 ms"), (3.417, "3.42 s"), (59.97, "1 min 00 s"), (7380, "2 h 03 min")],
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


def test_a_long_text_is_cut_to_its_limit() -> None:
    assert printable("x" * 300, limit=10) == "x" * 9 + "…"
    assert printable("x" * 10, limit=10) == "x" * 10
    assert printable("a\nb\ud800") == "a�b�"


@dataclass
class Recorder:
    """Writes down what it is told, and breaks in ``breaks``."""

    breaks: str = ""
    calls: list[str] = field(default_factory=list)

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call == self.breaks:
            raise RuntimeError(f"{call} is broken")

    def start(self, config: Mapping[str, object], run_dir: Path) -> None:
        self._note("start")

    def on_round(self, report: RoundReport) -> None:
        self._note("on_round")

    def finish(self, summary: Mapping[str, object]) -> None:
        self._note("finish")

    def state(self) -> Mapping[str, JSON]:
        self._note("state")
        return {"rounds": self.calls.count("on_round")}

    def restore(self, state: Mapping[str, JSON]) -> None:
        self._note(f"restore {state['rounds']}")

    def close(self) -> None:
        self._note("close")


def test_a_tracker_that_raises_is_logged_once_and_dropped_and_the_run_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken, sound = Recorder(breaks="on_round"), Recorder()
    trackers: Tracker = Trackers((broken, sound))
    trackers.start({}, Path())
    for number in (1, 2, 3):
        trackers.on_round(report(number))
    trackers.finish({})
    trackers.close()
    assert broken.calls == ["start", "on_round", "close"]
    assert sound.calls == ["start", "on_round", "on_round", "on_round", "finish", "close"]
    assert len(caplog.records) == 1
    assert "Recorder failed in on_round" in caplog.text


def test_the_user_can_still_interrupt_a_run_within_a_tracker() -> None:
    class Interrupted(Recorder):
        def on_round(self, report: RoundReport) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trackers((Interrupted(),)).on_round(report(1))


def test_each_tracker_gets_its_own_state_back_even_one_that_was_dropped() -> None:
    broken, sound = Recorder(breaks="on_round"), Recorder()
    first = Trackers((sound, broken))
    first.start({}, Path())
    first.state()
    first.on_round(report(1))
    kept = first.state()
    assert kept == {"Recorder": {"rounds": 1}, "Recorder#2": {"rounds": 0}}

    again = (Recorder(), Recorder(), Recorder())
    second = Trackers(again)
    second.restore(kept)
    assert [tracker.calls for tracker in again] == [["restore 1"], ["restore 0"], []]
