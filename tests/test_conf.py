"""Every YAML composes, builds and round-trips; every mistake is answered in one message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import play, summary_of

from fl_app.components import build, check_stopping, make_engine
from fl_app.config import compose_config, from_run_config, resumed_config, to_json
from fl_app.run_config import conf_dir
from fl_app.types import ConfigError

GROUPS = sorted(
    str(path.relative_to(conf_dir()).with_suffix(""))
    for path in conf_dir().rglob("*.yaml")
    if path.parent != conf_dir()
)

# Choices that need another choice beside them: a natural partition needs a task with owners, a
# generated one needs a task that generates, a table a file; they are built in tests of their own.
NEEDS_COMPANY = {"partition/natural", "partition/generated", "task/table"}

SMALLER = {
    "partition/exponential": ["partition.num_clients=4"],
    "strategy/bulyan": ["selection.fraction=1"],
    "privacy/client": ["strategy.aggregation.weighting=uniform"],
}


@pytest.mark.parametrize("choice", [g for g in GROUPS if g not in NEEDS_COMPANY])
def test_every_yaml_composes_builds_and_round_trips_through_json(choice: str) -> None:
    group, _, name = choice.rpartition("/")
    config = compose_config([f"{group}={name}", *SMALLER.get(choice, [])])
    again = from_run_config({"config-json": to_json(config)})
    assert json.loads(to_json(again)) == json.loads(to_json(config))
    components = build(to_json(config))
    assert len(components.data.clients) >= 1


@pytest.mark.parametrize("name", [g.split("/")[1] for g in GROUPS if g.startswith("experiment/")])
def test_every_experiment_runs_two_rounds(name: str, tmp_path: Path) -> None:
    short = ("engine=local", "rounds=2", "progress=none")
    run_dir = play(tmp_path / "run", f"experiment={name}", *short, tiny=False)
    summary = summary_of(run_dir)
    assert summary["rounds"] == 2
    assert summary["metrics"]["accuracy"] > 0.2


def test_overrides_of_flowers_run_config_mean_what_they_mean_on_the_command_line() -> None:
    overrides = "task=breast_cancer strategy=fedadam rounds=5"
    config = from_run_config({"overrides": overrides, "config-json": ""})
    assert config == compose_config(overrides.split())
    assert config["task"]["_target_"].endswith("BreastCancer")


@pytest.mark.parametrize(
    "flag", ["--config-dir={}", "--config-dir {}", "-cd {}", '"--config-dir={}"']
)
def test_a_run_config_names_folders_of_ones_own_and_quotes_as_a_shell_does(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my conf"
    (folder / "task").mkdir(parents=True)
    (folder / "task" / "heart.yaml").write_text("defaults: [digits, _self_]\ntest_fraction: 0.5\n")
    monkeypatch.chdir(tmp_path)
    quoted = folder if flag.startswith('"') else f"'{folder}'"
    line = f"{flag.format(quoted)} task=heart tracking=wandb 'tracking.project=\"x y\"' rounds=2"
    config = from_run_config({"overrides": line})
    assert (config["task"]["test_fraction"], config["rounds"]) == (0.5, 2)
    assert config["tracking"]["project"] == "x y"
    # Relative ones: beside conf/ first, then in the working directory.
    assert from_run_config({"overrides": "--config-dir 'my conf' task=heart"})["task"] == {
        **config["task"]
    }
    beside = from_run_config({"overrides": "--config-dir=conf"})
    assert beside == compose_config([])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--config-dir=nowhere task=digits", ["--config-dir=nowhere", str(conf_dir().parent)]),
        ("task=digits --config-dir", ["--config-dir= is not a folder"]),
        ("name='x", ["name='x", "close every quote"]),
    ],
)
def test_a_line_that_cannot_be_read_is_one_message(line: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_run_config({"overrides": line})
    for word in words:
        assert word in str(caught.value)


def test_config_json_wins_over_overrides() -> None:
    config = compose_config(["rounds=7"])
    assert from_run_config({"overrides": "rounds=3", "config-json": to_json(config)}) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("taskk=digits", ["taskk", "did you mean task"]),
        ("task=digit", ["task=digit", "did you mean digits", "breast_cancer"]),
        ("strategy=fedavgg", ["strategy=fedavgg", "fedavg"]),
        ("strategy.lr=1", ["strategy.lr"]),
        ("+strategy.aggregation.weightin=uniform", ["weightin", "did you mean weighting"]),
        ("+client.optimizer.momentun=0.9", ["client.optimizer.momentun", "momentum"]),
        ("rounds=0", ["rounds=0", ">= 1"]),
        ("rounds=ten", ["rounds=ten", "int"]),
        ("seed=-1", ["seed=-1", ">= 0"]),
        ("selection.fraction=half", ["selection.fraction='half'", "float"]),
        ("selection.fraction=0", ["selection.fraction=0", "(0, 1]"]),
        ("selection.count=11", ["selection.count=11", "population of 10"]),
        ("selection.min_replies=6", ["selection.min_replies=6", "cohort of 5"]),
        ("partition.num_clients=2000", ["partition.num_clients=2000", "1437"]),
        ("partition=natural", ["task=digits"]),
        ("client.epochs=1.5", ["client.epochs=1.5", "int"]),
        ("client.optimizer.lr=-1", ["client.optimizer", "-1"]),
        ("client.early_stopping_patience=2", ["partition.validation_fraction"]),
        ("strategy.server_optimizer.lr=fast", ["strategy.server_optimizer"]),
        ("strategy.aggregation.weighting=size", ["weighting=size", "examples", "uniform"]),
        ("task._target_=nowhere.Task", ["task._target_=nowhere.Task", "cannot be imported"]),
        ("engine.workers=0", ["engine.workers=0", ">= 1"]),
        ("engine.vectorize=perhaps", ["engine.vectorize=perhaps", "auto, true or false"]),
        ("engine.threads=0", ["engine.threads=0", ">= 1", "null"]),
        ("engine.device=tpu", ["engine.device=tpu", "cpu, cuda"]),
        ("engine.chunk_mib=0", ["engine.chunk_mib=0", ">= 1", "null"]),
        (
            "strategy=bulyan",
            ["Bulyan(num_malicious=1) needs 7", "gives it 5", "selection.fraction"],
        ),
        ("progress=loud", ["progress=loud"]),
        ("strategy.aggregation=null", ["strategy.aggregation"]),
        ("strategy.objective=null", ["strategy.objective"]),
        ("checks=null", ["checks"]),
        ("stopping=null", ["stopping"]),
        ("+foo=1", ["foo is not a key"]),
        ("+compression.foo=1", ["compression", "none"]),
        ("selection.min_clients=0", ["selection.min_clients=0"]),
        ("stopping.patience=0", ["stopping.patience=0"]),
        ("rounds=", ["rounds"]),
        ("[rounds", ["[rounds"]),
    ],
)
def test_a_mistake_is_named_with_its_key_and_the_way_out(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config = compose_config([override])
        build(to_json(config))
        make_engine(config)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rule_that_watches_what_is_not_there_is_told_before_the_run() -> None:
    unknown = compose_config(["stopping.target=0.9", "stopping.metric=nope"])
    with pytest.raises(ConfigError, match=r"stopping\.metric=nope.*accuracy"):
        check_stopping(build(to_json(unknown)))
    unwatched = compose_config(["stopping.patience=3", "task.test_fraction=0"])
    with pytest.raises(ConfigError, match=r"task\.test_fraction"):
        check_stopping(build(to_json(unwatched)))


def test_a_config_dir_adds_choices_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "strategy").mkdir()
    (tmp_path / "strategy" / "mine.yaml").write_text(
        "defaults: [fedavg, _self_]\nname: mine\nserver_optimizer: {lr: 0.5}\n"
    )
    config = compose_config(["strategy=mine"], [tmp_path])
    assert build(to_json(config)).algorithm.name == "mine"


def test_a_resumed_run_takes_only_keys_that_leave_the_past_alone(tmp_path: Path) -> None:
    run_dir = play(tmp_path / "run", "rounds=1")
    assert resumed_config(str(run_dir), ["rounds=9", "engine.workers=2"])["rounds"] == 9
    for override in ("seed=2", "strategy=fedadam", "client.epochs=2"):
        with pytest.raises(ConfigError, match="another run"):
            resumed_config(str(run_dir), [override])
    for override in ("rounds=abc", "rounds", "checkpoint_every=1.5"):
        with pytest.raises(ConfigError, match=override.partition("=")[0]):
            resumed_config(str(run_dir), [override])
    with pytest.raises(ConfigError, match="roundz"):
        resumed_config(str(run_dir), ["stopping.roundz=9"])
    with pytest.raises(ConfigError, match="config.yaml"):
        resumed_config(str(tmp_path), [])


@pytest.mark.parametrize(
    "content", [b"", b"rounds: 3\n", b"just words", b"\xff\xfe", b"a: [", b"x: 1"]
)
def test_a_folder_whose_config_is_none_cannot_be_resumed(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match="resume=|not a key|Missing"):
        resumed_config(str(tmp_path), [])


def test_the_quickstarts_differ_in_privacy_and_in_what_suits_it() -> None:
    private, plain = (
        compose_config([f"experiment={name}"]) for name in ("quickstart", "quickstart_no_dp")
    )
    differing = {key for key in private if private[key] != plain[key]}
    assert differing == {"name", "privacy", "client"}
    assert private["privacy"]["_target_"].endswith("RecordLevel")
