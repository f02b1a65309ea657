"""Where the private draws of many clients come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fl_app.privacy.randomness import PrivacyRandomness


class Draws(Protocol):
    """Where the private draws of a stack of clients come from."""

    def noise(self, like: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return standard normal noise in double precision, for tensors of the first clients."""
        ...


class DrawsOfEach:
    """Every client draws from a source of its own, in the order in which it does when alone.

    Args:
        secrets: The sources.
    """

    def __init__(self, secrets: Sequence[PrivacyRandomness]) -> None:
        self._secrets = secrets

    def noise(self, like: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return noise for each client's tensors in their order."""
        rows = [
            [secret.normals(tensor[0].numel()).view(tensor.shape[1:]) for tensor in like]
            for secret in self._secrets[: len(like[0])]
        ]
        return [torch.stack(column).to(like[0].device) for column in zip(*rows, strict=True)]


class DrawsTogether:
    """All clients draw from one source: as good, where one process holds them all.

    Args:
        secret: The source.
    """

    def __init__(self, secret: PrivacyRandomness) -> None:
        self._secret = secret

    def noise(self, like: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return noise for all tensors, drawn at once."""
        sizes = [tensor.numel() for tensor in like]
        parts = torch.split(self._secret.normals(sum(sizes)), sizes)
        return [
            part.view(tensor.shape).to(tensor.device)
            for part, tensor in zip(parts, like, strict=True)
        ]
