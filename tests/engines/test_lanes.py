"""A cohort shared out to several processes, and what becomes of it when one of them dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers import alike, play, rounds_of, summary_of

from fl_app import vectorizing
from fl_app.engines.lanes import LaneError, Lanes
from fl_app.params import StackedParams
from fl_app.training import Trained, TrainedModel
from fl_app.types import (
    ClientId,
    Evaluation,
    Failure,
    FailureKind,
    Params,
    TrainInstruction,
)

MODEL = {"w": torch.zeros(2, 3), "b": torch.zeros(()), "d": torch.zeros(2, dtype=torch.float64)}
CLIENTS = [str(k) for k in range(11)]
TWO_ROUNDS = ("rounds=2", "partition.num_clients=12", "selection.fraction=1.0")


def params(value: float) -> Params:
    return {name: tensor + value for name, tensor in MODEL.items()}


class Adding:
    """Each client adds its own number to the received model; "3" fails; "raise" is our fault."""

    side_by_side = True
    at_once = 2

    def forget(self) -> None:
        pass

    def __call__(
        self, clients: Sequence[ClientId], instruction: TrainInstruction
    ) -> list[Trained | Failure]:
        return added(clients, instruction)


def added(clients: Sequence[ClientId], instruction: TrainInstruction) -> list[Trained | Failure]:
    if "raise" in clients:
        raise ValueError("what nobody but us is to blame for")
    rows = {
        name: torch.stack([tensor + float(client) for client in clients])
        for name, tensor in instruction.params.items()
    }
    stack = StackedParams(rows)
    return [
        Failure(client=client, kind=FailureKind.ERROR, reason=f"on strike in {instruction.round}")
        if client == "3"
        else Trained(
            count=int(client),
            model=TrainedModel(
                # Of some the delta is no row of a stack: those that were trained one by one.
                delta=stack.row(row) if int(client) % 3 else dict(stack.row(row)),
                metrics={"pid": float(os.getpid())},
                optimizer_state={},
            ),
            evaluation=Evaluation(num_examples=1, metrics={"loss": float(client)}),
        )
        for row, client in enumerate(clients)
    ]


def test_every_client_is_answered_for_in_its_place_whichever_process_trains_it() -> None:
    lanes = Lanes(Adding(), MODEL, processes=3, most_clients=len(CLIENTS))
    try:
        for round in (1, 2):
            instruction = TrainInstruction(round=round, params=params(10.0 * round))
            outcomes = lanes(CLIENTS, instruction)
            pids = set()
            for client, outcome in zip(CLIENTS, outcomes, strict=True):
                if client == "3":
                    assert isinstance(outcome, Failure)
                    assert outcome.reason == f"on strike in {round}"
                    continue
                assert isinstance(outcome, Trained)
                assert outcome.count == outcome.evaluation.metrics["loss"] == int(client)
                expected = params(10.0 * round + int(client))
                assert outcome.model.delta.keys() == expected.keys()
                for name, tensor in expected.items():
                    assert torch.equal(outcome.model.delta[name], tensor)
                    assert outcome.model.delta[name].dtype == tensor.dtype
                pids.add(outcome.model.metrics["pid"])
            assert len(pids) == 3
            assert os.getpid() in pids
    finally:
        lanes.close()


def test_what_a_round_has_left_stays_until_the_next_and_more_than_fits_is_trained_here() -> None:
    lanes = Lanes(Adding(), MODEL, processes=2, most_clients=6)
    try:
        instruction = TrainInstruction(round=1, params=params(0.0))
        first = lanes(CLIENTS[4:8], instruction)
        more = lanes(CLIENTS[8:], instruction)  # a part of a cohort that was over-selected
        for client, outcome in zip(CLIENTS[4:], [*first, *more], strict=True):
            assert isinstance(outcome, Trained)
            assert torch.equal(outcome.model.delta["w"], torch.full((2, 3), float(client)))
        here = [o.model.metrics["pid"] == os.getpid() for o in (*first, *more)]
        assert sum(not mine for mine in here) == 3  # of six, half of them
    finally:
        lanes.close()


def test_what_is_forgotten_leaves_its_memory_to_the_rest_of_the_round() -> None:
    lanes = Lanes(Adding(), MODEL, processes=2, most_clients=4)
    try:
        assert lanes.at_once == 4
        for clients in (CLIENTS[4:8], CLIENTS[7:11]):
            outcomes = lanes(clients, TrainInstruction(round=1, params=params(0.0)))
            here = []
            for client, outcome in zip(clients, outcomes, strict=True):
                assert isinstance(outcome, Trained)
                assert torch.equal(outcome.model.delta["w"], torch.full((2, 3), float(client)))
                here.append(outcome.model.metrics["pid"] == os.getpid())
            assert sum(here) == 2
            lanes.forget()
    finally:
        lanes.close()


def test_an_error_of_ours_in_another_process_is_told_with_its_traceback() -> None:
    lanes = Lanes(Adding(), MODEL, processes=2, most_clients=4)
    try:
        with pytest.raises(LaneError, match="what nobody but us is to blame for"):
            lanes(["1", "raise"], TrainInstruction(round=1, params=params(0.0)))
    finally:
        lanes.close()


def test_a_process_that_is_killed_ends_the_run_with_a_word_on_what_to_do() -> None:
    lanes = Lanes(Adding(), MODEL, processes=2, most_clients=4)
    try:
        [lane] = lanes._lanes
        os.kill(lane._process.pid, signal.SIGKILL)
        lane._process.join()
        for words in (r"engine\.workers=1", "resume the run"):
            with pytest.raises(LaneError, match=words):
                lanes(["1", "2"], TrainInstruction(round=1, params=params(0.0)))
    finally:
        lanes.close()


def test_no_process_outlives_its_lanes() -> None:
    lanes = Lanes(Adding(), MODEL, processes=3, most_clients=4)
    processes = [lane._process for lane in lanes._lanes]
    began = time.monotonic()
    lanes.close()
    assert not any(process.is_alive() for process in processes)
    assert time.monotonic() - began < 5.0


@pytest.mark.slow
def test_a_model_that_keeps_a_core_busy_is_trained_one_by_one_in_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectorizing, "HEAVY_FLOPS", 1.0)
    runs = {
        name: play(tmp_path / name, *TWO_ROUNDS, "client.failure_fraction=0.2", *overrides)
        for name, overrides in {
            "heavy": ("engine.workers=2",),
            "alone": ("engine.vectorize=false",),
        }.items()
    }
    assert {summary_of(run)["training"] for run in runs.values()} == {"one by one"}
    assert alike(rounds_of(runs["heavy"]), rounds_of(runs["alone"]))
    assert sum(len(entry["failures"]) for entry in rounds_of(runs["heavy"])) > 0


@pytest.mark.parametrize("privacy", [(), ("privacy=record", "client.batch_size=8")])
def test_a_run_in_two_processes_is_that_in_one(privacy: Sequence[str], tmp_path: Path) -> None:
    tests_own = ("privacy.randomness=reproducible_for_tests",) if privacy else ()
    one, two = (
        play(tmp_path / f"{n}", *TWO_ROUNDS, *privacy, *tests_own, f"engine.workers={n}")
        for n in (1, 2)
    )
    assert summary_of(one)["training"] == summary_of(two)["training"] == "cohort"
    assert alike(rounds_of(one), rounds_of(two))
    assert alike(summary_of(one)["metrics"], summary_of(two)["metrics"])
