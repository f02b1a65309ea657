"""The ServerApp and ClientApp: who is which client, how many there are, and errors in words."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.superlink.grid import InMemoryGrid
from helpers import TINY, play, rounds_of, summary_of

from fl_app import client_messages, server_app
from fl_app.codec import decode_description, query_messages
from fl_app.config import chosen_engine, compose_config, from_run_config, to_json
from fl_app.engines.local import adopt_identity
from fl_app.failures import failure_of
from fl_app.population import wait_for_nodes
from fl_app.run_log import Heard
from fl_app.types import ConfigError, EmptyCohortError

QUICK = "task/model=logistic client.epochs=1 rounds=1 progress=none"


def context(node: dict[str, Any], **run_config: str) -> Context:
    return Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config=run_config)


def ask(node: dict[str, Any], **run_config: str) -> Message:
    """Return the ClientApp's answer to the question who it is."""
    adopt_identity()
    (message,) = query_messages([1], ttl=60.0)
    return client_messages.answer(message, context(node, **run_config))


class Nodes:
    """A Grid that knows how many nodes there are; one more joins at each look, up to the last."""

    def __init__(self, *counts: int) -> None:
        self._counts = list(counts)

    def get_node_ids(self) -> range:
        count = self._counts.pop(0) if len(self._counts) > 1 else self._counts[0]
        return range(1, count + 1)


class NobodyAsked(InMemoryGrid):
    """The Grid of Flower's simulation, for runs that are to leave it alone."""

    def __init__(self) -> None:
        pass

    def get_node_ids(self) -> Iterable[int]:
        raise AssertionError("asked for nodes")

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise AssertionError("sent messages")


# The population --------------------------------------------------------------------------------


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "strided", "linear", "shard"])
def test_connected_nodes_are_the_population_where_nothing_says_otherwise(partition: str) -> None:
    config = from_run_config({"overrides": f"partition={partition}"}, connected=7)
    assert config["partition"]["num_clients"] == 7
    # ... and what one federation was told is forgotten by the next.
    assert compose_config([f"partition={partition}"])["partition"]["num_clients"] == 10


@pytest.mark.parametrize("overrides", ["partition.num_clients=4", "experiment=quickstart"])
def test_a_population_that_is_said_wins_over_the_connected_nodes(overrides: str) -> None:
    said = compose_config(overrides.split())["partition"]["num_clients"]
    config = from_run_config({"overrides": overrides}, connected=7)
    assert config["partition"]["num_clients"] == said != 7


def test_a_whole_configuration_is_taken_as_it_is() -> None:
    config = compose_config(["rounds=3"])
    assert from_run_config({"config-json": to_json(config)}, connected=7) == config


def test_nodes_are_counted_once_no_more_of_them_come() -> None:
    assert wait_for_nodes(Nodes(0, 1, 2, 3), settle_s=0.02) == 3  # type: ignore[arg-type]


def test_a_federation_without_nodes_is_refused_with_the_way_out() -> None:
    with pytest.raises(EmptyCohortError, match=r"no SuperNode.*num-supernodes=10"):
        wait_for_nodes(Nodes(0), patience_s=0.05, settle_s=0.01)  # type: ignore[arg-type]


# Which node is which client --------------------------------------------------------------------


def client_of(node: dict[str, Any], clients: Sequence[str]) -> str:
    runtime = SimpleNamespace(data=SimpleNamespace(clients=clients))
    return client_messages.client_of(node, runtime)  # type: ignore[arg-type]


def test_a_node_is_the_client_at_its_position_whatever_the_clients_are_called() -> None:
    names = ["Bergen", "Chania", "Tromso"]
    assert client_of({"partition-id": 1, "num-partitions": 3}, names) == "Chania"
    assert client_of({"partition-id": 1, "client-id": "Tromso"}, names) == "Tromso"
    assert client_of({"partition-id": 11}, [str(n) for n in range(12)]) == "11"


@pytest.mark.parametrize("position", [3, 1000, -1, "x", 1.5])
def test_a_position_beyond_the_population_is_refused_with_the_way_out(position: object) -> None:
    words = rf"partition-id={re.escape(str(position))} .* \[0, 3\).*partition.num_clients"
    with pytest.raises(ConfigError, match=words):
        client_of({"partition-id": position}, ["a", "b", "c"])


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the process look like one of Flower's simulation."""
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))


@pytest.mark.usefixtures("simulated")
def test_a_node_learns_the_population_from_its_number_of_partitions() -> None:
    sizes = [
        decode_description(
            ask({"partition-id": 0, "num-partitions": count}, overrides=QUICK)
        ).num_examples
        for count in (2, 4)
    ]
    assert sizes[0] == pytest.approx(2 * sizes[1], abs=3)


@pytest.mark.usefixtures("simulated")
def test_a_node_without_a_part_answers_with_an_error_reply_and_logs_its_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    overrides = f"{QUICK} partition.num_clients=2"
    reply = ask({"partition-id": 2, "num-partitions": 3}, overrides=overrides)
    failure = failure_of(reply)
    assert failure is not None
    assert "ConfigError: partition-id=2 of this node must lie in [0, 2)" in failure[1]
    assert "partition-id=2 of this node must lie in [0, 2)" in caplog.text


@pytest.mark.usefixtures("simulated")
def test_the_text_of_a_foreign_error_stays_on_the_client(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks(*_: object) -> None:
        raise KeyError("patient 4711")

    monkeypatch.setattr("fl_app.client.ClientRuntime.describe", breaks)
    reply = ask({"partition-id": 0, "num-partitions": 2}, overrides=QUICK)
    assert failure_of(reply)[1] == "ClientFailedError: KeyError; see the client's own log"  # type: ignore[index]
    assert "4711" in caplog.text


def test_a_real_client_is_not_served_where_the_servers_code_runs() -> None:
    failure = failure_of(ask({"partition-id": 0, "num-partitions": 2}, overrides=QUICK))
    assert failure is not None
    assert "NoSiteError: this client has no site: start `fl-app site" in failure[1]


# The ServerApp ---------------------------------------------------------------------------------


def told(printed: str) -> dict[str, str]:
    """Return what a launcher takes from a run's log."""
    heard = Heard()
    for line in printed.splitlines(keepends=True):
        heard.take(line)
    return heard.outcome


def test_the_launcher_is_told_the_folder_of_a_run_and_nobody_else_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with server_app._telling_the_launcher({"launched-at": 1.0}) as outcome:
        outcome["run_dir"] = "somewhere"
    assert told(capsys.readouterr().out) == {"run_dir": "somewhere"}
    with server_app._telling_the_launcher({"launched-at": 0.0}) as outcome:
        outcome["run_dir"] = "somewhere"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConfigError("a=1"), "config"),
        (EmptyCohortError("nobody"), "known"),
        (OSError("disk"), "OSError"),
    ],
)
def test_the_launcher_is_told_why_a_run_failed(
    error: Exception, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(type(error)), server_app._telling_the_launcher({"launched-at": 1.0}):
        raise error
    assert told(capsys.readouterr().out) == {"error": str(error), "kind": kind}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("strategy=fedavgg", "strategy=fedavgg does not exist; did you mean fedavg"),
        ("rounds=5 ==", "rror parsing override"),
        ("task._target_=nowhere.Task", "nowhere.Task cannot be imported .* PYTHONPATH"),
        ("partition._target_=fl_app.selection.Uniform", "partition"),
        ("~partition strategy=fedavg", "partition"),
        ("task._target_=fl_app.selection.Uniform", "task"),
        ("selection.count=5", "selection.count=5 exceeds the population of 2 clients"),
        ("resume=nowhere", "resume=nowhere is not the folder of a run"),
        ("engine=local", "engine=local simulates .* are real.*Leave it out.*fl-app run"),
        ("engine=loca", "engine=loca does not exist; did you mean local"),
    ],
)
def test_a_mistake_ends_the_server_app_with_one_message(
    overrides: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=words):
        server_app.main(Nodes(2), context({}, overrides=overrides))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "chosen"),
    [
        ("", None),
        ("rounds=2 strategy=fedprox", None),
        ("engine.threads=2 engine.workers=2", None),  # these hold on any runtime, or on none
        ("name=engine=local", None),
        ("engine=local", "engine=local"),
        ("'engine = local' rounds=2", "engine = local"),
        ("engine=local engine=simulation", "engine=simulation"),  # Hydra's last word, too
    ],
)
def test_an_engine_is_chosen_by_an_override_of_its_group_alone(
    overrides: str, chosen: str | None
) -> None:
    assert chosen_engine({"overrides": overrides}) == chosen


@pytest.mark.parametrize("program", [False, True])
def test_an_engine_that_was_asked_for_plays_what_fl_app_run_plays_without_flowers_grid(
    program: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["engine=local", "rounds=2", f"run_dir={tmp_path}/run"]
    quick = [o for o in TINY if "num_clients" not in o]  # nobody counts nodes
    given = (
        {"config-json": to_json(compose_config([*quick, *typed]))}
        if program
        else {"overrides": " ".join([*quick, *typed])}
    )
    server_app.main(NobodyAsked(), context({}, **{"launched-at": 1.0, **given}))
    assert told(capsys.readouterr().out) == {"run_dir": f"{tmp_path}/run"}
    local = play(tmp_path / "local", *quick, "rounds=2", tiny=False)
    summary, expected = summary_of(tmp_path / "run"), summary_of(local)
    assert (summary["engine"], summary["clients"]) == ("local", 10)
    assert summary["model_hash"] == expected["model_hash"]
    assert rounds_of(tmp_path / "run") == rounds_of(local)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("overrides", ""),
        ("overrides", "engine.threads=1"),
        ("overrides", "engine=simulation"),
        ("config-json", to_json(compose_config(["engine=simulation"]))),
    ],
)
def test_without_that_flowers_grid_is_the_one_that_is_asked(key: str, text: str) -> None:
    with pytest.raises(AssertionError, match="asked for nodes"):
        server_app.main(NobodyAsked(), context({}, **{key: text}))


def test_a_program_that_sends_a_configuration_to_real_clients_means_them() -> None:
    given = {"config-json": to_json(compose_config(["engine=local"]))}
    assert server_app._config_of_own_grid(Nodes(2), given) is None  # type: ignore[arg-type]


def test_nodes_that_differ_from_the_population_are_said_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fl_app import population
    from fl_app.components import build
    from fl_app.engines.local import LocalEngine

    config = compose_config([*TINY, f"run_dir={tmp_path}"])
    run_config = {"config-json": to_json(config)}
    components = build(to_json(config))
    adopt_identity()
    with LocalEngine().grid(["0", "1", "2", "3"], run_config) as grid:
        monkeypatch.setattr(population, "KnowsClients", type("Nobody", (), {}))
        with caplog.at_level(logging.WARNING):
            directory = population.directory_of(grid, components)
    assert list(directory.clients()) == ["0", "1", "2", "3"]
    (line,) = [r.getMessage() for r in caplog.records if "nodes are connected" in r.getMessage()]
    assert "4 nodes are connected, but the population (partition.num_clients) is 6" in line
    assert "2 clients take no part" in line
    assert "num-supernodes=6" in line
