"""Federated learning on Flower: one app, from a laptop simulation to a deployed federation."""

__version__ = "0.1.0"
