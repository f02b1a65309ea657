"""What a site takes from the configuration that a server sends, and what it takes from nobody.

A configuration names classes and functions by ``_target_``, and gives them arguments. Sent to a
site it is a program of the server's, so it may name only what the site has installed for that:
what our own ``conf/`` names, optimizers of torch, strategies of Flower, and modules that the
owner's policy adds. Where the records lie is the policy's to say, never the server's.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from fl_app.config import from_run_config
from fl_app.privacy.base import PolicyError
from fl_app.privacy.policy import Policy
from fl_app.run_config import conf_dir, parse_overrides
from fl_app.site_protocol import Request
from fl_app.types import ConfigError

_OTHERS = re.compile(r"(torch\.optim|flwr\.serverapp\.strategy)\.[A-Z][A-Za-z]*")
_PATH = "path"


def site_config(request: Request, policy: Policy, *, name: str | None) -> dict[str, Any]:
    """Return the configuration in a request, as far as a site follows it.

    Args:
        request: What a bundle passed on.
        policy: Of the data's owner.
        name: The site's, if it has one.

    Raises:
        ConfigError: There is none, or it is not valid.
        PolicyError: It asks for code or data that are not the server's to name.
    """
    # First: what composes or checks a configuration imports what it names.
    if request.config_json:
        _check_code(_parsed(request.config_json), policy)
    else:
        _check_overrides(request.overrides)
    parts = request.node.get("num-partitions")
    run_config = {"config-json": request.config_json, "overrides": request.overrides}
    config = from_run_config(run_config, connected=parts if isinstance(parts, int) else None)
    return _with_own_records(config, policy, name=name)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError("config-json is not JSON.") from error


def _check_overrides(text: str) -> None:
    """Refuse overrides that could lead beyond the YAML files that the site has installed."""
    folders = parse_overrides(text)[1]
    for what in ("_target_", "${", "hydra", *(["--config-dir"] if folders else [])):
        if what in text:
            raise PolicyError(
                f"overrides={text:.200} has {what} in it, which a site does not follow: submit "
                "with fl-app run engine=deployment, which sends the whole configuration."
            )


def _check_code(config: Any, policy: Policy) -> None:
    """Refuse names of code that the site has not installed to be named, and interpolations."""
    for key, value in _leaves(config):
        if not isinstance(value, str):
            continue
        if "${" in value:
            raise PolicyError(f"{key}={value:.100} is not resolved: a site resolves nothing.")
        if key.rpartition(".")[2] == "_target_" and not _may_be_named(value, policy):
            raise PolicyError(
                f"{key}={value:.100} is not code that a server may name at this site: its owner "
                "can allow a module of its own by code: in the policy."
            )


def _may_be_named(target: str, policy: Policy) -> bool:
    if target in _installed() or _OTHERS.fullmatch(target):
        return True
    module, _, name = target.rpartition(".")
    if module not in policy.code:
        return False
    # What the module defines itself: what it imports, such as os, was not meant.
    named = getattr(importlib.import_module(module), name, None)
    return getattr(named, "__module__", None) == module


@functools.cache
def _installed() -> frozenset[str]:
    """Return all that the YAML files of this installation name."""
    files = (yaml.safe_load(path.read_text()) for path in conf_dir().rglob("*.yaml"))
    return frozenset(
        value
        for content in files
        for key, value in _leaves(content or {})
        if key.rpartition(".")[2] == "_target_" and isinstance(value, str)
    )


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
    config: dict[str, Any], policy: Policy, *, name: str | None
) -> dict[str, Any]:
    """Return the configuration with the site's own records in place of whatever it names.

    A task reads files where its YAML says ``path``, at any depth. All records in the site's file
    are the site's, so none is dealt to others, and none is held out for the server.
    """
    paths = [key for key, _ in _leaves(config["task"]) if key.rpartition(".")[2] == _PATH]
    if not paths and policy.data is None:
        return config
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
    task = config["task"]
    for path in paths:
        task = _with(task, path.split("."), str(policy.data))
    if "test_fraction" in task:
        task = {**task, "test_fraction": 0.0}
    own = {
        key: config["partition"].get(key, 0.0) for key in ("test_fraction", "validation_fraction")
    }
    target = "fl_app.tasks.partition.OneOwner"
    partition = {"_target_": target, "client": name or "site", **own}
    return {**config, "task": task, "partition": partition}


def _with(tree: Mapping[str, Any], path: list[str], value: str) -> dict[str, Any]:
    """Return a copy of nested mappings with another value at a path."""
    first, *rest = path
    return {**tree, first: _with(tree[first], rest, value) if rest else value}
