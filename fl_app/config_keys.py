"""What a key of the configuration changes: the result, how far a run goes, or only its place."""

from __future__ import annotations

_PLACE_KEYS = (
    "engine.workers",
    "engine.cpus",
    "engine.client_cpus",
    "engine.client_gpus",
    "engine.port",
    "engine.superlink",
    "engine.root_certificates",
    "engine.insecure",
    "engine.gpu",
    "engine.compose_file",
    "engine.project",
    "engine.keep_up",
    "engine.start_s",
)
"""Keys that say where a run is played and how many processes share the work."""

RESUMABLE_KEYS = (
    "rounds",
    "stopping",
    "checkpoint_every",
    "checkpoint_keep",
    "fairness_clients",
    "progress",
    *_PLACE_KEYS,
)
"""Keys that may be given anew when a run is resumed: they change nothing of what has been done."""

UNHASHED_KEYS = (
    "name",
    "output_url",
    "run_dir",
    "resume",
    "tracking",
    "progress",
    "checkpoint_every",
    "checkpoint_keep",
    *_PLACE_KEYS,
    "engine.shared_outputs",
)
"""Config keys that do not change a result, so runs that differ only here share a config hash.

``name``, ``output_url`` and ``run_dir`` say where a run is put, ``resume`` that it was interrupted,
``tracking`` and ``progress`` who watches, ``checkpoint_*`` how often it is saved, and
``engine.*`` how many processes share the work and where they meet. Any key not listed is hashed.
"""
