"""A site in tests: its worker with its owner's policy, asked as a bundle asks it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from flwr.app import Error, Message
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto

from fl_app import codec
from fl_app.arrays import encode_params
from fl_app.components import build, settled
from fl_app.config import compose_config, to_json
from fl_app.engines.local import adopt_identity
from fl_app.params import read_params
from fl_app.site_protocol import Kind, Request
from fl_app.site_worker import SiteWorker
from fl_app.types import Params

PRIVATE_POLICY = """\
version: 1
data_set: ward-7
epsilon: {epsilon}
delta: 1.0e-5
unit: {unit}
ledger: ledger.jsonl
share_budget: true
public: [num_examples]
"""

OPEN_POLICY = """\
version: 1
data_set: ward-7
unit: none
public: [num_examples, label_counts, metrics, evaluation]
"""

BASE = ("task/model=logistic", "partition.num_clients=6", "client.epochs=1")


class SiteClient:
    """The first of six clients, as a site."""

    def __init__(self, folder: Path, policy: str, **worker: Any) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self.folder = folder
        self.ledger = folder / "ledger.jsonl"
        self.policy = folder / "policy.yaml"
        self.node: dict[str, Any] = {"partition-id": 0, "num-partitions": 6}
        self.write(policy)
        self.worker = SiteWorker(policy=self.policy, state=folder, **worker)

    def write(self, text: str) -> None:
        """Replace the owner's policy."""
        self.policy.write_text(text)
        self.policy.chmod(0o600)

    def asked(self, *overrides: str, unchecked: bool = False, **changes: Any) -> Message:
        """Return the answer to a server with this configuration, which may be a bad one."""
        config = compose_config([*BASE, *overrides])
        return self.told(config if unchecked else settled(config), **changes)

    def told(
        self,
        config: dict[str, Any] | str,
        *,
        kind: str = "train",
        patience_s: float = 600.0,
        params: Params | None = None,
        version: str | None = None,
        round: Any = 1,
    ) -> Message:
        """Return the answer to a server that sends exactly this."""
        adopt_identity()
        instruction = codec.instruction(
            encode_params(initial(*BASE) if params is None else params),
            codec.instruction_config("run", {}, run_dir=str(self.folder / "elsewhere")),
            round=1,
        )
        config_record: Any = instruction["config"]
        config_record["server-round"] = round
        if version is not None:
            config_record["fl-app"] = version
        request = Request(
            kind=Kind(kind),
            config_json=config if isinstance(config, str) else to_json(config),
            node=self.node,
            patience_s=patience_s,
        )
        body = recorddict_to_proto(instruction).SerializeToString()
        reply, answer = self.worker.answer(request, body)
        [message] = codec.train_messages({1: instruction}, round=1, ttl=600.0)
        if reply.code:
            return Message(Error(code=reply.code, reason=reply.reason), reply_to=message)
        content = recorddict_from_proto(RecordDictProto.FromString(answer))
        return Message(content, reply_to=message)


def initial(*overrides: str) -> Params:
    """Return the parameters of a new model of a configuration's task."""
    torch.manual_seed(0)
    return read_params(build(to_json(compose_config(list(overrides)))).task.build_model())
