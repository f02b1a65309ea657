"""Imports point one way, and each library has its home."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from helpers import REPOSITORY

PACKAGE = REPOSITORY / "fl_app"

# A module may import those of its own layer and of the layers above it in this list.
LAYERS = [
    ["__version__", "errors", "files", "site_protocol", "config_keys"],
    ["run_log"],
    ["types"],
    ["run_config"],
    ["params"],
    ["storage"],
    [
        "tasks",
        "privacy",
        "selection",
        "aggregation",
        "server_optimizer",
        "objective",
        "stopping",
        "attacks",
    ],
    ["stacked"],
    ["robust_aggregation"],
    ["local_optimizer"],
    ["client_state", "checkpoint", "validation", "training", "arrays", "tracking"],
    ["private_training", "cohort"],
    ["metric_records"],
    ["failures", "codec"],
    ["foreign", "exchange"],
    ["site"],
    ["client", "directory", "algorithm", "cohort_figures"],
    ["flower_strategy", "private_algorithm", "client_cohort", "answers", "own_measurements"],
    ["strategy"],
    ["rounds", "preflight", "private_preflight"],
    ["schema", "config"],
    ["components"],
    ["site_config", "population", "vectorizing"],
    ["client_messages", "relay", "site_server"],
    ["client_app", "site_worker"],
    ["federation"],
    ["plan", "server_app"],
    ["engines"],
    ["launch"],
    ["sweep"],
    ["deployment"],
    ["ledger_cli", "site_cli", "certs_cli", "gateway_cli"],
    ["cli", "__main__"],
]

HOMES = {
    "hydra": {"config", "components", "cli", "launch", "run_config", "schema", "sweep"},
    "omegaconf": {"config", "cli", "launch", "run_config", "schema", "sweep"},
    "flwr": {
        "arrays",
        "codec",
        "metric_records",
        "answers",
        "own_measurements",
        "directory",
        "exchange",
        "algorithm",
        "flower_strategy",
        "strategy",
        "rounds",
    }
    | {"private_algorithm", "failures", "client_messages", "relay", "site_worker"}
    | {"federation", "population", "client_app", "server_app", "foreign", "engines"}
    | {"deployment"},
    "flwr_datasets": {"tasks"},
    "opacus": {"privacy", "private_preflight"},
    "dp_accounting": {"privacy"},
    "cryptography": {"privacy", "deployment"},
    "starlette": {"deployment"},
    "uvicorn": {"deployment"},
    "httpx": {"deployment"},
    "wandb": {"tracking"},
    "ray": {"engines"},
}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def layer_of(name: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if name in layer)


def unit(path: Path) -> str:
    """Return the name by which `LAYERS` knows a module: itself, or the folder it is in."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Return the dotted names of all modules that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    own = layer_of(unit(path))
    for name in imported(path):
        if name.startswith("fl_app."):
            other = name.split(".")[1]
            assert layer_of(other) <= own, f"{unit(path)} must not import {other}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_each_library_is_imported_only_at_its_home(path: Path) -> None:
    for name in imported(path):
        home = HOMES.get(name.split(".")[0])
        assert home is None or unit(path) in home, f"{unit(path)} must not import {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno <= 70, f"{path.name}: {node.name} is too long"
