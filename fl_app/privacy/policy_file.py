"""Reads the policy of a data owner, `fl_app.privacy.policy`, from its file."""

from __future__ import annotations

import re
import stat
from collections.abc import Hashable, Mapping
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from fl_app.privacy.ledger_file import OTHERS_WRITE
from fl_app.privacy.policy import VERSION, Hours, Policy
from fl_app.privacy.release import PublicField
from fl_app.run_config import closest
from fl_app.types import ConfigError, PrivacyUnit


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
        if task is not None:
            policy.check_task(task)
    except ConfigError as error:
        raise ConfigError(f"policy={path}: {error}") from error
    return policy


_ANY = "any"


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
    hides = content.get("unit") != PrivacyUnit.NONE
    required = ["version", "data_set", "unit", *(["epsilon", "delta", "ledger"] if hides else [])]
    for name in required:
        if name not in content:
            raise ConfigError(f"{name} is missing: a policy says {', '.join(required)}.")
    return {name: _value(name, value, folder) for name, value in content.items()}


def _value(name: str, value: Any, folder: Path) -> Any:
    """Return one entry as `Policy` wants it."""
    match name:
        case "task":
            plain = (str, int, float, bool)
            if isinstance(value, Mapping) and all(isinstance(v, plain) for v in value.values()):
                return {str(key): entry for key, entry in value.items()}
            raise ConfigError(f"{name}={value} must be keys with one value each.")
        case (
            "epsilon"
            | "delta"
            | "least_noise_multiplier"
            | "clock_tolerance_s"
            | "test_fraction"
            | "validation_fraction"
        ):
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
            raise ConfigError(f"{name}={value} must be a number.")
        case "version":
            return value
        case "records":
            if value is None or (isinstance(value, int | str) and not isinstance(value, bool)):
                return value
            raise ConfigError(f"{name}={value} must be a whole number or a fingerprint.")
        case "share_budget" | "trust_server" | "consent":
            if isinstance(value, bool):
                return value
            raise ConfigError(f"{name}={value} must be true or false.")
        case "unit":
            return None if value == _ANY else _choice(name, value, PrivacyUnit, _ANY)
        case "public":
            return frozenset(_choice(name, item, PublicField) for item in _texts(name, value))
        case "tasks" | "code":
            return tuple(_texts(name, value))
        case "hours":
            return Hours.parse(str(value))
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name}={value} must be text.")
    return folder / value if name in ("ledger", "data") else value


def _choice(name: str, value: Any, choices: type[StrEnum], *others: str) -> StrEnum:
    known = [*map(str, choices), *others]
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
