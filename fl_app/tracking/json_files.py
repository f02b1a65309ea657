"""Strict JSON values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import Enum
from numbers import Integral, Real
from pathlib import PurePath
from typing import TypeAlias

JSON: TypeAlias = "None | bool | int | float | str | Sequence[JSON] | Mapping[str, JSON]"
"""What a JSON file can hold, read-only."""


def strict_json(value: object, *, keep_non_finite: bool = False) -> JSON:
    """Return ``value`` in JSON's own types: enums by value, paths as text, NaN and inf as None.

    Args:
        value: Any nesting of mappings, sequences and scalars (numpy's included).
        keep_non_finite: Leave NaN and inf as they are; strict JSON has no word for them.

    Raises:
        TypeError: Something in ``value`` has no counterpart in JSON.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return strict_json(value.value, keep_non_finite=keep_non_finite)
    if isinstance(value, str | PurePath):
        return str(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        return number if keep_non_finite or math.isfinite(number) else None
    if isinstance(value, Mapping):
        return {
            str(key): strict_json(item, keep_non_finite=keep_non_finite)
            for key, item in value.items()
        }
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [strict_json(item, keep_non_finite=keep_non_finite) for item in value]
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: {value!r}")
