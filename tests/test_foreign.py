"""A ClientApp in the style of Flower's PyTorch quickstart, written without a thought of ours."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from helpers import play_config, rounds_of, summary_of
from safetensors.torch import load_file

from fl_app.codec import MalformedReplyError
from fl_app.components import build
from fl_app.config import compose_config, resumed_config, to_json
from fl_app.engines.local import adopt_identity
from fl_app.foreign import ClientAppChoice, OurReplies, StockReplies
from fl_app.types import ConfigError

TASK = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4 * 4 * 4, 3)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).flatten(1))


def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    pixels = 0.3 * torch.randn(count, 1, 6, 6, generator=generator)
    pixels[torch.arange(count), 0, labels] += 1  # the class is the bright row
    return pixels, labels


def central():
    return images(300, seed=99)


def load_data(partition_id, num_partitions, batch_size):
    assert 0 <= partition_id < num_partitions
    train = TensorDataset(*images(40 + 10 * partition_id, seed=partition_id))
    test = TensorDataset(*images(20, seed=1000 + partition_id))
    return DataLoader(train, batch_size=batch_size, shuffle=True), DataLoader(test, batch_size=20)


def train(net, loader, epochs, lr):
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    net.train()
    total = 0.0
    for _ in range(epochs):
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss = criterion(net(inputs), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / len(loader) / epochs


def test(net, loader):
    net.eval()
    with torch.no_grad():
        (inputs, labels), = loader
        outputs = net(inputs)
    loss = nn.functional.cross_entropy(outputs, labels).item()
    return loss, (outputs.argmax(1) == labels).float().mean().item()
"""

CLIENT_APP = """
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from their_app.task import Net, load_data
from their_app.task import test as test_fn
from their_app.task import train as train_fn

app = ClientApp()


@app.train()
def train(msg: Message, context: Context):
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    trainloader, _ = load_data(
        context.node_config["partition-id"],
        context.node_config["num-partitions"],
        context.run_config["batch-size"],
    )
    config = msg.content["config"]
    train_loss = train_fn(model, trainloader, context.run_config["local-epochs"], config["lr"])
    calls = context.state.config_records.get("calls", ConfigRecord({"rounds": []}))
    calls["rounds"] = [*calls["rounds"], config["server-round"]]
    context.state["calls"] = calls
    if len(calls["rounds"]) == 2 and context.node_config["partition-id"] == 0:
        raise RuntimeError("no second time")
    metrics = {
        "train_loss": train_loss,
        "num-examples": len(trainloader.dataset),
        "calls": len(calls["rounds"]),
    }
    content = RecordDict(
        {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)}
    )
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    _, loader = load_data(
        context.node_config["partition-id"],
        context.node_config["num-partitions"],
        context.run_config["batch-size"],
    )
    loss, accuracy = test_fn(model, loader)
    metrics = {"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(loader.dataset)}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)
"""

OVERRIDES = (
    "task=theirs",
    "partition.num_clients=4",
    "selection.fraction=1",
    "rounds=3",
    "progress=none",
    "checkpoint_every=1",
    "client_app.app=their_app.client_app:app",
    "+client_app.train_config.lr=0.05",
    "+client_app.run_config.local-epochs=1",
    "+client_app.run_config.batch-size=10",
)

YAML = """
_target_: fl_app.tasks.own.OwnTask
records: {_target_: their_app.task.central, _partial_: true}
model: {_target_: their_app.task.Net, _partial_: true}
"""


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put the package on the path, of worker processes too; return the folder of its YAML."""
    package = tmp_path / "site" / "their_app"
    package.mkdir(parents=True)
    for name, content in (("__init__", ""), ("task", TASK), ("client_app", CLIENT_APP)):
        (package / f"{name}.py").write_text(content)
    (tmp_path / "conf" / "task").mkdir(parents=True)
    (tmp_path / "conf" / "task" / "theirs.yaml").write_text(YAML)
    monkeypatch.syspath_prepend(str(package.parent))
    build.cache_clear()
    yield tmp_path / "conf"
    for name in [name for name in sys.modules if name.split(".")[0] == "their_app"]:
        del sys.modules[name]
    build.cache_clear()


def composed(conf: Path, run_dir: Path, *overrides: str) -> dict[str, Any]:
    config = compose_config([*OVERRIDES, *overrides], [conf])
    return {**config, "run_dir": str(run_dir)}


@pytest.mark.slow
def test_a_stock_client_app_is_driven_unchanged_with_the_same_bits_in_any_process(
    theirs: Path, tmp_path: Path
) -> None:
    one, two = (
        play_config(composed(theirs, tmp_path / f"{n}", f"engine.workers={n}", "rounds=8"))
        for n in (1, 2)
    )
    assert summary_of(one)["model_hash"] == summary_of(two)["model_hash"]
    assert rounds_of(one) == rounds_of(two)
    assert summary_of(one)["metrics"]["accuracy"] > 0.9
    # What the app said of its training, weighted by records; and of its own test part, at the end.
    first, second, *_ = rounds_of(one)
    assert first["client_metrics"]["train_loss"] > second["client_metrics"]["train_loss"]
    assert set(first["client_metrics"]) == {"train_loss", "train_calls"}
    clients = (one / "clients.json").read_text()
    assert '"acc"' in clients
    assert '"loss"' in clients


def test_the_state_of_a_client_lasts_and_what_a_failed_call_did_to_it_does_not(
    theirs: Path, tmp_path: Path
) -> None:
    rounds = rounds_of(play_config(composed(theirs, tmp_path / "run")))
    assert [entry["client_metrics"]["train_calls"] for entry in rounds] == [1, 2, 3]
    # Client 0 raises at its second call, which is dropped: the third is its second again.
    assert [[f["client"] for f in entry["failures"]] for entry in rounds] == [[], ["0"], ["0"]]


def test_a_run_that_goes_on_has_the_states_of_its_clients(theirs: Path, tmp_path: Path) -> None:
    whole = play_config(composed(theirs, tmp_path / "whole"))
    part = play_config(composed(theirs, tmp_path / "part", "rounds=2"))
    # Another process would not have the states in memory: neither does a new Grid.
    play_config(resumed_config(str(part), ["rounds=3"]))
    assert summary_of(part)["model_hash"] == summary_of(whole)["model_hash"]
    assert rounds_of(part) == rounds_of(whole)


def test_the_model_is_the_mean_of_what_the_clients_sent(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[dict[str, torch.Tensor], int]] = []
    read = StockReplies.update

    def watched(self: StockReplies, reply: Message, client: str, model: Any) -> Any:
        count = reply.content["metrics"]["num-examples"]
        sent.append((reply.content["arrays"].to_torch_state_dict(), count))
        return read(self, reply, client, model)

    monkeypatch.setattr(StockReplies, "update", watched)
    run_dir = play_config(composed(theirs, tmp_path / "run", "rounds=1"))
    model = load_file(run_dir / "model.safetensors")
    assert sorted(count for _, count in sent) == [40, 50, 60, 70]
    for name, tensor in model.items():
        mean = sum(count / 220 * theirs_[name].double() for theirs_, count in sent)
        torch.testing.assert_close(tensor.double(), mean, rtol=0, atol=1e-7)


def reply(**content: Any) -> Message:
    adopt_identity()
    question = Message(RecordDict(), 1, MessageType.TRAIN, group_id="1")
    return Message(RecordDict(content), reply_to=question)


MODEL = {"w": torch.tensor([1.0, 2.0]), "b": torch.zeros(1)}
COUNTED = MetricRecord({"num-examples": 5, "train_loss": 0.5, "accuracy": 0.25})


def test_a_stock_reply_is_read_as_its_model_less_the_one_sent() -> None:
    trained = {"w": torch.tensor([3.0, 1.0]), "b": torch.ones(1)}
    message = reply(whatever=ArrayRecord(trained), metrics=COUNTED)
    update = StockReplies().update(message, "7", MODEL)
    assert update.delta["w"].tolist() == [2.0, -1.0]
    assert (update.client, update.round, update.num_examples) == ("7", 1, 5)
    assert update.metrics == {"loss": 0.5, "accuracy": 0.25}
    assert update.num_bytes == 12


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "0 records of type ArrayRecord"),
        ({"arrays": ArrayRecord(MODEL)}, "0 records of type MetricRecord"),
        ({"a": ArrayRecord(MODEL), "m": MetricRecord({"loss": 1.0})}, "num-examples=None"),
        ({"a": ArrayRecord(MODEL), "b": ArrayRecord(MODEL), "m": COUNTED}, "2 records"),
    ],
)
def test_a_reply_that_is_none_is_refused(content: dict[str, Any], words: str) -> None:
    with pytest.raises(MalformedReplyError, match=words):
        StockReplies().update(reply(**content), "7", MODEL)


def test_arrays_of_other_shapes_are_left_to_validation() -> None:
    message = reply(a=ArrayRecord({"w": torch.ones(5), "x": torch.ones(1)}), m=COUNTED)
    assert StockReplies().update(message, "7", MODEL).delta["w"].shape == (5,)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["client_app.app=nowhere.client_app:app"], ["nowhere.client_app:app", "PYTHONPATH"]),
        (["client_app.app=app"], ["client_app.app=app cannot be imported"]),
        (["client_app.app=fl_app.types:Params"], ["not a flwr.clientapp.ClientApp"]),
        (["client_app.replies=gradient"], ["client_app.replies=gradient", "delta, model"]),
        (["+client_app.train_config.server-round=3"], ["server-round is set by the server"]),
        (["+client_app.train_config.x={y: 1}"], ["client_app.train_config", "lists"]),
        (["+client_app.run_config.x=[1]"], ["client_app.run_config.x=[1]"]),
    ],
)
def test_a_choice_that_cannot_be_is_one_message(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build(to_json(compose_config(overrides))).client_app.load()
    for word in words:
        assert word in str(caught.value)


def test_ours_sends_deltas_and_any_other_models_unless_it_is_said() -> None:
    assert isinstance(ClientAppChoice().reader(), OurReplies)
    assert isinstance(ClientAppChoice(app="fl_app.client_app.app").reader(), OurReplies)
    assert isinstance(ClientAppChoice(app="their_app:app").reader(), StockReplies)
    assert isinstance(ClientAppChoice(app="their_app:app", replies="delta").reader(), OurReplies)
    assert isinstance(ClientAppChoice(replies="model").reader(), StockReplies)
