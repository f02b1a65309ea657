"""Differential privacy: mechanisms, their randomness and cost, the ledger, and who guards it."""
