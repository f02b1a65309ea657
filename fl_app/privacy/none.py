"""No differential privacy (``privacy=none``)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fl_app.privacy.randomness import PrivacyRandomness, Source
from fl_app.privacy.release import DECLARABLE
from fl_app.types import Params, PrivacyUnit


@dataclass(frozen=True, kw_only=True)
class NoPrivacy:
    """Updates leave the clients as training made them; records stay where they are."""

    @property
    def unit(self) -> PrivacyUnit:
        """Whose presence is hidden: nobody's."""
        return PrivacyUnit.NONE

    @property
    def delta(self) -> float:
        """Of no meaning."""
        return 1e-5

    @property
    def accountant(self) -> str:
        """Of no meaning."""
        return "rdp"

    @property
    def limit(self) -> None:
        """There is none."""
        return

    @property
    def public(self) -> Collection[str]:
        """Clients tell everything."""
        return DECLARABLE

    @property
    def ledger(self) -> None:
        """There is nothing to account for."""
        return

    @property
    def randomness(self) -> str:
        """Of no meaning: it draws nothing."""
        return Source.SECRET

    @property
    def noise_multiplier(self) -> None:
        """There is no noise."""
        return

    def event(self, num_examples: int, *, batch_size: int, epochs: int) -> None:
        """Return None: nothing is promised, so nothing is paid."""

    def steps(self, num_examples: int, *, batch_size: int, epochs: int) -> None:
        """Return None: records are trained on plainly."""

    def protect(
        self, delta: Params, *, max_norm: float | None, randomness: PrivacyRandomness
    ) -> tuple[Params, Mapping[str, float]]:
        """Return the update as it is."""
        return delta, {}
