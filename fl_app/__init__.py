"""Federated learning on Flower: one app, from a laptop simulation to a deployed federation."""
