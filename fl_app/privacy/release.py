"""What a client's replies tell, and why each thing may be told.

Under differential privacy every value that leaves a client is *charged* (noise was added and the
ledger paid for it), *public* (it does not depend on the records, or the owner has declared it so),
or *withheld*. `CLASSES` says which, field by field; a test compares it with real replies.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from enum import StrEnum

from fl_app.types import ConfigError


class Release(StrEnum):
    """Why a value may leave a client, or that it may not."""

    CHARGED = "charged"
    PUBLIC = "public"
    DECLARED = "withheld unless declared public"


class PublicField(StrEnum):
    """What a reply holds besides the update, which an owner may declare to be no secret.

    NUM_EXAMPLES: the exact number of records trained on.
    LABEL_COUNTS: records of each class.
    METRICS: figures of the local training, such as the mean loss.
    EVALUATION: the received model's figures on the client's own held-out part.
    """

    NUM_EXAMPLES = "num_examples"
    LABEL_COUNTS = "label_counts"
    METRICS = "metrics"
    EVALUATION = "evaluation"


CLASSES = {
    "delta": Release.CHARGED,
    "clipped": Release.CHARGED,  # the bit of adaptive clipping
    "client": Release.PUBLIC,  # the site's name
    "round": Release.PUBLIC,
    "epsilon": Release.PUBLIC,  # a function of sample rate, noise and rounds: not of the records
    "error": Release.PUBLIC,  # its kind: see PRIVACY.md, "what is assumed"
    "duration": Release.PUBLIC,  # see PRIVACY.md: it tells the sizes of batches, and so about n
    **dict.fromkeys(map(str, PublicField), Release.DECLARED),
}
"""Everything that a reply of ours can tell."""

DECLARABLE = tuple(map(str, PublicField))
"""What may be declared public; it is withheld otherwise."""


def check_public(names: Iterable[str]) -> None:
    """Refuse to declare public what cannot be.

    Raises:
        ConfigError: A name is not one of `DECLARABLE`.
    """
    for name in names:
        if name not in DECLARABLE:
            raise ConfigError(
                f"privacy.public={name} cannot be declared public: choose from "
                f"{', '.join(DECLARABLE)}."
            )


def may_tell(name: str, public: Collection[str]) -> bool:
    """Return whether a field that is not charged may be told as it is."""
    return CLASSES[name] is not Release.DECLARED or name in public
