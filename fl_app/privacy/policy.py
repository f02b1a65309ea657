"""The data owner's policy: a file at the site, which no setting of the server can raise.

```yaml
# policy.yaml; chmod 600
version: 1
data_set: ward-7-ecg        # names the account in the ledger
epsilon: 3.0                # all rounds of all runs together may cost this much ...
delta: 1e-5                 # ... at this delta, below one over the number of records
unit: record                # whose presence is hidden: record or client
ledger: ledger.jsonl        # beside this file, or an absolute path
# What follows may be left out; these are the defaults, but for `tasks` and `records`.
accountant: rdp             # or pld or prv, for one fixed mechanism
tasks: [ecg]                # tasks that may use the records; empty or left out: any
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
import stat
from collections.abc import Hashable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from fl_app.privacy.accounting import Accountant, accountant_named
from fl_app.privacy.ledger import CLOCK_TOLERANCE_S, Ledger
from fl_app.privacy.ledger_file import OTHERS_WRITE
from fl_app.privacy.release import PublicField
from fl_app.run_config import closest
from fl_app.types import ConfigError, Examples, PrivacyUnit

VERSION = 1
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


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a policy file says; the example in this module's head explains the keys.

    Attributes:
        ledger: Absolute path.
        records: Number of training records, a `fingerprint` of them, or None.
    """

    version: int
    data_set: str
    epsilon: float
    delta: float
    unit: PrivacyUnit
    ledger: Path
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
        if self.unit is PrivacyUnit.NONE:
            raise ConfigError(
                "unit=none hides nobody: choose record or client, or train without a policy."
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
        _ = self.terms

    @property
    def terms(self) -> Terms:
        """The part that decides about requests."""
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
        """Return the ledger that the policy names, which may not exist yet."""
        return Ledger(self.ledger, clock_tolerance_s=self.clock_tolerance_s)

    def make_accountant(self) -> Accountant:
        """Return the accountant that the policy names."""
        return accountant_named(self.accountant)

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


def read_policy(path: Path, *, data_set: str | None = None, task: str | None = None) -> Policy:
    """Return the policy in a file.

    Args:
        path: The file. Nobody but its owner may write it or any folder above it, but for folders
            such as /tmp in which everybody can replace his own files only.
        data_set: What the site trains on, or None if that is not known yet.
        task: The task it trains for, or None.

    Raises:
        ConfigError: It is missing, not readable, not a policy, open to others, or written for
            another data set or task.
    """
    try:
        _check_access(path)
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(
            f"policy={path} cannot be read ({error.strerror}): name a policy file that this user "
            "may read."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"policy={path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        policy = Policy(**_checked(content, folder=path.absolute().parent))
        if data_set is not None and data_set != policy.data_set:
            raise ConfigError(
                f"data_set={policy.data_set} is not {data_set}, which is to be trained on: name "
                "the policy of that data set."
            )
        if task is not None and policy.tasks and task not in policy.tasks:
            raise ConfigError(
                f"tasks={','.join(policy.tasks)} does not hold {task}: its owner has to add it."
            )
    except ConfigError as error:
        raise ConfigError(f"policy={path}: {error}") from error
    return policy


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML ships no types
    """Safe YAML in which 1e-5 is a number and a key stands once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.YAMLError(f"{', '.join(twice)} stands there more than once")
        content: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return content


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


def _checked(content: Any, *, folder: Path) -> dict[str, Any]:
    """Return the arguments of `Policy` in what a file holds."""
    if not isinstance(content, Mapping):
        raise ConfigError("it holds no keys: it must begin with version: 1.")
    known = {field.name: field for field in fields(Policy)}
    # First, since a newer version may have other keys.
    if "version" in content and content["version"] != VERSION:
        raise ConfigError(f"version={content['version']} is not known here: this is version 1.")
    for key in content:
        if key not in known:
            hint = closest(str(key), list(known)) or f": the keys are {', '.join(known)}."
            raise ConfigError(f"{key} is not a key of a policy{hint}")
    for name, spec in known.items():
        required = spec.default is MISSING and spec.default_factory is MISSING
        if required and name not in content:
            raise ConfigError(f"{name} is missing: a policy says version, {_required(known)}.")
    return {name: _value(name, value, folder) for name, value in content.items()}


def _required(known: Mapping[str, Any]) -> str:
    return ", ".join(n for n, s in known.items() if s.default is MISSING and n != "version")


def _value(name: str, value: Any, folder: Path) -> Any:
    """Return one entry as `Policy` wants it."""
    match name:
        case "epsilon" | "delta" | "least_noise_multiplier" | "clock_tolerance_s":
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
            raise ConfigError(f"{name}={value} must be a number.")
        case "version":
            return value
        case "records":
            if value is None or (isinstance(value, int | str) and not isinstance(value, bool)):
                return value
            raise ConfigError(f"{name}={value} must be a whole number or a fingerprint.")
        case "share_budget" | "trust_server":
            if isinstance(value, bool):
                return value
            raise ConfigError(f"{name}={value} must be true or false.")
        case "unit":
            return _choice(name, value, PrivacyUnit)
        case "public":
            return frozenset(_choice(name, item, PublicField) for item in _texts(name, value))
        case "tasks":
            return tuple(_texts(name, value))
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name}={value} must be text.")
    return folder / value if name == "ledger" else value


def _choice(name: str, value: Any, choices: type[StrEnum]) -> StrEnum:
    known = [str(choice) for choice in choices if choice is not PrivacyUnit.NONE]
    if value not in known:
        raise ConfigError(
            f"{name}={value} is not known{closest(str(value), known) or ':'} "
            f"choose of {', '.join(known)}."
        )
    return choices(value)


def _texts(name: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{name}={value} must be a list of names, such as [a, b].")
    return value


def _check_access(path: Path) -> None:
    """Refuse a file that somebody else could change, or put another one in the place of."""
    for start in dict.fromkeys((path.absolute(), path.resolve())):
        for place in (start, *start.parents):
            mode = place.stat().st_mode
            if stat.S_ISDIR(mode) and mode & stat.S_ISVTX:
                continue
            if mode & OTHERS_WRITE:
                raise ConfigError(
                    f"policy={path}: {place} can be written by other users, who could raise the "
                    f"budget: chmod go-w {place}"
                )
