"""conf/task and conf/partition: every field is a key, and composes to what it names."""

from __future__ import annotations

from dataclasses import MISSING, fields, replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from fl_app.tasks.digits import Digits
from fl_app.tasks.models import Mlp, SmallCnn

CONF = Path(__file__).parents[1] / "conf"
# A file without a class of its own changes another one's values: `skewed`, of `dirichlet`.
FILES = sorted(
    path
    for group in ("task", "task/model", "partition")
    for path in CONF.glob(f"{group}/*.yaml")
    if "_target_" in path.read_text()
)


def composed(*overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(overrides=list(overrides))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_the_keys_of_a_file_are_the_fields_of_its_class_at_their_defaults(path):
    keys = OmegaConf.to_container(OmegaConf.load(path))
    groups = {next(iter(entry)) for entry in keys.pop("defaults", []) if isinstance(entry, dict)}
    of_class = {field.name: field for field in fields(get_class(keys.pop("_target_")))}
    assert set(keys) | groups == set(of_class)
    for key, value in keys.items():
        default = of_class[key].default
        if default is not MISSING:
            assert value == (list(default) if isinstance(default, tuple) else default)


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.parent.name == "partition"], ids=lambda path: path.stem
)
def test_every_partition_is_built_from_its_file(path):
    config = composed(f"+partition={path.stem}")
    partition = instantiate(config.partition, _convert_="object")
    assert type(partition).__name__.lower() == path.stem


def test_skewed_is_dirichlet_with_fewer_classes_a_client():
    skewed, dirichlet = (
        instantiate(composed(f"+partition={name}").partition, _convert_="object")
        for name in ("skewed", "dirichlet")
    )
    assert skewed == replace(dirichlet, alpha=0.1, min_partition_size=10)


def test_the_model_of_a_task_is_chosen_by_its_own_group():
    task = instantiate(composed("+task=digits", "task/model=cnn").task, _convert_="object")
    assert task == Digits(model=SmallCnn(channels=[16, 32]))


def test_a_key_of_the_model_is_overridden_under_the_task():
    config = composed("+task=digits", "task.model.hidden=[32,16]", "task.test_fraction=0.1")
    task = instantiate(config.task, _convert_="object")
    assert task == Digits(model=Mlp(hidden=[32, 16]), test_fraction=0.1)
