"""The data owner's policy: a file at the site, which no setting of the server can raise.

```yaml
# policy.yaml; chmod 600
version: 1
data_set: ward-7-ecg        # names the account in the ledger
unit: record                # whose presence is hidden: record, client, none of both, or any
epsilon: 3.0                # all rounds of all runs together may cost this much ...
delta: 1e-5                 # ... at this delta, below one over the number of records
ledger: ledger.jsonl        # beside this file, or an absolute path; unit: none takes no such three
# What follows may be left out; these are the defaults, but for `tasks`, `data` and `records`.
consent: true               # false: the site answers nothing but that it does not take part
hours: "00:00-24:00"        # when it takes part, by this machine's clock; "20:00-06:00" is nights
tasks: [ecg]                # tasks that may use the records; empty or left out: any
data: records.csv           # the records, beside this file or elsewhere; left out: the task's own
task: {}                    # what they mean; for task=table {target: sick, inputs: 30, classes: 2}
test_fraction: 0.2          # share of them kept for measuring; the same records in every run
validation_fraction: 0.0    # share kept for early stopping
code: []                    # modules whose own classes a configuration may name, as ward7.tasks
accountant: rdp             # or pld or prv, for one fixed mechanism
least_noise_multiplier: 0.0 # noise below which nothing is trained, whatever the budget
share_budget: false         # whether the server may see how the budget stands
trust_server: false         # whether privacy=client will do, where the server adds the noise
public: []                  # of a reply: num_examples, label_counts, metrics, evaluation
records: 4000               # how many training records there are, or their fingerprint
clock_tolerance_s: 300      # how far the clock may have gone back since the last charge
```
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import time
from pathlib import Path
from typing import Self

from fl_app.privacy.accounting import Accountant, accountant_named
from fl_app.privacy.ledger import CLOCK_TOLERANCE_S, Ledger
from fl_app.privacy.release import PublicField
from fl_app.types import ConfigError, Examples, PrivacyUnit

VERSION = 1
_HOURS = re.compile(r"([01]\d|2[0-4]):([0-5]\d)-([01]\d|2[0-4]):([0-5]\d)")
_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Terms:
    """On what terms records may be trained on.

    Attributes:
        data_set: Which records; with a client it names the account.
        delta: Delta at which spending is counted, in (0, 1), whatever a request says.
        epsilon: Limit on all that an account ever pays, > 0, or None to count only.
        unit: Whose presence must be hidden; None allows any, and training without privacy.
        tasks: Tasks that may use the records; empty for any.
        least_noise_multiplier: Events with less noise are declined.
        trust_server: Whether ``privacy=client`` will do, where the server is the one to add the
            noise and to keep the account.
        share_budget: Whether refusals, which the server reads, say how the budget stands.
    """

    data_set: str
    delta: float
    epsilon: float | None = None
    unit: PrivacyUnit | None = None
    tasks: tuple[str, ...] = ()
    least_noise_multiplier: float = 0.0
    share_budget: bool = True
    trust_server: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.delta < 1:
            raise ConfigError(f"delta={self.delta} must lie between 0 and 1, such as 1e-5.")
        if self.epsilon is not None and not 0 < self.epsilon < math.inf:
            raise ConfigError(f"epsilon={self.epsilon} must be > 0 and finite, such as 3.0.")
        if not 0 <= self.least_noise_multiplier < math.inf:
            raise ConfigError(
                f"least_noise_multiplier={self.least_noise_multiplier} must be >= 0 and finite."
            )


@dataclass(frozen=True)
class Hours:
    """A part of every day, from ``start`` until before ``end``, in minutes since midnight.

    It goes over midnight where ``end`` is not the later one.
    """

    start: int
    end: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the hours that a text such as ``20:00-06:00`` means. Raises `ConfigError`."""
        match = _HOURS.fullmatch(text)
        numbers = [int(number) for number in match.groups()] if match else [25, 0, 25, 0]
        start, end = 60 * numbers[0] + numbers[1], 60 * numbers[2] + numbers[3]
        if max(start, end) > 24 * 60 or start == end:
            raise ConfigError(f'hours={text} must be two different times, such as "20:00-06:00".')
        return cls(start, end)

    def __contains__(self, moment: time) -> bool:
        now = 60 * moment.hour + moment.minute
        if self.start < self.end:
            return self.start <= now < self.end
        return now >= self.start or now < self.end

    def __str__(self) -> str:
        return "-".join(
            f"{minute // 60:02d}:{minute % 60:02d}" for minute in (self.start, self.end)
        )


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a policy file says; the example in this module's head explains the keys.

    Attributes:
        unit: None for any, training without privacy included.
        ledger: Absolute path; with epsilon and delta None where ``unit`` is none.
        data: Absolute path of the records, or None for those that the task brings.
        task: Keys of the task that are the owner's to say, whatever a server says.
        records: Number of training records, a `fingerprint` of them, or None.
    """

    version: int
    data_set: str
    unit: PrivacyUnit | None
    epsilon: float | None = None
    delta: float | None = None
    ledger: Path | None = None
    consent: bool = True
    hours: Hours = field(default_factory=lambda: Hours(0, 24 * 60))
    data: Path | None = None
    task: Mapping[str, str | int | float | bool] = field(default_factory=dict, hash=False)
    test_fraction: float = 0.2
    validation_fraction: float = 0.0
    code: tuple[str, ...] = ()
    accountant: str = "rdp"
    tasks: tuple[str, ...] = ()
    least_noise_multiplier: float = 0.0
    share_budget: bool = False
    trust_server: bool = False
    public: frozenset[PublicField] = field(default_factory=frozenset)
    records: int | str | None = None
    clock_tolerance_s: float = CLOCK_TOLERANCE_S

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ConfigError(f"version={self.version} is not known here: this is version 1.")
        if not self.data_set:
            raise ConfigError("data_set= is empty: name the records, as in data_set: ward-7-ecg.")
        for key in ("epsilon", "delta", "ledger"):
            given, hides = getattr(self, key) is not None, self.unit is not PrivacyUnit.NONE
            if given and not hides:
                raise ConfigError(
                    f"{key}={getattr(self, key)} has no meaning with unit=none, which hides "
                    f"nobody: leave it out, or choose unit: record or client."
                )
            if hides and not given:
                raise ConfigError(f"{key} is missing: unit={self.unit or 'any'} is counted by it.")
        shares = self.test_fraction, self.validation_fraction
        if not (min(shares) >= 0 and sum(shares) < 1):
            raise ConfigError(
                f"test_fraction={shares[0]} and validation_fraction={shares[1]} must be >= 0 and "
                "add up to less than 1: nothing is left to train on."
            )
        if not 0 <= self.clock_tolerance_s < math.inf:
            raise ConfigError(f"clock_tolerance_s={self.clock_tolerance_s} must be >= 0 seconds.")
        if isinstance(self.records, str) and not _FINGERPRINT.fullmatch(self.records):
            raise ConfigError(
                f"records={self.records} must be a number, or sha256: and 64 digits from 0 to f."
            )
        if isinstance(self.records, int) and self.records < 1:
            raise ConfigError(f"records={self.records} must be >= 1.")
        accountant_named(self.accountant)
        if self.unit is not PrivacyUnit.NONE:
            _ = self.terms

    @property
    def terms(self) -> Terms:
        """The part that decides about requests, of a policy that hides somebody."""
        if self.delta is None:
            raise ConfigError("unit=none hides nobody: such a policy has no budget.")
        return Terms(
            data_set=self.data_set,
            delta=self.delta,
            epsilon=self.epsilon,
            unit=self.unit,
            tasks=self.tasks,
            least_noise_multiplier=self.least_noise_multiplier,
            share_budget=self.share_budget,
            trust_server=self.trust_server,
        )

    def open_ledger(self) -> Ledger:
        """Return the ledger that the policy names, which may not exist yet.

        Raises:
            ConfigError: It names none.
        """
        if self.ledger is None:
            raise ConfigError("unit=none hides nobody: such a policy has no ledger.")
        return Ledger(self.ledger, clock_tolerance_s=self.clock_tolerance_s)

    def make_accountant(self) -> Accountant:
        """Return the accountant that the policy names."""
        return accountant_named(self.accountant)

    def objection(self, *, now: time) -> str | None:
        """Return why the site takes no part now, whatever it is asked, or None."""
        if not self.consent:
            return "consent=false: the owner of these records does not take part."
        if now not in self.hours:
            return f"hours={self.hours}: the owner of these records takes no part at this time."
        return None

    def check_task(self, task: str) -> None:
        """Refuse a task that may not use the records. Raises `ConfigError`."""
        if self.tasks and task not in self.tasks:
            raise ConfigError(
                f"tasks={','.join(self.tasks)} does not hold {task}: its owner has to add it."
            )

    def check_records(self, train: Examples) -> None:
        """Refuse training records other than those that the policy was written for.

        Raises:
            ConfigError: Their number or fingerprint is another one.
        """
        if self.records is None:
            return
        found = len(train) if isinstance(self.records, int) else fingerprint(train)
        if found != self.records:
            raise ConfigError(
                f"records={self.records} in the policy of {self.data_set}, but the training part "
                f"has {found}: a budget belongs to its records. For other records write a policy "
                "with a data_set of its own; if these are the same, correct the entry."
            )


def fingerprint(train: Examples) -> str:
    """Return ``sha256:`` and a hash of the records: their order, types and every value count."""
    digest = hashlib.sha256()
    for tensor in (train.inputs, train.targets):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
