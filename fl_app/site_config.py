"""What a site takes from the configuration that a server sends, and what it takes from nobody.

A configuration names classes and functions by ``_target_``, and gives them arguments. Sent to a
site it is a program of the server's, so it may name only what the site has installed for that, in
the place that it is for: what our own ``conf/`` names there, optimizers of torch, strategies of
Flower, and for the task the modules that the owner's policy adds. Nothing is imported, composed or
made before that is sure. Which records there are, what their columns mean and how they are split
is the owner's to say: a server that chose them could ask for one person's at a time.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from fl_app.config import from_run_config
from fl_app.privacy.base import PolicyError
from fl_app.privacy.policy import Policy
from fl_app.run_config import conf_dir
from fl_app.types import ConfigError

_PATH, _TARGET = "path", "_target_"
_OPTIMIZER = re.compile(r"torch\.optim\.[A-Z][A-Za-z]*")
_STRATEGY = re.compile(r"flwr\.serverapp\.strategy\.[A-Z][A-Za-z]*")
_GLOBAL = ("config", "experiment")


class RefusedRequestError(PolicyError):
    """A configuration asks for what is not a server's to name. Quotes nothing but the server."""


def site_config(
    config_json: str, policy: Policy, *, name: str | None, version: str
) -> dict[str, Any]:
    """Return the configuration that a server sent, as far as a site follows it.

    Args:
        config_json: What it sent.
        policy: Of the data's owner.
        name: The client's, if it has one; with records of its own it has.
        version: Of these records; see `version_of`.

    Raises:
        ConfigError: There is none, or it is not valid.
        RefusedRequestError: It names code that is not the server's to name.
        PolicyError: It asks for other records than the owner's.
    """
    config = _parsed(config_json)
    # Of no use to a client, and so nothing to be made of it.
    config |= {"engine": {_TARGET: "fl_app.engines.local.LocalEngine"}, "tracking": None}
    _check_code(config, policy)
    checked = from_run_config({"config-json": json.dumps(config)})
    return _with_own_records(checked, policy, name=name, version=version)


def _parsed(text: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError("config-json is not JSON.") from error
    if not isinstance(config, dict):
        raise ConfigError("config-json is no JSON object.")
    return config


def _check_code(config: Mapping[str, Any], policy: Policy) -> None:
    """Refuse names of code that the site has not installed to be named, and interpolations."""
    for key, value in _leaves(config):
        last = key.rpartition(".")[2]
        if "_args_" in key:
            raise RefusedRequestError(f"{key[:100]!r} gives arguments without names.")
        if isinstance(value, str) and "${" in value:
            raise RefusedRequestError(f"{key[:100]}={value[:100]!r}: a site resolves nothing.")
        if last == _TARGET and not (isinstance(value, str) and _may_be_named(key, value, policy)):
            raise RefusedRequestError(
                f"{key[:100]}={str(value)[:100]!r} is not code that a server may name there: the "
                "owner of the site can allow a task's module of its own by code: in the policy."
            )


def _may_be_named(key: str, target: str, policy: Policy) -> bool:
    group = key.partition(".")[0]
    if target in _installed().get(group, ()):
        return True
    if key.endswith(f"optimizer.{_TARGET}") and _OPTIMIZER.fullmatch(target):
        return True
    if key == f"strategy.{_TARGET}" and _STRATEGY.fullmatch(target):
        return True
    module, _, name = target.rpartition(".")
    if group != "task" or module not in policy.code:
        return False
    # What the module defines itself: what it imports, such as os, was not meant.
    named = getattr(importlib.import_module(module), name, None)
    return getattr(named, "__module__", None) == module


@functools.cache
def _installed() -> Mapping[str, frozenset[str]]:
    """Return what the YAML files of this installation name, by the key at the top."""
    named: dict[str, set[str]] = {}
    for path in conf_dir().rglob("*.yaml"):
        place = path.relative_to(conf_dir()).with_suffix("").parts[0]
        for key, value in _leaves(yaml.safe_load(path.read_text()) or {}):
            if key.rpartition(".")[2] == _TARGET and isinstance(value, str):
                group = key.partition(".")[0] if place in _GLOBAL else place
                named.setdefault(group, set()).add(value)
    return {group: frozenset(targets) for group, targets in named.items()}


def _leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of all that nested mappings and lists hold."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list | tuple):
        for position, value in enumerate(tree):
            yield from _leaves(value, f"{key}.{position}")
    else:
        yield key, tree


def _with_own_records(
    config: dict[str, Any], policy: Policy, *, name: str | None, version: str
) -> dict[str, Any]:
    """Return the configuration with the site's own records in place of whatever it names.

    A task reads files where its YAML says ``path``, at any depth. All records in the site's file
    are the site's, so none is dealt to others, and none is held out for the server.
    """
    task = {**config["task"], **policy.task}
    paths = [key for key, _ in _leaves(task) if key.rpartition(".")[2] == _PATH]
    if not paths and policy.data is None:
        return {**config, "task": task}
    if not paths:
        raise PolicyError(
            f"data={policy.data} cannot be what this task trains on: it brings records of its own. "
            "Its owner may choose tasks by tasks: in the policy, or leave data out for this one."
        )
    if policy.data is None:
        raise PolicyError(
            f"task.{paths[0]} names a file, and which one is the site's to say: its owner has to "
            "add data: PATH to the policy."
        )
    for path in paths:
        task = _with(task, path.split("."), str(policy.data))
    _check_meaning(task, policy)
    if "test_fraction" in task:
        task = {**task, "test_fraction": 0.0}
    partition = {
        _TARGET: "fl_app.tasks.partition.OneOwner",
        "client": name,
        "test_fraction": policy.test_fraction,
        "validation_fraction": policy.validation_fraction,
        "version": version,
    }
    return {**config, "task": task, "partition": partition}


def _check_meaning(task: Mapping[str, Any], policy: Policy) -> None:
    """Refuse to let a server say what the columns of the site's file mean.

    Whether a table has a column, or a class number below some other, is told by whether the table
    can be read: column by column and number by number a server could ask for single records.
    """
    module, _, name = str(task[_TARGET]).rpartition(".")
    own = getattr(getattr(importlib.import_module(module), name), "SITE_KEYS", ())
    if missing := [key for key in own if key not in policy.task]:
        keys = ", ".join(f"{key}: ..." for key in missing)
        raise PolicyError(
            f"task.{missing[0]} says what the records of data={policy.data} mean, which is the "
            f"site's to say: its owner has to add task: {{{keys}}} to the policy."
        )


def version_of(data: Path) -> str:
    """Return a text that is another one once the records may be others."""
    files = [data, *sorted(data.rglob("*"))] if data.is_dir() else [data]
    try:
        stats = [path.stat() for path in files]
    except OSError as error:
        raise PolicyError(
            f"data={data} of the policy cannot be read ({error.strerror})."
        ) from error
    return str(hash(tuple((s.st_mtime_ns, s.st_size, s.st_ino) for s in stats)))


def _with(tree: Mapping[str, Any], path: list[str], value: str) -> dict[str, Any]:
    """Return a copy of nested mappings with another value at a path."""
    first, *rest = path
    return {**tree, first: _with(tree[first], rest, value) if rest else value}
