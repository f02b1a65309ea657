from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_app.config_keys import UNHASHED_KEYS
from fl_app.params import model_hash
from fl_app.tracking.json_files import strict_json
from fl_app.tracking.summary import (
    Communication,
    Failures,
    Fairness,
    Privacy,
    PrivacyUnit,
    StopReason,
    Summary,
    Times,
    config_hash,
    fairness_of,
    totals_of,
    write_json_atomically,
)
from fl_app.types import Failure, FailureKind, RoundReport

quick = settings(max_examples=60, deadline=None)


def summary(**changes: object) -> Summary:
    given = {
        "task": "digits",
        "engine": "local",
        "strategy": "fedavg",
        "seed": 7,
        "rounds": 20,
        "clients": 10,
        "cohort_size": 8,
        "config_hash": "c" * 64,
        "model_hash": "d" * 64,
        "metrics": {"loss": 0.5, "accuracy": 0.9},
        "time_s": Times(setup=1.0, total=9.0, per_round=0.4),
    }
    return Summary(**{**given, **changes})  # type: ignore[arg-type]


def failure(kind: FailureKind) -> Failure:
    return Failure(client="0", kind=kind, reason="")


def test_a_summary_has_the_keys_of_the_contract() -> None:
    written = summary(
        privacy=Privacy(unit=PrivacyUnit.RECORD, epsilon_max=2.0, delta=1e-5, accountant="prv"),
        stopped_by=StopReason.TARGET,
    ).to_json()
    assert set(written) == {
        *("task", "engine", "strategy", "seed", "rounds", "clients", "cohort_size"),
        *("config_hash", "model_hash", "metrics", "fairness", "privacy", "communication"),
        *("failures", "time_s", "resumed_from_round", "stopped_by", "training"),
    }
    assert written["fairness"] == {
        "accuracy_min": None,
        "accuracy_p10": None,
        "accuracy_std": None,
        "clients": 0,
    }
    assert written["privacy"] == {
        "unit": "record",
        "epsilon_max": 2.0,
        "epsilon_mean": None,
        "delta": 1e-5,
        "accountant": "prv",
        "noise_multiplier": None,
    }
    assert written["communication"] == {
        "uplink_bytes": 0,
        "downlink_bytes": 0,
        "uplink_uncompressed_bytes": 0,
    }
    assert written["failures"] == {"clients": 0, "rejected_updates": 0}
    assert written["time_s"] == {"setup": 1.0, "total": 9.0, "per_round": 0.4}
    assert written["stopped_by"] == "target"
    assert written["resumed_from_round"] is None


def test_numbers_that_are_not_finite_are_null() -> None:
    written = summary(
        metrics={"loss": math.nan, "perplexity": math.inf},
        privacy=Privacy(unit=PrivacyUnit.CLIENT, epsilon_max=math.inf),
    ).to_json()
    assert written["metrics"] == {"loss": None, "perplexity": None}
    assert written["privacy"]["epsilon_max"] is None  # type: ignore[index, call-overload]
    json.dumps(written, allow_nan=False)


@quick
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_fairness_is_what_numpy_says(values: list[float]) -> None:
    fairness = fairness_of({str(i): value for i, value in enumerate(values)})
    assert fairness.clients == len(values)
    assert fairness.accuracy_min == min(values)
    assert fairness.accuracy_p10 == pytest.approx(np.percentile(values, 10), abs=1e-12)
    assert fairness.accuracy_std == pytest.approx(np.std(values), abs=1e-12)


def test_clients_that_were_not_measured_do_not_count() -> None:
    assert fairness_of({}) == Fairness()
    assert fairness_of({"0": math.nan}) == Fairness()
    assert fairness_of({"0": math.nan, "1": 0.25}) == Fairness(
        accuracy_min=0.25, accuracy_p10=0.25, accuracy_std=0.0, clients=1
    )


def test_totals_add_up_the_rounds_and_tell_refused_updates_from_missing_ones() -> None:
    kinds = [FailureKind.REJECTED, FailureKind.OFFLINE, FailureKind.TIMEOUT, FailureKind.ERROR]
    reports = [
        RoundReport(
            round=number,
            cohort=("0",),
            num_updates=1,
            applied=True,
            failures=tuple(failure(kind) for kind in kinds[:number]),
            uplink_bytes=10 * number,
            downlink_bytes=100,
            uplink_uncompressed_bytes=40,
            seconds=seconds,
        )
        for number, seconds in ((1, 1.0), (2, 9.0), (4, 2.0))
    ]
    totals = totals_of(iter(reports))
    assert totals.rounds == 3
    assert totals.communication == Communication(
        uplink_bytes=70, downlink_bytes=300, uplink_uncompressed_bytes=120
    )
    assert totals.failures == Failures(clients=4, rejected_updates=3)
    assert totals.median_round_s == 2.0
    assert totals_of([]).median_round_s is None


CONFIG: dict[str, object] = {
    "name": "a",
    "output_url": "outputs",
    "resume": None,
    "tracking": {"console": True},
    "engine": {"name": "local", "workers": 2},
    "strategy": {"lr": 0.1, "betas": (0.9, 0.99)},
    "rounds": 3,
}


@pytest.mark.parametrize("key", UNHASHED_KEYS)
def test_a_key_that_changes_no_result_changes_no_hash(key: str) -> None:
    changed: dict[str, object] = {**CONFIG, "engine": {"name": "local", "workers": 2}}
    head, _, rest = key.partition(".")
    target = changed[head] if rest else changed
    assert isinstance(target, dict)
    target[rest or head] = "something else"
    assert config_hash(changed) == config_hash(CONFIG)
    del target[rest or head]
    assert config_hash(changed) == config_hash(CONFIG)


@pytest.mark.parametrize(
    "change",
    [
        {"rounds": 4},
        {"rounds": "3"},
        {"rounds": None},
        {"strategy": {"lr": 0.1, "betas": (0.99, 0.9)}},
        {"strategy": {"lr": math.inf, "betas": (0.9, 0.99)}},
        {"engine": {"name": "simulation", "workers": 2}},
        {"workers": 2},
    ],
)
def test_any_other_change_of_the_config_changes_its_hash(change: dict[str, object]) -> None:
    assert config_hash({**CONFIG, **change}) != config_hash(CONFIG)


def test_the_config_hash_ignores_order_and_tells_none_nan_and_inf_apart() -> None:
    assert config_hash(dict(reversed(CONFIG.items()))) == config_hash(CONFIG)
    assert len({config_hash({"clip": value}) for value in (None, math.nan, math.inf)}) == 3


def test_hashing_a_config_leaves_it_as_it_was() -> None:
    config = {"name": "a", "engine": {"workers": 2}}
    config_hash(config)
    assert config == {"name": "a", "engine": {"workers": 2}}


def test_the_model_hash_is_that_of_the_documented_bytes() -> None:
    params = {"w": torch.tensor([[1.0, -2.0]]), "b": torch.tensor(3, dtype=torch.int64)}
    expected = b'["b","int64",[]]\n' + struct.pack("<q", 3)
    expected += b'["w","float32",[1,2]]\n' + struct.pack("<2f", 1.0, -2.0)
    assert model_hash(params) == hashlib.sha256(expected).hexdigest()


def test_the_model_hash_sees_names_dtypes_shapes_and_single_bits_but_no_order() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    nudged = torch.zeros(2, 3)
    nudged[1, 2] = -0.0
    others = [
        {"a": torch.zeros(3, 2), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3, dtype=torch.float64), "b": torch.ones(1)},
        {"c": torch.zeros(2, 3), "b": torch.ones(1)},
        {"a": nudged, "b": torch.ones(1)},
    ]
    assert model_hash({"b": base["b"], "a": base["a"]}) == model_hash(base)
    assert len({model_hash(params) for params in [base, *others]}) == 5


def test_the_model_hash_does_not_see_the_memory_layout_or_the_graph() -> None:
    rows = torch.arange(6.0).reshape(2, 3)
    columns = rows.t().contiguous().t()
    assert not columns.is_contiguous()
    assert model_hash({"w": columns}) == model_hash({"w": rows})
    assert model_hash({"w": rows.clone().requires_grad_()}) == model_hash({"w": rows})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.uint8])
def test_any_dtype_and_an_empty_tensor_can_be_hashed(dtype: torch.dtype) -> None:
    params = {"w": torch.ones(3, dtype=dtype), "empty": torch.ones(0, 4, dtype=dtype)}
    assert len(model_hash(params)) == 64


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json_atomically(path, {"a": math.nan})
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        write_json_atomically(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": None}
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_a_rename_that_fails_leaves_no_draft(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_json_atomically(tmp_path / "taken", {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


def test_numpy_scalars_enums_and_paths_become_plain_json() -> None:
    value = {"a": np.float32(0.5), "b": np.int64(3), "c": PrivacyUnit.RECORD, "d": Path("x")}
    assert strict_json(value) == {"a": 0.5, "b": 3, "c": "record", "d": "x"}
    assert type(strict_json(PrivacyUnit.RECORD)) is str
