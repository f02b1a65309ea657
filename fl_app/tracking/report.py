"""``report.html``: one self-contained page a run, made from its files and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from fl_app.files import write_atomically
from fl_app.tracking.figures import charts_of
from fl_app.tracking.history import RunHistory, history_of
from fl_app.tracking.partition_plot import partition_chart
from fl_app.tracking.report_template import PAGE
from fl_app.tracking.rounds_file import iter_reports
from fl_app.tracking.sections import (
    epsilon_text,
    group,
    human_bytes,
    human_number,
    human_seconds,
    number,
    printable,
    sections_of,
)
from fl_app.types import ConfigError

_MOST_REASONS_SHOWN = 20


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into ``run_dir`` and return its path.

    Reads ``config.yaml``, ``partition.json``, ``rounds.jsonl``, ``summary.json`` and
    ``clients.json`` there; of a run that was cut short some are missing, and the page says so.
    Rounds are read one at a time. The same files give the same bytes. Clients are not trusted:
    what they sent is shown as text only.

    Raises:
        ConfigError: The folder has no ``rounds.jsonl``, or a file in it is broken.
    """
    import jinja2

    rounds_path = run_dir / "rounds.jsonl"
    if not rounds_path.is_file():
        raise ConfigError(
            f"{run_dir} has no rounds.jsonl, so it is not the folder of a run: "
            "give the folder that the run printed in its last line"
        )
    history = history_of(iter_reports(rounds_path))
    summary = _read_json(run_dir / "summary.json")
    final = _accuracies(_read_json(run_dir / "clients.json"))
    if final:
        history.last_accuracy, history.last_measured = final, None
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(PAGE).render(
        name=printable(run_dir.resolve().name),
        title=_title(summary),
        facts=list(_facts(summary, history)),
        notes=list(_notes(summary, history)),
        headline=list(_headline(summary)),
        sections=sections_of(summary) if summary else (),
        partition=partition_chart(run_dir),
        charts=charts_of(history),
        reasons=[
            (kind.value, printable(reason), count)
            for (kind, reason), count in history.reasons.most_common(_MOST_REASONS_SHOWN)
        ],
        config=_read_text(run_dir / "config.yaml"),
    )
    path = run_dir / "report.html"
    write_atomically(path, page.encode("utf-8", errors="replace"))
    return path


def _accuracies(clients: Mapping[str, object]) -> dict[str, float]:
    """Return client -> accuracy from the content of ``clients.json``."""
    accuracies = {}
    for client, metrics in clients.items():
        value = metrics.get("accuracy") if isinstance(metrics, Mapping) else None
        if isinstance(value, int | float):
            accuracies[client] = float(value)
    return accuracies


def _read_json(path: Path) -> Mapping[str, object]:
    """Return the object in a JSON file; empty if the run did not get so far as to write it."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}): restore it or remove it") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} is not a JSON object: restore it or remove it")
    return content


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _title(summary: Mapping[str, object]) -> str:
    if not summary:
        return "Unfinished run"
    return f"{printable(summary.get('task', '?'))} with {printable(summary.get('strategy', '?'))}"


def _facts(summary: Mapping[str, object], history: RunHistory) -> Iterator[tuple[str, str]]:
    """Yield the (label, value) pairs of the headline."""
    names = {
        "engine": "engine",
        "rounds": "rounds",
        "clients": "clients",
        "cohort_size": "cohort",
        "seed": "seed",
        "model_hash": "model",
        "config_hash": "config",
    }
    if not summary:
        yield "rounds", str(len(history.rounds))
    for key, label in names.items():
        if key in summary:
            yield label, printable(summary[key])


def _notes(summary: Mapping[str, object], history: RunHistory) -> Iterator[str]:
    """Yield what a reader must know before reading the figures."""
    if not summary:
        yield (
            "This run has no summary.json: it is still going on or was cut short. "
            "What follows is what it has recorded so far."
        )
    if history.not_applied:
        yield (
            f"{history.not_applied} of {len(history.rounds)} rounds kept the old model, because "
            "too few updates came back."
        )


def _headline(summary: Mapping[str, object]) -> Iterator[tuple[str, str, str]]:
    """Yield (label, value, small print) of the figures to see first."""
    if not summary:
        return
    metrics, fairness = group(summary, "metrics"), group(summary, "fairness")
    communication, times = group(summary, "communication"), group(summary, "time_s")
    accuracy, worst = number(metrics, "accuracy"), number(fairness, "accuracy_min")
    if accuracy is not None:
        yield "Accuracy", human_number(accuracy), "global model, held-out"
    yield "Loss", human_number(number(metrics, "loss")), "global model, held-out"
    if worst is not None:
        yield "Worst client", human_number(worst), "accuracy, own held-out part"
    privacy = group(summary, "privacy")
    epsilon, _, delta = epsilon_text(privacy).partition(" at ")
    unit = printable(privacy.get("unit", "none"))
    small = f"{unit} level\n{delta}" if delta else f"{unit} level" if unit != "none" else ""
    yield "Privacy loss ε", epsilon, small
    yield "Sent to server", human_bytes(number(communication, "uplink_bytes")), "all clients"
    per_round = human_seconds(number(times, "per_round"))
    yield "Time", human_seconds(number(times, "total")), f"{per_round} a round"
