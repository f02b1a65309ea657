"""What a run promises about privacy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class NoPrivacy:
    """No differential privacy: updates leave the clients as training made them (``privacy=none``).

    The only guarantee is that records stay where they are.
    """
