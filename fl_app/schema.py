"""Checking a configuration against the signatures of the components it names.

A component's YAML names its class by ``_target_``, and the class's own signature is the schema: a
mistyped key, a missing one or a value of a wrong type fails before anything is built, with the
full key named. This holds for components of users just as for ours.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import types
import typing
from collections.abc import Sequence
from typing import Any

from hydra.utils import get_object
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fl_app.run_config import closest
from fl_app.types import ConfigError

_SCALARS = (bool, int, float, str)


def check(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with every component's keys checked and its values converted.

    Raises:
        ConfigError: A target cannot be imported, a key is unknown or missing, or a value has the
            wrong type.
    """
    return {key: _check_node(node, key) for key, node in config.items()}


def _check_node(node: Any, key: str) -> Any:
    if isinstance(node, list):
        return [_check_node(item, f"{key}[{index}]") for index, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    checked = {name: _check_node(value, f"{key}.{name}") for name, value in node.items()}
    if "_target_" not in node:
        return checked
    target = _locate(node["_target_"], key)
    keys = [name for name in node if name not in ("_target_", "_partial_", "_args_")]
    _check_keys(target, keys, key, partial=bool(node.get("_partial_")))
    checked |= _convert(target, {name: checked[name] for name in keys}, key)
    return checked


def _locate(path: Any, key: str) -> Any:
    noisy = logging.getLogger("hydra.utils")  # it logs what the message below says
    noisy.disabled = True
    try:
        return get_object(str(path))
    except Exception as error:  # an import runs code that may raise anything
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise ConfigError(
            f"{key}._target_={path} cannot be imported ({reason}): check the spelling, and that "
            "the package is installed or on PYTHONPATH."
        ) from error
    finally:
        noisy.disabled = False


def _check_keys(target: Any, keys: list[str], key: str, *, partial: bool) -> None:
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return
    named = [p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    known = [p.name for p in named]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for name in keys:
            if name not in known:
                raise ConfigError(
                    f"{key}.{name} is not a key of {target.__name__}{closest(name, known)}. "
                    f"Its keys: {', '.join(known)}."
                )
    missing = [p.name for p in named if p.default is p.empty and p.name not in keys]
    if missing and not partial:
        raise ConfigError(f"{key}.{missing[0]} is missing: {target.__name__} needs a value for it.")


def _convert(target: Any, values: dict[str, Any], key: str) -> dict[str, Any]:
    """Return values converted to the types that a target annotates, where those are plain."""
    hints = _hints(target)
    plain = {name: hints[name] for name in values if _is_plain(hints.get(name))}
    fields = [(name, _as_omegaconf(hint), dataclasses.field()) for name, hint in plain.items()]
    schema = OmegaConf.structured(dataclasses.make_dataclass(target.__name__, fields))
    for name in plain:
        try:
            schema[name] = values[name]
        except OmegaConfBaseException as error:
            expected = str(plain[name]).replace("<class '", "").replace("'>", "")
            raise ConfigError(
                f"{key}.{name}={values[name]!r} must be of type "
                f"{expected.replace('collections.abc.', '')}."
            ) from error
    return typing.cast(dict[str, Any], OmegaConf.to_container(schema))


def _hints(target: Any) -> dict[str, Any]:
    """Return the types of a target's keys; none if it does not tell them."""
    is_fields = dataclasses.is_dataclass(target) or not isinstance(target, type)
    try:
        return typing.get_type_hints(target if is_fields else target.__init__)
    except Exception:  # an annotation is code that may raise anything, such as a missing name
        return {}


def _is_plain(hint: Any) -> bool:
    """Return whether a type hint is a scalar, an optional one, or a sequence of one."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        rest = [a for a in arguments if a is not type(None)]
        return len(rest) == 1 and _is_plain(rest[0])
    if origin in (list, tuple, Sequence):
        return arguments[0] in _SCALARS and (len(arguments) == 1 or arguments[1] is Ellipsis)
    return hint in _SCALARS


def _as_omegaconf(hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        rest = next(a for a in arguments if a is not type(None))
        return typing.Optional[_as_omegaconf(rest)]  # noqa: UP007, UP045  # built at run time
    return list[arguments[0]] if origin in (list, tuple, Sequence) else hint  # type: ignore[valid-type]
