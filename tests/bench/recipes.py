"""The benchmark's models, in plain PyTorch: contenders without ours import this too."""

from __future__ import annotations

from torch import nn


def mlp() -> nn.Module:
    """Return an MLP 784-10-10 with ReLU: 7,960 parameters, from ``(n, 1, 28, 28)`` to logits."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.ReLU(), nn.Linear(10, 10))


def le_net() -> nn.Module:
    """Return LeNet-5 with ReLU and max pooling: 44,426 parameters, from ``(n, 1, 28, 28)``.

    LeCun et al. 1998, "Gradient-based learning applied to document recognition", Figure 2.
    """
    return nn.Sequential(
        nn.Conv2d(1, 6, kernel_size=5),  # (n, 6, 24, 24)
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, kernel_size=5),  # (n, 16, 8, 8)
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),  # (n, 256)
        nn.Linear(256, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


def vgg() -> nn.Module:
    """Return six 3x3 convolutions and two linear layers: 4,982,602 parameters, 87 M MACs.

    From ``(n, 3, 32, 32)`` to logits; in the manner of Simonyan and Zisserman 2015,
    arXiv:1409.1556, without normalisation. What it costs is arithmetic, not overhead.
    """
    layers: list[nn.Module] = []
    colours = 3
    for channels, halves in (
        *((32, True), (64, True), (128, False), (256, True)),
        *((512, False), (512, True)),
    ):
        layers += [nn.Conv2d(colours, channels, kernel_size=3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if halves else []
        colours = channels
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 512), nn.ReLU(), nn.Linear(512, 10))
