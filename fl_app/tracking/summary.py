"""``summary.json``: what a run came to, and the hashes that name its config and its model."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol, cast

import torch

from fl_app.config_keys import UNHASHED_KEYS
from fl_app.files import write_atomically
from fl_app.tracking.json_files import JSON, strict_json
from fl_app.types import Budget, ClientId, FailureKind, PrivacyUnit, RoundReport, StopReason


@dataclass(frozen=True, kw_only=True, slots=True)
class Fairness:
    """Accuracy of the final model across clients, each on its own held-out part.

    Attributes:
        accuracy_min: Of the worst-off client, or None if nothing was measured.
        accuracy_p10: 10th percentile over clients, interpolated linearly.
        accuracy_std: Standard deviation over clients, as of a population.
        clients: How many were measured.
    """

    accuracy_min: float | None = None
    accuracy_p10: float | None = None
    accuracy_std: float | None = None
    clients: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Privacy:
    """What was spent, composed over all rounds of the run; None where it does not apply.

    Attributes:
        unit: Whose presence is hidden.
        epsilon_max: Largest loss of any client at ``delta``; not finite means no guarantee.
        epsilon_mean: Mean over clients, at the same ``delta``.
        delta: Of the (epsilon, delta) guarantee.
        accountant: Name of the composition method.
        noise_multiplier: Noise standard deviation in units of the clipping norm.
    """

    unit: PrivacyUnit = PrivacyUnit.NONE
    epsilon_max: float | None = None
    epsilon_mean: float | None = None
    delta: float | None = None
    accountant: str | None = None
    noise_multiplier: float | None = None


class _Asked(Protocol):
    """What of ``privacy=NAME`` a summary tells."""

    @property
    def unit(self) -> PrivacyUnit: ...
    @property
    def delta(self) -> float: ...
    @property
    def accountant(self) -> str: ...
    @property
    def noise_multiplier(self) -> float | None: ...
    @property
    def randomness(self) -> str: ...


def privacy_of(asked: _Asked, budgets: Collection[Budget]) -> Privacy:
    """Return what was promised and what was spent.

    Args:
        asked: As configured.
        budgets: Of the clients that tell, over all that their ledgers hold. Figures are of them:
            others may have spent more. Delta is the largest at which one of them counts.
    """
    if asked.unit is PrivacyUnit.NONE or asked.randomness != "secret":
        return Privacy()  # noise that anybody can repeat hides nothing
    spent = [budget.epsilon_spent for budget in budgets]
    return Privacy(
        unit=asked.unit,
        epsilon_max=max(spent, default=None),
        epsilon_mean=statistics.fmean(spent) if spent else None,
        delta=max((budget.delta for budget in budgets), default=asked.delta),
        accountant=asked.accountant,
        noise_multiplier=asked.noise_multiplier,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Communication:
    """Model bytes moved in the whole run, clients to server (up) and back (down)."""

    uplink_bytes: int = 0
    downlink_bytes: int = 0
    uplink_uncompressed_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Failures:
    """How often a client that was asked brought nothing; one that failed twice counts twice.

    None where client-level privacy withholds it.

    Attributes:
        clients: Offline, too late, or in error.
        rejected_updates: Answered, with an update the server refused.
    """

    clients: int | None = 0
    rejected_updates: int | None = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """Wall-clock seconds.

    Attributes:
        setup: From the start of the command to the start of the first round.
        total: From the start of the command to the last measurement, and before a resume.
        per_round: Median over rounds, or None without a round.
    """

    setup: float
    total: float
    per_round: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The content of ``summary.json``; field names are its keys.

    Attributes:
        task, engine, strategy: Names of the config choices.
        seed: Seed of the run.
        rounds: Rounds done, those before a resumption included.
        clients: Clients there are; ``cohort_size`` of them are asked in a round.
        config_hash: See `config_hash`.
        model_hash: See `fl_app.params.model_hash`; of the final global model.
        metrics: Final global model on held-out records.
        time_s: Wall-clock seconds; the one entry that a rerun does not repeat.
        training: "cohort" if the clients of the last round were trained side by side, else "one by
            one"; None if no round was played.
        stopped_by: Why the run ended.
        resumed_from_round: Last round of the checkpoint it was resumed from, or None.
    """

    task: str
    engine: str
    strategy: str
    seed: int
    rounds: int
    clients: int
    cohort_size: int
    config_hash: str
    model_hash: str
    metrics: Mapping[str, float]
    time_s: Times
    fairness: Fairness = field(default_factory=Fairness)
    privacy: Privacy = field(default_factory=Privacy)
    communication: Communication = field(default_factory=Communication)
    failures: Failures = field(default_factory=Failures)
    training: str | None = None
    stopped_by: StopReason = StopReason.ROUNDS
    resumed_from_round: int | None = None

    def to_json(self) -> dict[str, JSON]:
        """Return the object to be written; NaN and inf become None."""
        return dict(cast("Mapping[str, JSON]", strict_json(asdict(self))))


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """What the rounds of a run add up to; ``median_round_s`` is None without a round."""

    rounds: int
    communication: Communication
    failures: Failures
    median_round_s: float | None


def totals_of(reports: Iterable[RoundReport]) -> Totals:
    """Return the sums over ``reports``, which are read once and not kept.

    Given `iter_reports` of a run's file, a resumed run counts its earlier rounds too.
    """
    uplink = downlink = uncompressed = failed = rejected = 0
    withheld = False
    seconds: list[float] = []
    for report in reports:
        withheld = withheld or report.num_updates is None
        uplink += report.uplink_bytes
        downlink += report.downlink_bytes
        uncompressed += report.uplink_uncompressed_bytes
        refused = sum(failure.kind is FailureKind.REJECTED for failure in report.failures)
        rejected += refused
        failed += len(report.failures) - refused
        seconds.append(report.seconds)
    return Totals(
        rounds=len(seconds),
        communication=Communication(
            uplink_bytes=uplink, downlink_bytes=downlink, uplink_uncompressed_bytes=uncompressed
        ),
        failures=Failures(
            clients=None if withheld else failed, rejected_updates=None if withheld else rejected
        ),
        median_round_s=statistics.median(seconds) if seconds else None,
    )


def fairness_of(accuracies: Mapping[ClientId, float]) -> Fairness:
    """Return how accuracy spreads over clients; one that is not finite counts as unmeasured.

    Args:
        accuracies: Client -> accuracy in [0, 1] of the final model on its own held-out part.
    """
    measured = torch.tensor(
        [value for value in accuracies.values() if math.isfinite(value)], dtype=torch.float64
    )
    if not len(measured):
        return Fairness()
    return Fairness(
        accuracy_min=float(measured.min()),
        accuracy_p10=float(measured.quantile(0.1)),
        accuracy_std=float(measured.std(correction=0)),
        clients=len(measured),
    )


def config_hash(config: Mapping[str, object]) -> str:
    """Return the SHA-256 of ``config`` as canonical JSON, without `UNHASHED_KEYS`.

    The order of keys does not matter; 1 and 1.0 differ, and so do None, NaN and inf.
    """
    plain = strict_json(_without(config, UNHASHED_KEYS), keep_non_finite=True)
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def write_json_atomically(path: Path, content: Mapping[str, object]) -> None:
    """Put ``content`` at ``path`` as indented strict JSON; a crash leaves the old file or this."""
    text = json.dumps(strict_json(content), indent=2, allow_nan=False)
    write_atomically(path, text.encode("ascii") + b"\n")


def _without(config: Mapping[str, object], keys: Iterable[str]) -> dict[str, object]:
    """Return ``config`` without ``keys``, in which a dot leads into a nested mapping."""
    kept = dict(config)
    for key in keys:
        head, _, rest = key.partition(".")
        if not rest:
            kept.pop(head, None)
        elif isinstance(inner := kept.get(head), Mapping):
            kept[head] = _without(inner, [rest])
    return kept
