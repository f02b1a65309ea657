"""Flower's error replies <-> our kinds of failure."""

from __future__ import annotations

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from fl_app.types import FailureKind

_REFUSED_CODE = 9_001  # beyond Flower's own codes: the client declines, and knows why

_FAILURE_KINDS = {
    ErrorCode.NODE_UNAVAILABLE: FailureKind.OFFLINE,
    ErrorCode.MESSAGE_UNAVAILABLE: FailureKind.TIMEOUT,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: FailureKind.TIMEOUT,
    _REFUSED_CODE: FailureKind.REFUSED,
}

_CODES: dict[str, int] = {
    "ClientTimeoutError": ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    "BudgetExhaustedError": _REFUSED_CODE,
    "PolicyError": _REFUSED_CODE,
    "RefusedRequestError": _REFUSED_CODE,
}
"""Error codes by the names of exceptions that are not plain failures."""


def failure_of(reply: Message) -> tuple[FailureKind, str] | None:
    """Return why a reply carries no content, in one line, or None if it carries some."""
    if not reply.has_error():
        return None
    return _failure(reply.error.code, reply.error.reason or "")


def failure_from(error: Exception) -> tuple[FailureKind, str]:
    """Return what `failure_of` says of the reply that a client gives on an error."""
    return _failure(*code_and_reason(error))


def _failure(code: int, reason: str) -> tuple[FailureKind, str]:
    lines = reason.strip().splitlines() or ["no reason given"]
    return _FAILURE_KINDS.get(code, FailureKind.ERROR), lines[-1][:500]


def error_reply(instruction: Message, error: BaseException) -> Message:
    """Return the reply of a client that failed; as Flower's own runtimes give it."""
    code, reason = code_and_reason(error)
    return Message(Error(code=code, reason=reason), reply_to=instruction)


def code_and_reason(error: BaseException) -> tuple[int, str]:
    """Return what an error reply says of an error."""
    name = type(error).__name__
    return _CODES.get(name, ErrorCode.CLIENT_APP_RAISED_EXCEPTION), f"{name}: {error}"
