"""Weights & Biases: a run's config, rounds, result and final model, as a W&B run.

Only the server has trackers, so no client ever talks to W&B. No client's id is sent either:
figures of single clients go as histograms.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Literal

import numpy as np

from fl_app.tracking.json_files import JSON
from fl_app.tracking.partition_plot import partition_png, read_partition
from fl_app.tracking.rounds_file import iter_reports
from fl_app.types import ConfigError, FailureKind, RoundReport

if TYPE_CHECKING:
    import wandb

_log = logging.getLogger(__name__)

MODES = ("auto", "online", "offline", "disabled")
_MOST_BINS = 40


@dataclass(kw_only=True)
class _Session:
    """What changes while a run is tracked: the open W&B run, and the id that outlives it."""

    run: wandb.Run | None = None
    run_id: str | None = None
    restored: bool = False
    finished: bool = False


@dataclass(frozen=True, kw_only=True)
class WandbTracker:
    """A tracker that keeps a run as a W&B run, whose step is the round.

    Names are those of ``rounds.jsonl`` and ``summary.json``: "metrics/accuracy" is what a line of
    the one has under ``metrics``, and W&B's summary holds the other.

    A resumed run goes on under the id it had. Online, W&B drops rounds it has already got, so of
    those played twice it shows the first time. Offline, each resumption writes a segment of its
    own, ``wandb/offline-run-DATE-ID``; ``wandb sync`` uploads segments of one id in order of their
    start and appends each to the one before.

    Attributes:
        project: W&B project.
        entity: W&B user or team; None for the default of the account.
        group: Name under which W&B shows several runs together, or None.
        tags: Words to find the run by.
        mode: One of `MODES`. "auto" is what ``WANDB_MODE`` or ``wandb offline`` say; otherwise
            online if there is an API key, and offline if not.
        log_model: Whether the final model is kept as an artifact.
        timeout_s: Seconds > 0 for which W&B may hold up the start of a run, and its end. What has
            not been uploaded by then stays on the disk, for ``wandb sync``.
    """

    project: str = "fl-app"
    entity: str | None = None
    group: str | None = None
    tags: Sequence[str] = ()
    mode: str = "auto"
    log_model: bool = True
    timeout_s: float = 60.0
    _session: _Session = field(default_factory=_Session, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(
                f"tracking.mode={self.mode} is not known: choose one of {', '.join(MODES)}."
            )
        if not 0 < self.timeout_s < math.inf:
            raise ConfigError(f"tracking.timeout_s={self.timeout_s} must be > 0 and finite.")

    def start(self, config: Mapping[str, object], run_dir: Path) -> None:
        """Open the W&B run, or the one that was restored; its files go to ``run_dir/wandb``.

        Raises:
            Exception: Whatever W&B raises; or it is not installed, or has no key to go online.
        """
        if self.mode == "disabled":
            return
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=self.timeout_s,
            finish_timeout=self.timeout_s,
        )
        mode = self._effective_mode(settings)
        if mode == "disabled":
            return
        session = self._session
        session.run = wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group,
            tags=list(self.tags),
            name=run_dir.resolve().name,
            mode=mode,
            dir=str(run_dir),
            config=dict(config),
            id=session.run_id,
            resume="allow" if session.restored else None,
            # Of its own, so that W&B's global run, if somebody has one, is left alone.
            reinit="create_new",
            settings=settings,
        )
        session.run_id = session.run.id
        if session.run.offline:
            _log.info(
                "W&B keeps run %s on this machine. To upload it: wandb sync %s",
                session.run_id,
                run_dir / "wandb" / f"offline-run-*-{session.run_id}",
            )
        else:
            _log.info("W&B shows the run at %s", session.run.url)
        if not session.restored:
            _log_partition(session.run, run_dir)

    def on_round(self, report: RoundReport) -> None:
        """Record a round that has just ended."""
        if self._session.run is not None:
            self._session.run.log(_figures(report), step=report.round)

    def finish(self, summary: Mapping[str, object]) -> None:
        """Record the result, how often each client took part, and the final model."""
        session = self._session
        if session.run is None:
            return
        run_dir = Path(session.run.settings.root_dir)
        participation = _participation(run_dir / "rounds.jsonl", summary["clients"])
        if participation is not None:
            # Without a step: a resumed run that has no round left to play has none to offer.
            session.run.log({"participation": participation})
        session.run.summary.update(dict(summary))
        if self.log_model:
            self._keep_model(session.run, run_dir / "model.safetensors", summary)
        session.finished = True

    def state(self) -> Mapping[str, JSON]:
        """Return the id of the W&B run, if there is one."""
        return {} if self._session.run_id is None else {"run_id": self._session.run_id}

    def restore(self, state: Mapping[str, JSON]) -> None:
        """Take over the id of the W&B run to go on with."""
        if isinstance(run_id := state.get("run_id"), str):
            self._session.run_id, self._session.restored = run_id, True

    def close(self) -> None:
        """End the W&B run, as failed unless `finish` was called; waits `timeout_s` at most."""
        run, self._session.run = self._session.run, None
        if run is not None:
            run.finish(exit_code=0 if self._session.finished else 1)

    def _effective_mode(self, settings: wandb.Settings) -> Literal["online", "offline", "disabled"]:
        """Return what ``mode`` comes to on this machine.

        Raises:
            ConfigError: Online is asked for, and there is no key.
        """
        import wandb

        # First of all, so that nothing below writes to the terminal.
        own = wandb.setup(settings=settings).settings.mode
        if self.mode == "offline":
            return "offline"
        if self.mode == "auto" and own in ("offline", "dryrun", "disabled"):
            _log.info("W&B is %s, as its own settings say.", own)
            return "disabled" if own == "disabled" else "offline"
        # A question about the key alone: nothing is asked of a person, and no host is reached.
        if wandb.login(prompt=False, verify=False):
            return "online"
        if self.mode == "online":
            raise ConfigError(
                "tracking.mode=online, but W&B has no API key: run `wandb login`, set "
                "WANDB_API_KEY, or choose tracking.mode=offline."
            )
        _log.info("W&B is offline: there is no API key. `wandb login` or WANDB_API_KEY gives one.")
        return "offline"

    def _keep_model(self, run: wandb.Run, path: Path, summary: Mapping[str, object]) -> None:
        """Record the model at ``path`` as an artifact.

        A run that is resumed writes its model anew, and offline the file is read at the upload:
        so the segment keeps a copy. It is put there by us because W&B's own goes to the home.
        """
        import wandb

        copy = Path(run.settings.sync_dir) / path.name
        shutil.copyfile(path, copy)
        artifact = wandb.Artifact(
            f"model-{run.id}",
            type="model",
            metadata={key: summary[key] for key in ("model_hash", "config_hash", "rounds")},
        )
        artifact.add_file(str(copy), name=path.name, policy="immutable", skip_cache=True)
        run.log_artifact(artifact)


def _log_partition(run: wandb.Run, run_dir: Path) -> None:
    """Record how records are spread over the clients, whom neither the plot nor the counts name."""
    import wandb

    partition = read_partition(run_dir)
    if partition is None or not partition.described:
        return
    sizes = [told.num_examples for told in partition.described]
    with NamedTemporaryFile(suffix=".png") as picture:
        picture.write(partition_png(partition))
        picture.flush()
        figures = {
            "partition": wandb.Image(picture.name),
            "partition_num_examples": wandb.Histogram(sizes),
        }
        run.log(figures, step=0)  # takes a copy of the picture


def _figures(report: RoundReport) -> dict[str, object]:
    """Return what W&B keeps of a round; what the round does not have is absent."""
    import wandb

    kinds = Counter(failure.kind for failure in report.failures)
    answers: dict[str, object] = {
        **{f"failures/{kind.value}": kinds[kind] for kind in FailureKind},
        "cohort_size": len(report.cohort),
        "num_updates": report.num_updates,
    }
    figures: dict[str, object] = {
        **{f"metrics/{name}": value for name, value in report.metrics.items()},
        **{f"client_metrics/{name}": value for name, value in report.client_metrics.items()},
        **(answers if report.num_updates is not None else {}),  # else they are withheld
        "applied": int(report.applied),
        "uplink_bytes": report.uplink_bytes,
        "downlink_bytes": report.downlink_bytes,
        "uplink_uncompressed_bytes": report.uplink_uncompressed_bytes,
        "seconds": report.seconds,
    }
    if report.epsilon is not None:
        figures["epsilon"] = report.epsilon
    accuracies = [value for value in report.client_accuracy.values() if math.isfinite(value)]
    if accuracies:
        counts, edges = np.histogram(accuracies, bins=_MOST_BINS, range=(0.0, 1.0))
        figures["client_accuracy"] = wandb.Histogram(np_histogram=(counts.tolist(), edges.tolist()))
    return figures


def _participation(rounds_file: Path, num_clients: object) -> wandb.Histogram | None:
    """Return over how many rounds clients were asked, those never asked included.

    None if no round tells whom it asked, as under secret coins. Read from the run's record, which
    holds the rounds before a resumption too.
    """
    import wandb

    if not rounds_file.exists():
        return None
    asked: Counter[str] = Counter()
    for report in iter_reports(rounds_file):
        asked.update(report.cohort)
    if not asked:
        return None
    clients = max(num_clients if isinstance(num_clients, int) else 0, len(asked))
    times = [*asked.values(), *[0] * (clients - len(asked))]
    step = math.ceil((max(times) + 1) / _MOST_BINS)
    counts, edges = np.histogram(times, bins=np.arange(-0.5, max(times) + step + 0.5, step))
    return wandb.Histogram(np_histogram=(counts.tolist(), edges.tolist()))
