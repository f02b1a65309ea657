"""Checkpoints: everything a run needs to go on as if it had never been interrupted.

One file a checkpoint, ``checkpoints/round_000010.safetensors``, written atomically and carrying
its own checksum (`fl_app.storage`). The newest readable one counts; a damaged one is named in the
log and the one before it is used.

Streams of randomness need no position of their own: each is derived from (seed, role, round,
client), so the round number is the position. The process-wide generators of Python, NumPy and
torch are kept as well, for code of users, and of Flower, that draws from them on the server.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fl_app.storage import CorruptFileError, read_tree, write_tree

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: Where they lie; made with the first.
        keep: How many are kept, >= 2: the newest, and one to fall back to.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self._folder = folder
        self._keep = max(2, keep)

    def save(self, round: int, content: Mapping[str, Any]) -> None:
        """Write the checkpoint taken after ``round``, and drop the oldest beyond ``keep``.

        Raises:
            OSError: The folder is not writable or the disk is full; older checkpoints stay.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        write_tree(self._path(round), {**content, "global_randomness": _global_randomness()})
        for old in self._rounds()[: -self._keep]:
            self._path(old).unlink(missing_ok=True)

    def load_latest(self) -> Mapping[str, Any] | None:
        """Return what the newest readable checkpoint holds, or None if there is none.

        Sets the process-wide generators to where they were.
        """
        for round in reversed(self._rounds()):
            try:
                content: Mapping[str, Any] = read_tree(self._path(round))
            except CorruptFileError as error:
                log.warning("Checkpoint of round %d is damaged, trying an older: %s", round, error)
                continue
            _restore_global_randomness(content["global_randomness"])
            return content
        return None

    def set_aside_after(self, round: int) -> None:
        """Rename checkpoints later than ``round``: damaged ones that a resumed run has passed.

        They would count as the newest; what could not be read today is kept for a person to see.
        """
        for later in self._rounds():
            if later > round:
                path = self._path(later)
                path.replace(path.with_name(f"{path.name}.damaged"))

    def _path(self, round: int) -> Path:
        return self._folder / f"round_{round:06d}.safetensors"

    def _rounds(self) -> list[int]:
        matches = (
            re.fullmatch(r"round_(\d{6,})\.safetensors", path.name)
            for path in self._folder.glob("round_*.safetensors")
        )
        return sorted(int(match[1]) for match in matches if match)


def _global_randomness() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }


def _restore_global_randomness(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
