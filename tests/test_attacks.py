"""Simulated hostile clients: what they send, who they are, and what the rules make of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import REPOSITORY, TINY, play, rounds_of, summary_of
from torch import Tensor

from fl_app.attacks import (
    Attack,
    Counts,
    LabelFlip,
    LittleIsEnough,
    NoAttack,
    NotANumber,
    Scaled,
    safest_z,
    within_the_spread,
)
from fl_app.client import ClientRuntime
from fl_app.client_state import MemoryClientState
from fl_app.components import Components, build
from fl_app.config import compose_config, to_json
from fl_app.federation import initial_model, run_federation
from fl_app.site import SimulatedSite
from fl_app.types import ClientExamples, ConfigError, Examples, Params, TrainInstruction

COUNTS = Counts(clients=20, hostile=4)
OWN = {"w": torch.tensor([1.0, -2.0]), "b": torch.tensor([0.5])}


def alone(attack: Attack) -> Params:
    """Return what an attack sends that looks at nobody else."""

    def nobody(count: int) -> Sequence[Params]:
        raise AssertionError("asked for accomplices")

    return attack.forge(OWN, nobody, COUNTS)


def test_forged_updates_are_what_their_names_say() -> None:
    assert alone(NoAttack()) == OWN
    assert alone(Scaled(factor=-1.0))["w"].tolist() == [-1.0, 2.0]
    assert alone(Scaled(factor=100.0))["b"].tolist() == [50.0]
    assert alone(LabelFlip()) == OWN
    assert all(bool(tensor.isnan().all()) for tensor in alone(NotANumber()).values())


def test_a_little_is_enough_is_the_mean_less_z_deviations_of_the_accomplices() -> None:
    updates = [{"w": torch.tensor([value, 0.0])} for value in (1.0, 2.0, 6.0)]
    # Mean 3, deviation sqrt((4 + 1 + 9) / 2).
    expected = 3 - 1.5 * math.sqrt(7)
    asked: list[int] = []

    def accomplices(count: int) -> Sequence[Params]:
        asked.append(count)
        return updates

    forged = LittleIsEnough(z=1.5, accomplices=7).forge(OWN, accomplices, COUNTS)
    torch.testing.assert_close(forged["w"], torch.tensor([expected, 0.0]))
    assert asked == [7]
    assert within_the_spread(updates[:1], 1.5)["w"].tolist() == [1.0, 0.0]


def test_the_safest_z_is_that_of_the_paper() -> None:
    # Baruch et al. 2019: of n = 50 with m = 24, two supporters are needed: Phi(z) = 24 / 26.
    assert safest_z(50, 24) == pytest.approx(1.4260768722)
    assert safest_z(20, 0) == 0.0  # nobody hostile: more than half would have to be passed
    assert safest_z(10, 6) == 4.0


def test_flipped_labels_are_those_of_training_alone() -> None:
    examples = ClientExamples(
        train=Examples(inputs=torch.zeros(3, 1), targets=torch.tensor([0, 3, 9])),
        validation=Examples(inputs=torch.zeros(1, 1), targets=torch.tensor([4])),
        test=Examples(inputs=torch.zeros(1, 1), targets=torch.tensor([4])),
    )
    flipped = LabelFlip().poison(examples, 10)
    assert flipped.train.targets.tolist() == [9, 6, 0]
    assert flipped.validation is not None
    assert flipped.validation.targets.tolist() == [5]
    assert flipped.test is examples.test
    values = replace(examples, train=Examples(inputs=torch.zeros(1, 1), targets=torch.ones(1)))
    assert LabelFlip().poison(values, 1).train.targets.tolist() == [-1.0]


def test_one_in_five_is_hostile_and_the_seed_says_which() -> None:
    clients = [str(number) for number in range(20)]
    drawn = Scaled(factor=1.0, fraction=0.2).hostile(clients, 1)
    assert len(drawn) == 4
    assert drawn <= set(clients)
    assert drawn == LabelFlip(fraction=0.2).hostile(clients, 1)
    assert drawn != LabelFlip(fraction=0.2).hostile(clients, 2)
    assert NoAttack().hostile(clients, 1) == frozenset()


def runtime(*overrides: str) -> tuple[ClientRuntime, Components, TrainInstruction]:
    config = compose_config(["task/model=logistic", "partition.num_clients=20", *overrides])
    parts = build(to_json(config))
    made = ClientRuntime(
        task=parts.task,
        data=parts.data,
        training=parts.training,
        objective=parts.algorithm.objective,
        seed=parts.seed,
        states=MemoryClientState(),
        privacy=parts.privacy,
        site=SimulatedSite(privacy=parts.privacy, data_set="test"),
    )
    return made, parts, TrainInstruction(round=3, params=initial_model(parts, None)[0])


def flat(params: Params) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in params.values()])


def updates_of(*overrides: str) -> dict[str, Tensor]:
    made, parts, instruction = runtime(*overrides)
    return {c: flat(made.train(c, instruction).delta) for c in parts.data.clients}


def test_only_hostile_clients_deviate_and_as_their_attack_says() -> None:
    honest = updates_of()
    _, parts, _ = runtime("client/attack=sign_flip")
    hostile = parts.training.attack.hostile(parts.data.clients, parts.seed)
    for attack, factor in (("sign_flip", -1), ("scaled", 100)):
        sent = updates_of(f"client/attack={attack}")
        for client, delta in sent.items():
            expected = honest[client] * (factor if client in hostile else 1)
            assert torch.equal(delta, expected)
    # Four that agree, on the mean less z deviations of what they would have sent honestly.
    sent = updates_of("client/attack=alie", "client.attack.z=1.5")
    would = torch.stack([honest[client] for client in sorted(hostile, key=int)])
    for client, delta in sent.items():
        forged = would.mean(dim=0) - 1.5 * would.std(dim=0)
        torch.testing.assert_close(
            delta, forged if client in hostile else honest[client], rtol=0, atol=1e-6
        )


def test_a_label_flip_is_honest_training_on_false_labels() -> None:
    honest, sent = updates_of(), updates_of("client/attack=label_flip")
    made, parts, instruction = runtime("client/attack=label_flip", "client.attack.fraction=1")
    changed = {client for client in honest if not torch.equal(honest[client], sent[client])}
    assert changed == parts.training.attack.__class__(fraction=0.2).hostile(
        parts.data.clients, parts.seed
    )
    # Digit d becomes 9 - d, so the rows of the last layer change places, if it began at zero.
    zero = {name: torch.zeros_like(tensor) for name, tensor in instruction.params.items()}
    from_zero = TrainInstruction(round=3, params=zero)
    flipped = made.train("0", from_zero).delta
    straight = runtime()[0].train("0", from_zero).delta
    for name, tensor in straight.items():
        torch.testing.assert_close(flipped[name], tensor.flip(0), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["alie", "label_flip"])
def test_an_attacked_run_has_the_same_bits_in_any_number_of_processes(
    attack: str, tmp_path: Path
) -> None:
    hostile = (f"client/attack={attack}", "client.attack.fraction=0.5")
    one, two = (
        play(tmp_path / f"{n}", f"engine.workers={n}", "engine.vectorize=false", *hostile)
        for n in (1, 2)
    )
    assert summary_of(one)["model_hash"] == summary_of(two)["model_hash"]
    assert summary_of(one)["model_hash"] != summary_of(play(tmp_path / "none"))["model_hash"]


def test_nan_is_rejected_and_costs_its_sender_alone(tmp_path: Path) -> None:
    attacked = play(tmp_path / "run", "client/attack=not_a_number", "selection.fraction=1")
    for entry in rounds_of(attacked):
        assert [failure["kind"] for failure in entry["failures"]] == ["rejected"]
        assert entry["applied"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["client/attack=alie", "client.attack.fraction=1.5"], ["client.attack.fraction=1.5"]),
        (["client/attack=alie", "client.attack.accomplices=1"], ["accomplices=1", ">= 2"]),
        (["client.attack=null"], ["client.attack"]),
        (
            ["client/attack=scaled", "client_app.app=their.app:app"],
            ["client.attack=Scaled", "client_app.app=their.app:app", "client/attack=none"],
        ),
    ],
)
def test_an_attack_that_cannot_be_is_one_message(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build(to_json(compose_config(overrides)))
    for word in words:
        assert word in str(caught.value)


def test_real_clients_are_not_told_to_be_hostile() -> None:
    deployed: Any = object()  # any Grid that is neither ours nor a simulation's
    config = compose_config([*TINY, "client/attack=scaled"])
    with pytest.raises(ConfigError, match=r"client\.attack=Scaled.*simulated clients"):
        run_federation(config, deployed, launched_at=0.0)


def shown(heading: str) -> dict[str, dict[str, float]]:
    """Return README's first table after a heading: row -> column -> number."""
    section = (REPOSITORY / "README.md").read_text().split(f"## {heading}\n", 1)[1]
    lines = [line for line in section.split("\n## ")[0].splitlines() if line.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(head[1:], map(float, row[1:]), strict=True)) for row in rows}


@pytest.mark.slow
@pytest.mark.timeout(300)  # seven runs
def test_each_rule_withstands_real_training_on_false_labels_as_the_readme_says(
    tmp_path: Path,
) -> None:
    for rule, accuracies in shown("Under attack").items():
        overrides = ("experiment=under_attack", f"strategy={rule}", "client/attack=label_flip")
        run_dir = play(tmp_path / rule, *overrides, "progress=none", tiny=False)
        # Another build of torch sums in another order: 360 digits are held out.
        accuracy = summary_of(run_dir)["metrics"]["accuracy"]
        assert accuracy == pytest.approx(accuracies["label_flip"], abs=0.03)


def test_choices_of_the_command_line_win_over_those_of_an_experiment() -> None:
    attacked = compose_config(["experiment=under_attack", "strategy=krum"])
    assert attacked["client"]["attack"]["factor"] == -1.0
    assert attacked["strategy"]["aggregation"]["num_malicious"] == 4
    other = compose_config(["client/attack=alie", "experiment=under_attack", "num_malicious=2"])
    assert other["client"]["attack"]["_target_"].endswith("LittleIsEnough")
    assert other["num_malicious"] == 2
    iid = compose_config(["experiment=non_iid", "partition=shard", "strategy=fedprox"])
    assert iid["partition"]["_target_"].endswith("Shard")
