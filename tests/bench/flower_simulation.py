"""Contender: stock Flower, ``flwr.simulation.run_simulation`` on Ray.

    python flower_simulation.py WORKLOAD ROUNDS CORES_OF_A_CLIENT (0: as Ray comes)

Server and client are written as Flower's PyTorch quickstart writes them: FedAvg, and a ClientApp
that builds model, DataLoader and optimizer for every message. ``run_simulation`` is deprecated,
but it is the runtime below ``flwr run``, and what people measure.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from schedule import seed_model
from torch.utils.data import DataLoader, TensorDataset
from turns import Turns
from workloads import WORKLOADS, Workload


class TimedFedAvg(FedAvg):
    """FedAvg that takes turns; a round is timed from its selection to its new model."""

    def __init__(self, turns: Turns, **options: float) -> None:
        super().__init__(**options)
        self._turns = turns
        self._began = 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Wait for the turn, start the clock, and select the cohort."""
        self._turns.wait()
        self._began = time.perf_counter()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate, stop the clock, and report."""
        replies = list(replies)
        result = super().aggregate_train(server_round, replies)
        seconds = time.perf_counter() - self._began
        clients = sum(not reply.has_error() for reply in replies)
        self._turns.report(round=server_round, seconds=seconds, clients=clients)
        return result


def server_app(workload: Workload, rounds: int, turns: Turns) -> ServerApp:
    """Return the ServerApp."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        while len(list(grid.get_node_ids())) < workload.clients:
            time.sleep(0.1)
        seed_model()
        network = workload.model()
        fraction = workload.cohort / workload.clients
        strategy = TimedFedAvg(turns, fraction_train=fraction, fraction_evaluate=0.0)
        turns.report(ready=True)
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(network.state_dict()),
            train_config=ConfigRecord({"lr": workload.lr}),
            num_rounds=rounds,
        )

    return app


def client_app(workload: Workload) -> ClientApp:
    """Return the ClientApp."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        network = workload.model()
        network.load_state_dict(message.content["arrays"].to_torch_state_dict())
        dataset = TensorDataset(*workload.records_of(str(context.node_config["partition-id"])))
        loader = DataLoader(dataset, batch_size=workload.batch, shuffle=True)
        criterion = torch.nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(network.parameters(), lr=message.content["config"]["lr"])
        network.train()
        running_loss = 0.0
        for images, labels in loader:
            optimizer.zero_grad()
            loss = criterion(network(images), labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
        metrics = {"train_loss": running_loss / len(loader), "num-examples": len(dataset)}
        content = {"arrays": ArrayRecord(network.state_dict()), "metrics": MetricRecord(metrics)}
        return Message(RecordDict(content), reply_to=message)

    return app


def main(workload: Workload, rounds: int, cpus_per_client: int | None) -> None:
    """Play rounds.

    Args:
        workload: What is trained.
        rounds: Rounds to play.
        cpus_per_client: Cores that each Ray actor claims, or None to leave all settings of the
            backend as they come (two cores, so one actor on a machine of two).
    """
    torch.set_num_threads(1)
    run_simulation(
        server_app=server_app(workload, rounds, Turns()),
        client_app=client_app(workload),
        num_supernodes=workload.clients,
        backend_config=cpus_per_client
        and {
            "init_args": {"num_cpus": 2, "log_to_driver": False},
            "client_resources": {"num_cpus": cpus_per_client, "num_gpus": 0.0},
        },
    )


if __name__ == "__main__":
    main(WORKLOADS[sys.argv[1]], int(sys.argv[2]), int(sys.argv[3]) or None)
