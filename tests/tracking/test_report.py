from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

import fl_app
from fl_app.tracking.figures import MOST_BARS, charts_of
from fl_app.tracking.history import history_of
from fl_app.tracking.report import write_report
from fl_app.tracking.rounds_file import RoundsFile
from fl_app.types import ConfigError, Failure, FailureKind, RoundReport, client_order

EVIL = '<script>alert("1")</script>'


def reports(
    rounds: int, *, clients: int = 10, cohort: int = 8, reason: str = "no answer"
) -> Iterator[RoundReport]:
    draw = random.Random(0)
    for number in range(1, rounds + 1):
        names = (str(i) for i in draw.sample(range(clients), cohort))
        asked = tuple(sorted(names, key=client_order))
        failure = Failure(client=asked[0], kind=FailureKind.ERROR, reason=reason)
        yield RoundReport(
            round=number,
            cohort=asked,
            num_updates=cohort - 1,
            applied=True,
            failures=(failure,),
            metrics={"loss": 1 / number, "accuracy": 1 - 1 / (number + 1)},
            client_metrics={"train_loss": 1 / number, "test_loss": 1.2 / number},
            client_accuracy=dict.fromkeys(asked[1:], 0.5),
            epsilon=math.sqrt(number),
            uplink_bytes=1000,
            downlink_bytes=4000,
            uplink_uncompressed_bytes=4000,
            seconds=1.5,
        )


def write_run(run_dir: Path, entries: Iterator[RoundReport], **summary: object) -> Path:
    file = RoundsFile(run_dir / "rounds.jsonl")
    (run_dir / "rounds.jsonl").touch()
    for entry in entries:
        file.append(entry)
    file.close()
    content = {
        "task": "digits",
        "strategy": "fedavg",
        "engine": "local",
        "rounds": 20,
        "seed": 7,
        "model_hash": "0123456789abcdef",
        "metrics": {"loss": 0.1, "accuracy": 0.9},
        **summary,
    }
    (run_dir / "summary.json").write_text(json.dumps(content))
    (run_dir / "config.yaml").write_text("seed: 7\nlabel: <b>bold</b>\n")
    return run_dir


def run_python(code: str) -> None:
    """Run ``code`` in a fresh process that imports the same fl_app."""
    root = Path(fl_app.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 rounds and its page, to be read only."""
    return write_report(write_run(tmp_path_factory.mktemp("run"), reports(20)))


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and whether each is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def names(self) -> set[str]:
        return {tag for tag, _ in self.tags}


def test_the_page_shows_the_result_the_plots_and_the_config(written: Path) -> None:
    assert written.name == "report.html"
    page = Page(written.read_text())
    text = " ".join(" ".join(page.text).split())
    for part in ("digits with fedavg", "0123456789ab", "Worst 0.5", "clients to server", "seed: 7"):
        assert part in text
    titles = [page.text[i] for i in range(len(page.text)) if page.text[i] in ALL_CHARTS]
    assert set(titles) == ALL_CHARTS
    assert page.open == []


ALL_CHARTS = {
    "Accuracy",
    "Loss",
    "Accuracy by client",
    "Privacy loss",
    "Communication",
    "Failures",
    "Time",
    "Participation",
}


def test_the_page_loads_nothing_and_runs_nothing(written: Path) -> None:
    text = written.read_text()
    page = Page(text)
    assert not page.names() & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "image",
        "foreignobject",
    }
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "url(http" not in text
    assert "@import" not in text


def test_what_clients_and_config_say_is_text_and_never_markup(tmp_path: Path) -> None:
    entry = next(reports(1, reason=EVIL))
    name = f"{EVIL[:8]}$\\frac$"
    hostile = RoundReport(
        round=1,
        cohort=(EVIL, name, "\x00\ud800\x1b", "日本"),
        num_updates=3,
        applied=True,
        failures=(Failure(client=EVIL, kind=FailureKind.REJECTED, reason=EVIL + "\x00\ud800"),),
        metrics=entry.metrics,
        client_accuracy={EVIL: 0.5, name: 0.25, "\x00\ud800\x1b": 0.125, "日本": 1.0},
    )
    run_dir = write_run(
        tmp_path, iter([hostile]), task=EVIL, engine=EVIL, metrics={EVIL: 1.0}, stopped_by=EVIL
    )
    (run_dir / "config.yaml").write_text(f"name: {EVIL}\n</code></pre>{EVIL}")
    text = write_report(run_dir).read_text()
    page = Page(text)
    assert "script" not in page.names()
    assert "<script" not in text.lower()
    assert "&lt;script&gt;" in text
    assert not {"\x00", "\x1b"} & set(text)
    assert page.open == []


def test_the_same_files_give_the_same_bytes_in_any_process(written: Path) -> None:
    first = written.read_bytes()
    run_python(
        "import sys; from pathlib import Path; from fl_app.tracking.report import write_report\n"
        f"write_report(Path({str(written.parent)!r}))\n"
        "assert 'matplotlib.pyplot' not in sys.modules  # it keeps figures, and picks a display\n"
    )
    assert written.read_bytes() == first


def test_every_plot_has_a_name_a_description_and_a_caption(written: Path) -> None:
    page = Page(written.read_text())
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(drawings) == len(ALL_CHARTS)
    assert {drawing["aria-label"] for drawing in drawings} == ALL_CHARTS
    assert all(drawing["role"] == "img" for drawing in drawings)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("figcaption") == tags.count("desc") == len(ALL_CHARTS)


def test_no_id_occurs_in_two_plots() -> None:
    seen: set[str] = set()
    for chart in charts_of(history_of(reports(5))):
        ids = set(re.findall(r'\bid="([^"]+)"', chart.svg))
        assert not ids & seen
        seen |= ids
        assert set(re.findall(r"url\(#([^)]+)\)", chart.svg)) <= ids


def test_colours_follow_the_theme_of_the_page() -> None:
    for chart in charts_of(history_of(reports(5))):
        bare = re.sub(r"var\(--\w+, #[0-9a-f]{6}\)", "", chart.svg)
        assert re.findall(r"(?:fill|stroke): #(?!ffffff)[0-9a-f]{6}", bare) == []


@pytest.mark.parametrize(
    ("clients", "shape"), [(MOST_BARS, "a bar each"), (MOST_BARS + 1, "as a histogram")]
)
def test_many_clients_become_a_histogram(clients: int, shape: str) -> None:
    entries = reports(2, clients=clients + 1, cohort=clients + 1)
    captions = {chart.title: chart.caption for chart in charts_of(history_of(entries))}
    assert f"{clients} clients, {shape}" in captions["Accuracy by client"]


def test_the_history_counts_failures_participation_and_spread() -> None:
    history = history_of(
        [
            RoundReport(
                round=1,
                cohort=("0", "1"),
                num_updates=1,
                applied=False,
                failures=(Failure(client="0", kind=FailureKind.OFFLINE, reason="gone"),),
                client_accuracy={"1": 0.0, "2": 1.0, "3": math.nan},
            ),
            RoundReport(round=2, cohort=("1",), num_updates=1, applied=True),
        ]
    )
    assert history.failures[FailureKind.OFFLINE] == [1, 0]
    assert history.failures[FailureKind.TIMEOUT] == [0, 0]
    assert history.reasons == {(FailureKind.OFFLINE, "gone"): 1}
    assert history.asked == {"0": 1, "1": 2}
    assert history.not_applied == 1
    assert (history.last_measured, history.last_accuracy) == (1, {"1": 0.0, "2": 1.0})
    assert history.client_accuracy[0] == 0.5
    assert history.client_accuracy_low[0] == pytest.approx(0.1)
    assert history.client_accuracy_high[0] == pytest.approx(0.9)
    assert math.isnan(history.client_accuracy[1])


def test_a_client_that_invents_reasons_cannot_fill_the_memory() -> None:
    failures = (
        Failure(client="0", kind=FailureKind.ERROR, reason=f"{number} " + "x" * 10_000)
        for number in range(1500)
    )
    entries = [
        RoundReport(round=i, cohort=(), num_updates=0, applied=True, failures=(failure,))
        for i, failure in enumerate(failures, start=1)
    ]
    reasons = history_of(entries).reasons
    assert len(reasons) == 1001
    assert reasons.total() == 1500
    assert max(len(reason) for _, reason in reasons) == 200


def test_memory_does_not_grow_with_rounds_times_clients() -> None:
    def peak_bytes(rounds: int) -> int:
        entries = reports(rounds, clients=200, cohort=200)
        tracemalloc.start()
        history_of(entries)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak_bytes(2)
    assert peak_bytes(200) - peak_bytes(20) < 180 * 2000  # a round's clients take 20 kB and more


def test_a_run_that_was_cut_short_can_be_shown(tmp_path: Path) -> None:
    write_run(tmp_path, reports(3))
    (tmp_path / "summary.json").unlink()
    (tmp_path / "config.yaml").unlink()
    with (tmp_path / "rounds.jsonl").open("ab") as file:
        file.write(b'{"round": 4, "co')
    text = write_report(tmp_path).read_text()
    assert "Unfinished run" in text
    assert "has no summary.json" in text


def test_a_run_without_any_round_or_figure_can_be_shown(tmp_path: Path) -> None:
    assert "<svg" not in write_report(write_run(tmp_path, iter([]), metrics={})).read_text()
    empty = RoundReport(round=1, cohort=(), num_updates=0, applied=False)
    (tmp_path / "rounds.jsonl").unlink()
    text = write_report(write_run(tmp_path, iter([empty]), metrics={"loss": None})).read_text()
    assert "1 of 1 rounds kept the old model" in text
    assert "not measured" in text


def test_a_folder_that_is_no_run_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no rounds\.jsonl.*give the folder"):
        write_report(tmp_path)
    (tmp_path / "rounds.jsonl").touch()
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ConfigError, match=r"summary\.json is not JSON"):
        write_report(tmp_path)


def test_importing_the_report_and_the_console_does_not_import_what_is_slow() -> None:
    code = (
        "import sys, fl_app.types; before = set(sys.modules)\n"
        "import fl_app.tracking.report, fl_app.tracking.console, fl_app.tracking.summary\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert not new & {'matplotlib', 'jinja2', 'rich', 'wandb', 'flwr', 'hydra'}, new"
    )
    run_python(code)


def test_drawing_does_not_touch_the_callers_matplotlib_settings() -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    list(charts_of(history_of(reports(2))))
    assert dict(mpl.rcParams) == before
