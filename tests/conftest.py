"""Settings of all tests; helpers are in `helpers.py`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings

# Before any worker process: the same bits, and no two processes fighting for a core.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# Test modules share `helpers`, also those in folders below.
sys.path.insert(0, str(Path(__file__).parent))

# A busy machine must not fail a property: no deadlines, and few enough examples for minutes.
settings.register_profile(
    "fl_app", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fl_app")
