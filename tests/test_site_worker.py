"""A site's worker does what its owner's policy allows, whatever a server or a bundle asks."""

from __future__ import annotations

import json
import os
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from site_client import BASE, OPEN_POLICY, PRIVATE_POLICY, SiteClient, initial

from fl_app import codec
from fl_app.client_messages import local_runtime
from fl_app.client_state import forget_runs
from fl_app.components import settled
from fl_app.config import compose_config, to_json
from fl_app.failures import failure_of
from fl_app.privacy.ledger import Ledger
from fl_app.site_protocol import Kind, Request
from fl_app.types import FailureKind, Params

NOISE = ("privacy.noise_multiplier=1.0", "privacy.target_epsilon=null")
PRIVATE = ("privacy=record", *NOISE, "client.batch_size=32")


def private(folder: Path, *, epsilon: float = 20, unit: str = "record") -> SiteClient:
    return SiteClient(folder, PRIVATE_POLICY.format(epsilon=epsilon, unit=unit))


def declined(answer: Message) -> str:
    kind, reason = failure_of(answer)  # type: ignore[misc]
    assert kind is FailureKind.REFUSED
    return reason


def failed(answer: Message) -> str:
    failure = failure_of(answer)
    assert failure is not None
    return failure[1]


def table(path: Path, records: int, *, columns: int = 3) -> Path:
    lines = [",".join([*(f"x{c}" for c in range(columns)), "target"])]
    lines += [
        ",".join(str((n * (c + 3)) % 7 - 3) for c in range(columns)) + f",{n % 2}"
        for n in range(records)
    ]
    path.write_text("\n".join(lines))
    return path


# The same training -------------------------------------------------------------------------------


def test_a_site_sends_the_bits_that_a_simulated_client_sends(tmp_path: Path) -> None:
    site = SiteClient(tmp_path / "site", OPEN_POLICY)
    config, params = compose_config(list(BASE)), initial(*BASE)
    update = codec.decode_update(site.told(config, params=params), "0")
    runtime = local_runtime({"config-json": to_json(config)})
    content = codec.instruction(
        codec.encode_model(params), codec.instruction_config("r", {}), round=1
    )
    expected = runtime.train("0", codec.decode_instruction(content, deadline_s=None))
    assert update.num_examples == expected.num_examples
    assert update.evaluation == expected.evaluation
    for name, delta in expected.delta.items():
        assert torch.equal(update.delta[name], delta)


def test_on_another_device_a_site_trains_the_same(tmp_path: Path) -> None:
    # cpu:0 is a CPU, and no other device than that is sure to be there; what leads to it is.
    overrides = (*BASE, "client/optimizer=adam", "client.keep_optimizer_state=true")
    sites = [
        SiteClient(tmp_path / "there", OPEN_POLICY, device=torch.device("cpu", 0)),
        SiteClient(tmp_path / "here", OPEN_POLICY),
    ]
    for params in (initial(*BASE), initial(*BASE)):
        there, here = (
            codec.decode_update(site.told(compose_config(list(overrides)), params=params), "0")
            for site in sites
        )
        for name, delta in here.delta.items():
            torch.testing.assert_close(there.delta[name], delta, atol=1e-6, rtol=1e-4)


def test_what_can_only_be_trained_on_a_cpu_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = SiteClient(tmp_path / "site", OPEN_POLICY, device=torch.device("cpu", 0))
    alone = ("client.early_stopping_patience=2", "partition.validation_fraction=0.2")
    assert not site.asked(*alone).has_error()
    assert "Training on the CPU instead of cpu:0" in caplog.text


def test_a_site_evaluates_and_says_who_it_is(tmp_path: Path) -> None:
    site, config = SiteClient(tmp_path / "site", OPEN_POLICY), compose_config(list(BASE))
    assert codec.decode_evaluation(site.told(config, kind="evaluate")).num_examples > 0
    told = codec.decode_description(site.told(config, kind="query"))
    assert told.client == "0"
    assert told.num_examples is not None and told.num_examples > 1


def test_what_a_client_remembers_stays_in_the_sites_own_folder(tmp_path: Path) -> None:
    site = SiteClient(tmp_path / "site", OPEN_POLICY)
    answer = site.asked("client.keep_optimizer_state=true", "client.optimizer.momentum=0.9")
    assert not answer.has_error()
    assert list((tmp_path / "site" / "client_state").rglob("*.safetensors"))


# The policy --------------------------------------------------------------------------------------


def test_a_site_pays_from_its_own_ledger_and_tells_what_its_owner_declares(tmp_path: Path) -> None:
    site = private(tmp_path / "site")
    asks_for_more = "privacy.public=[num_examples,evaluation,metrics,label_counts]"
    answer = site.asked(*PRIVATE, asks_for_more)
    update = codec.decode_update(answer, "0")
    assert update.num_examples > 1
    assert update.evaluation is None
    assert not update.metrics
    assert len(site.ledger.read_text().splitlines()) == 2
    assert not (tmp_path / "site" / "elsewhere").exists()


def test_no_configuration_raises_a_sites_budget(tmp_path: Path) -> None:
    site = private(tmp_path / "site", epsilon=0.5)
    for more in ([], ["privacy.epsilon_budget=1000"], ["privacy.delta=1e-3"]):
        assert "BudgetExhaustedError" in declined(site.asked(*PRIVATE, *more))
    assert not site.ledger.exists() or len(site.ledger.read_text().splitlines()) <= 1


def test_a_site_pays_from_one_account_whatever_a_bundle_calls_it(tmp_path: Path) -> None:
    site = private(tmp_path / "site", epsilon=1000)
    site.asked(*PRIVATE)
    site.node |= {"client-id": "3"}
    site.asked(*PRIVATE)
    paid = [json.loads(line) for line in site.ledger.read_text().splitlines()[1:]]
    assert len(paid) == 2
    assert len({(entry["client"], entry["data_set"]) for entry in paid}) == 1


def test_a_server_can_ask_a_site_for_less_than_its_owner_allows(tmp_path: Path) -> None:
    site = private(tmp_path / "site", epsilon=1000)
    assert "Budget" in declined(site.asked(*PRIVATE, "privacy.epsilon_budget=0.5"))


def test_a_site_declines_what_is_not_private_as_its_owner_demands(tmp_path: Path) -> None:
    site = private(tmp_path / "site")
    assert "PolicyError" in declined(site.asked("privacy=none"))
    for_tests = "privacy.randomness=reproducible_for_tests"
    assert "PolicyError" in declined(site.asked(*PRIVATE, for_tests))
    assert "PolicyError" in declined(site.asked("privacy=local"))
    assert not site.ledger.exists()


def test_a_site_without_a_ledger_trains_without_privacy_alone(tmp_path: Path) -> None:
    site = SiteClient(tmp_path / "site", OPEN_POLICY)
    assert not site.asked("privacy=none").has_error()
    assert "PolicyError" in declined(site.asked(*PRIVATE))


def test_a_site_that_allows_any_unit_pays_for_what_it_hides(tmp_path: Path) -> None:
    site = private(tmp_path / "site", unit="any")
    assert not site.asked("privacy=none").has_error()
    assert not site.ledger.exists()
    assert not site.asked(*PRIVATE).has_error()
    assert len(site.ledger.read_text().splitlines()) == 2


def test_a_site_leaves_the_noise_to_the_server_only_if_its_owner_says_so(tmp_path: Path) -> None:
    asked = ("privacy=client", "strategy.aggregation.weighting=uniform")
    site = private(tmp_path / "site", unit="client")
    assert "PolicyError" in declined(site.asked(*asked))
    site.write(site.policy.read_text() + "trust_server: true\n")
    assert not site.asked(*asked).has_error()


def test_consent_can_be_withdrawn_and_given_again_while_the_worker_runs(tmp_path: Path) -> None:
    site = SiteClient(tmp_path / "site", OPEN_POLICY)
    for kind in ("train", "evaluate", "query"):
        site.write(OPEN_POLICY + "consent: false\n")
        answer = site.told(compose_config(list(BASE)), kind=kind)
        assert "PolicyError" in declined(answer)
        site.write(OPEN_POLICY)
        assert not site.told(compose_config(list(BASE)), kind=kind).has_error()


def test_a_site_takes_part_in_its_hours_alone(tmp_path: Path) -> None:
    site, now = SiteClient(tmp_path / "site", OPEN_POLICY), datetime.now()
    soon, later = (f"{now + timedelta(hours=hours):%H:%M}" for hours in (2, 3))
    site.write(OPEN_POLICY + f'hours: "{soon}-{later}"\n')
    assert "PolicyError" in declined(site.asked())
    site.write(OPEN_POLICY + f'hours: "{later}-{soon}"\n')
    assert not site.asked().has_error()


def test_a_site_trains_the_tasks_of_its_policy_alone(tmp_path: Path) -> None:
    site = SiteClient(tmp_path / "site", OPEN_POLICY + "tasks: [breast_cancer]\n")
    assert "PolicyError" in declined(site.asked())
    params = initial("task=breast_cancer")
    config = compose_config([*BASE, "task=breast_cancer"])
    assert not site.told(config, params=params).has_error()


@pytest.mark.parametrize("damage", ["gone", "open", "garbled"])
def test_a_policy_that_cannot_be_used_stops_the_site_at_once(tmp_path: Path, damage: str) -> None:
    site = private(tmp_path / "site")
    assert not site.asked(*PRIVATE).has_error()
    if damage == "gone":
        site.policy.unlink()
    elif damage == "open":
        site.policy.chmod(0o666)
    else:
        site.write("epsilon: 1e9")
    paid = site.ledger.read_text()
    assert "PolicyError" in declined(site.asked(*PRIVATE))
    assert site.ledger.read_text() == paid


# What a server may name --------------------------------------------------------------------------

HOSTILE_TARGETS = [
    ("task", "os.system"),
    ("task", "fl_app.tasks.digits.subprocess.run"),
    ("strategy", "builtins.exec"),
    ("client", "shutil.rmtree"),
    ("privacy", "fl_app.privacy.none.NoPrivacy.__init__"),
    ("client.optimizer", "torch.optim.optimizer.warnings.warn"),
    ("client.optimizer", "torch.optim.sgd"),
    ("client.optimizer", "torch.hub.load"),
    ("strategy", "flwr.serverapp.strategy.fedavg.os.system"),
    ("selection", "torch.optim.SGD"),
    ("stopping", "fl_app.tracking.wandb_tracker.WandbTracker"),
    ("task", "fl_app.engines.compose._called"),
]


@pytest.mark.parametrize(("key", "target"), HOSTILE_TARGETS)
def test_a_server_cannot_name_code_that_the_site_did_not_install_for_that(
    tmp_path: Path, key: str, target: str, caplog: pytest.LogCaptureFixture
) -> None:
    site, config = SiteClient(tmp_path / "site", OPEN_POLICY), compose_config(list(BASE))
    place = config
    for part in key.split("."):
        place[part] = dict(place[part] or {})
        place = place[part]
    place["_target_"] = target
    place["touch"] = str(tmp_path / "touched")
    assert "RefusedRequestError" in declined(site.told(to_json(config)))
    assert f"{key}._target_={target!r} is not code that a server may name" in caplog.text


def test_code_deep_in_a_list_is_found(tmp_path: Path) -> None:
    site, config = SiteClient(tmp_path / "site", OPEN_POLICY), compose_config(list(BASE))
    config["strategy"] = {**config["strategy"], "extra": [{"a": [{"_target_": "os.system"}]}]}
    assert "RefusedRequestError" in declined(site.told(to_json(config)))


def test_optimizers_of_torch_may_be_named(tmp_path: Path) -> None:
    site = SiteClient(tmp_path / "site", OPEN_POLICY)
    config = compose_config([*BASE, "client/optimizer=adam"])
    config["client"]["optimizer"]["_target_"] = "torch.optim.Adamax"
    assert not site.told(config).has_error()


def test_nothing_of_the_sites_environment_is_put_into_a_configuration(tmp_path: Path) -> None:
    site, config = SiteClient(tmp_path / "site", OPEN_POLICY), compose_config(list(BASE))
    config["name"] = "${oc.env:HOME}"
    assert "RefusedRequestError" in declined(site.told(config))


def overridden(site: SiteClient, overrides: str) -> str:
    request = Request(kind=Kind.QUERY, overrides=overrides, node=site.node, patience_s=60.0)
    return site.worker.answer(request, b"")[0].reason


def test_a_site_composes_no_overrides_however_they_are_written(tmp_path: Path) -> None:
    site, touched = SiteClient(tmp_path / "site", OPEN_POLICY), tmp_path / "touched"
    (tmp_path / "conf").mkdir()
    (tmp_path / "config.yaml").write_text(to_json(compose_config(list(BASE))))
    called = f"fl_app.engines.compose._called,command:[touch,{touched}]"
    for overrides in (
        "rounds=5",
        f"--config-dir={tmp_path}/conf",
        f"-cd {tmp_path}/conf",
        f"resume={tmp_path}",
        f"~task '+task={{_tar''get_:{called}}}'",
        f"~task +task={{_tar\\get_:{called}}}",
        "name=$'{oc.env:HOME}'",
    ):
        for config in ("", to_json(compose_config(list(BASE)))):
            request = Request(
                kind=Kind.QUERY,
                config_json=config,
                overrides=overrides,
                node=site.node,
                patience_s=60.0,
            )
            assert "RefusedRequestError" in site.worker.answer(request, b"")[0].reason
    assert not touched.exists()


def test_arguments_without_names_are_refused(tmp_path: Path) -> None:
    site, config = SiteClient(tmp_path / "site", OPEN_POLICY), compose_config(list(BASE))
    config["task"]["_args_"] = ["/etc/passwd"]
    assert "RefusedRequestError" in declined(site.told(to_json(config)))


def test_no_module_is_imported_because_a_server_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    site, config = SiteClient(tmp_path / "site", OPEN_POLICY), compose_config(list(BASE))
    config["task"] = {"_target_": "planted.Task"}
    assert "RefusedRequestError" in declined(site.told(config))
    assert not (tmp_path / "touched").exists()
    site.write(OPEN_POLICY + "code: [planted]\n")
    site.told(config)
    assert (tmp_path / "touched").exists()


def test_what_an_allowed_module_imports_is_not_allowed_by_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "ward7.py").write_text(
        "from os import system\nfrom fl_app.tasks import digits\n"
        "class Digits(digits.Digits):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    site = SiteClient(tmp_path / "site", OPEN_POLICY + "code: [ward7]\n")
    config = compose_config(list(BASE))
    config["task"]["_target_"] = "ward7.Digits"
    assert not site.told(config).has_error()
    for beyond in ("ward7.system", "ward7.digits.Digits", "ward7.digits"):
        config["task"]["_target_"] = beyond
        assert "RefusedRequestError" in declined(site.told(config))
        assert f"task._target_={beyond!r} is not code that a server may name" in caplog.text


# Records of its own ------------------------------------------------------------------------------

TABLE = ("task=table", "task.inputs=3", "partition.num_clients=2", "client.epochs=1")
MEANING = "task: {target: target, inputs: 3, classes: 2}\n"


def tabled(folder: Path, records: int, *, meaning: str = MEANING, **worker: Any) -> SiteClient:
    folder.mkdir(mode=0o700)
    own = table(folder / "own.csv", records)
    return SiteClient(folder, OPEN_POLICY + f"data: {own}\n" + meaning, **worker)


def asking(folder: Path, *overrides: str) -> tuple[dict[str, Any], Params]:
    """Return what a server with a table of its own sends."""
    theirs = table(folder / "theirs.csv", 400)
    given = [*TABLE, f"task.path={theirs}", *overrides]
    return compose_config(given), initial(*TABLE, f"task.path={theirs}")


def test_a_site_trains_on_its_own_file_whichever_one_a_server_names(tmp_path: Path) -> None:
    site = tabled(tmp_path / "site", 40, name="ward-7")
    config, params = asking(tmp_path)
    update = codec.decode_update(site.told(config, params=params), "ward-7")
    assert update.num_examples == 32
    assert update.evaluation is not None and update.evaluation.num_examples == 8
    assert codec.decode_description(site.told(config, kind="query")).client == "ward-7"


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=federation"],
        ["strategy=multikrum", "strategy.aggregation.num_malicious=0"],
        ["privacy=client", "selection=poisson", "strategy=fedavg", "privacy.planned_rounds=3"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_a_site_with_its_own_file_is_one_of_however_many_a_round_asks(
    tmp_path: Path, overrides: list[str]
) -> None:
    site = tabled(tmp_path / "site", 40, name="ward-7")
    config, _ = asking(tmp_path, *overrides, "partition.num_clients=5", "selection.min_clients=5")
    described = codec.decode_description(site.told(config, kind="query"))
    assert described.client == "ward-7"


def test_how_a_sites_records_are_split_is_never_the_servers_to_say(tmp_path: Path) -> None:
    site = tabled(tmp_path / "site", 40, meaning=MEANING + "test_fraction: 0.25\n")
    told, (_, params) = [], asking(tmp_path)
    for overrides in (["seed=1"], ["seed=2", "partition.test_fraction=0.9"]):
        config, _ = asking(tmp_path, *overrides)
        told.append(codec.decode_evaluation(site.told(config, kind="evaluate", params=params)))
    assert told[0] == told[1]
    assert told[0].num_examples == 10


@pytest.mark.parametrize("key", ["target=x0", "classes=9", "inputs=2"])
def test_what_a_sites_columns_mean_is_never_the_servers_to_say(tmp_path: Path, key: str) -> None:
    site = tabled(tmp_path / "site", 40)
    config, params = asking(tmp_path)
    right = site.told(config, params=params)
    name, _, value = key.partition("=")
    config["task"][name] = value if name == "target" else int(value)
    asked = site.told(config, params=params)
    assert dict(asked.content["metrics"]) == dict(right.content["metrics"])


def test_an_owner_who_does_not_say_what_columns_mean_is_told_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = tabled(tmp_path / "site", 40, meaning="")
    config, params = asking(tmp_path)
    assert "PolicyError" in declined(site.told(config, params=params))
    assert "its owner has to add task: {target: ..., inputs: ..., classes: ...}" in caplog.text


def test_records_that_are_taken_out_of_the_file_are_trained_on_no_more(tmp_path: Path) -> None:
    site = tabled(tmp_path / "site", 40)
    config, params = asking(tmp_path)
    assert codec.decode_update(site.told(config, params=params), "site").num_examples == 32
    table(tmp_path / "site" / "own.csv", 20)
    assert codec.decode_update(site.told(config, params=params), "site").num_examples == 16


def test_which_file_is_read_is_never_the_servers_to_say(tmp_path: Path) -> None:
    site = SiteClient(tmp_path / "site", OPEN_POLICY)
    config, _ = asking(tmp_path)
    assert "PolicyError" in declined(site.told(config, params={}))


def test_a_task_with_records_of_its_own_is_not_what_a_site_with_data_trains(tmp_path: Path) -> None:
    assert "PolicyError" in declined(tabled(tmp_path / "site", 40).asked())


def test_a_task_cannot_be_called_what_the_owner_allows(tmp_path: Path) -> None:
    site = tabled(tmp_path / "site", 40, meaning=MEANING + "tasks: [ecg]\n")
    config, params = asking(tmp_path)
    config["task"]["name"] = "ecg"
    assert site.told(to_json(config), params=params).has_error()


# What is told ------------------------------------------------------------------------------------


def test_what_a_site_says_of_an_error_names_neither_its_size_nor_its_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = private(tmp_path / "site")
    size = str(codec.decode_update(site.asked(*PRIVATE), "0").num_examples)
    for asks in (["client.batch_size=100000"], ["privacy.delta=0.5"]):
        reason = failed(site.asked(*PRIVATE, *asks, unchecked=True))
        assert size not in reason
        assert str(tmp_path) not in reason
    assert any(size in record.getMessage() for record in caplog.records)


def test_a_site_that_is_too_late_says_that_and_no_more(tmp_path: Path) -> None:
    site = private(tmp_path / "site", epsilon=1000)
    kind, reason = failure_of(site.asked(*PRIVATE, patience_s=-1.0))  # type: ignore[misc]
    assert kind is FailureKind.TIMEOUT
    assert "epoch" not in reason


def test_versions_that_differ_in_more_than_the_last_number_are_named(tmp_path: Path) -> None:
    site, config = SiteClient(tmp_path / "site", OPEN_POLICY), compose_config(list(BASE))
    assert not site.told(config, version="0.1.99").has_error()
    reason = failed(site.told(config, version="0.2.0"))
    assert "the server runs fl-app 0.2.0 and this site 0.1." in reason
    assert "upgrade the older one" in reason


@pytest.mark.parametrize("value", ["one", 1.5, True, [1, 2], 0, -1, 10**12])
def test_a_round_that_is_no_number_never_reaches_the_ledger(tmp_path: Path, value: Any) -> None:
    site = private(tmp_path / "site")
    config = settled(compose_config([*BASE, *PRIVATE]))
    assert site.told(config, round=value).has_error()
    assert not site.ledger.exists()
    assert not site.told(config).has_error()
    Ledger(site.ledger).verify()


def test_what_a_server_writes_is_one_short_line_of_a_sites_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site, config = SiteClient(tmp_path / "site", OPEN_POLICY), compose_config(list(BASE))
    config["task"] = {"_target_": "x\n2026-11-23 all is well" + "y" * 100_000}
    site.told(to_json(config))
    config["task"] = {"a\nforged" * 1000: 1, "_target_": "fl_app.tasks.digits.Digits"}
    site.told(to_json(config))
    lines = [record.getMessage() for record in caplog.records]
    assert lines
    assert all("\n" not in line and len(line) < 1100 for line in lines)


def test_a_site_forgets_what_it_remembers_of_runs_long_gone(tmp_path: Path) -> None:
    for number in range(15):
        (tmp_path / f"run{number}" / "0").mkdir(parents=True)
        os.utime(tmp_path / f"run{number}", (number, number))
    forget_runs(tmp_path, keep=10)
    assert {path.name for path in tmp_path.iterdir()} == {f"run{n}" for n in range(5, 15)}


def test_no_message_takes_longer_than_the_site_allows(tmp_path: Path) -> None:
    site = SiteClient(tmp_path / "site", OPEN_POLICY, most_round_s=0.5)
    began = time.monotonic()
    answer = site.asked("client.epochs=1000000", patience_s=3600.0)
    kind, _ = failure_of(answer)  # type: ignore[misc]
    assert kind is FailureKind.TIMEOUT
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("body", [b"\x00" * 100, b"\x0a\xff\xff\xff\xff\x7f", b"{}"])
def test_garbage_is_answered_by_an_error(tmp_path: Path, body: bytes) -> None:
    site = SiteClient(tmp_path / "site", OPEN_POLICY)
    request = Request(
        kind=Kind.TRAIN,
        config_json=to_json(compose_config(list(BASE))),
        node=site.node,
        patience_s=60.0,
    )
    reply, answer = site.worker.answer(request, body)
    assert reply.code and not answer
