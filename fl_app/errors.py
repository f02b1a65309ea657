"""Errors whose message is meant for the person who runs the command. Imports nothing."""

from __future__ import annotations


class FlAppError(Exception):
    """Base of the errors whose message is meant for the person who runs the command."""


class ConfigError(FlAppError, ValueError):
    """A configuration or an input that cannot be run. Ends a command with exit code 2.

    The message names the key, the value, the rule and the way out.
    """


class InterruptedRunError(FlAppError):
    """Somebody pressed Ctrl-C."""


class EmptyCohortError(FlAppError):
    """No client at all could be asked to take part in a round."""


class TooFewUpdatesError(FlAppError):
    """An aggregation rule needs more updates than came back; the round keeps the old model."""
