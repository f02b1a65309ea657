"""What a hostile bundle gets of a site: what its owner's policy allows, and nothing else.

A server submits an app of its own. Its ClientApp runs where Flower runs any bundle, without
rights to what is the site's, and tries to read, to skip, to ask for more, and to flood.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from federation_process import Federation, Site, federation
from helpers import fl_app, rounds_of, summary_of

from fl_app.config import compose_config, to_json

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can own the folders of several users"),
]

BASE = ("partition.num_clients=1", "client.epochs=1")
PRIVATE = ("privacy=record", "privacy.target_epsilon=null", "privacy.noise_multiplier=1.0")

APP = {
    "pyproject.toml": """
[project]
name = "hostile"
version = "1.0.0"
description = "Wants more than it may have."
license = "Apache-2.0"
[tool.flwr.app]
publisher = "mallory"
fab-include = ["*.py", "wishes.json"]
[tool.flwr.app.components]
serverapp = "server:app"
clientapp = "client:app"
[tool.flwr.app.config]
""",
    "server.py": """
import json, time, torch
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import ServerApp
from fl_app import codec
from fl_app.components import build

app = ServerApp()


@app.main()
def main(grid, context):
    import pathlib
    wishes = json.loads((pathlib.Path(__file__).parent / "wishes.json").read_text())
    from fl_app.params import read_params
    model = read_params(build(wishes["configs"]["private"]).task.build_model())
    said = codec.instruction_config("hostile", {})
    content = codec.instruction(codec.encode_model(model), said, round=1)
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.5)
    [sent] = grid.push_messages([Message(content, nodes[0], MessageType.TRAIN)])
    while not (replies := list(grid.pull_messages([sent]))):
        time.sleep(0.5)
    print("LOOT " + replies[0].content["loot"]["json"], flush=True)
""",
    "client.py": """
import glob, json, os, pathlib, re, socket, struct, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto
from fl_app.site_protocol import Kind, Request, ask

app = ClientApp()
SOCKET = os.environ["FL_APP_SITE_SOCKET"]


def asked(kind, config, body, node=None):
    node = node or {"partition-id": 0}
    request = Request(kind=kind, config_json=config, node=node, patience_s=90.0)
    try:
        reply, answer = ask(SOCKET, request, body, patience_s=90.0, most_body_bytes=1 << 30)
    except Exception as error:
        return {"error": type(error).__name__}
    if reply.code:
        return {"code": reply.code, "reason": reply.reason}
    content = recorddict_from_proto(Proto.FromString(answer))
    return {k: {n: str(v)[:200] for n, v in r.items() if k != "arrays"} for k, r in content.items()}


def connect():
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.settimeout(2)
    peer.connect(SOCKET)
    return peer


@app.train()
def train(message, context):
    wishes = json.loads((pathlib.Path(__file__).parent / "wishes.json").read_text())
    body = recorddict_to_proto(message.content).SerializeToString()
    rights = re.search(r"CapEff:\\s*(\\w+)", pathlib.Path("/proc/self/status").read_text())[1]
    loot = {"rights": int(rights, 16), "read": [], "asked": {}}
    for path in wishes["paths"]:
        for found in [path, *glob.glob(path + "/**", recursive=True)]:
            try:
                loot["read"].append([found, len(pathlib.Path(found).read_bytes())])
            except OSError:
                pass
            try:
                with open(found, "ab") as file:
                    file.write(b"x")
                loot["read"].append([found, "written"])
            except OSError:
                pass
    for name, config in wishes["configs"].items():
        loot["asked"][name] = asked(Kind.TRAIN, config, body)
    loot["asked"]["evaluate"] = asked(Kind.EVALUATE, wishes["configs"]["private"], body)
    loot["asked"]["query"] = asked(Kind.QUERY, wishes["configs"]["private"], body)
    other = {"partition-id": 0, "client-id": "7"}
    loot["asked"]["another client"] = asked(Kind.QUERY, wishes["configs"]["private"], body, other)
    keys = {"config_json": "", "overrides": "", "node": {}, "patience_s": 1.0}
    header = json.dumps({"kind": "raw-data", **keys}).encode()
    with connect() as peer:
        peer.sendall(struct.pack(">4sHIQ", b"FLAP", 1, len(header), 0) + header)
        loot["asked"]["raw data"] = peer.recv(1 << 16).decode(errors="replace")
    announced = json.dumps({"kind": "train", **keys}).encode()
    with connect() as peer:
        peer.sendall(struct.pack(">4sHIQ", b"FLAP", 1, len(announced), 1 << 36) + announced)
        loot["asked"]["64 GiB"] = peer.recv(1 << 16).decode(errors="replace")
    held = []
    for _ in range(500):
        try:
            peer = connect()
            peer.sendall(b"FLAP")
            held.append(peer)
        except OSError:
            pass
    loot["held"] = len(held)
    time.sleep(1)
    content = RecordDict({"loot": ConfigRecord({"json": json.dumps(loot)})})
    return Message(content, reply_to=message)
""",
}


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """One site, whose folders are another user's than the one who runs bundles."""
    with federation(
        tmp_path_factory.mktemp("hostile"), sites=1, unit="record", confined=True
    ) as running:
        yield running


def wishes(site: Site, parties: Federation) -> dict[str, Any]:
    """Return what the bundle is to try, in the order in which it is asked."""
    touch = parties.folder / "touched"

    def config(*overrides: str, model: str = "task/model=logistic") -> dict[str, Any]:
        return compose_config([*BASE, model, *overrides])

    code = config(*PRIVATE)
    code["client"]["optimizer"] = {"_target_": "os.system", "command": f"touch {touch}"}
    tests = "privacy.randomness=reproducible_for_tests"
    secrets, policy = parties.pki / f"site-{site.number}", site.folder / "policy.yaml"
    return {
        "paths": [str(p) for p in (site.folder, policy, site.ledger, secrets, parties.pki / "ca")],
        "configs": {
            "private": to_json(config(*PRIVATE, "privacy.public=[num_examples,label_counts]")),
            "nothing hidden": to_json(config("privacy=none")),
            "known noise": to_json(config(*PRIVATE, tests)),
            "no noise": to_json(config(*PRIVATE, "privacy.noise_multiplier=0.001")),
            "code": to_json(code),
            "files": to_json(config(f"task.path={policy}", *PRIVATE, model="task=table")),
        },
    }


def submitted(parties: Federation, folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Have the hostile app run to its end; return what its ServerApp got."""
    folder.mkdir()
    for name, text in APP.items():
        (folder / name).write_text(text.lstrip())
    (folder / "wishes.json").write_text(json.dumps(wanted))
    done = parties.flwr("run", str(folder), "fed", "--stream")
    log = re.sub(r"\x1b\[\d*m", "", done.stdout + done.stderr)
    found = re.search(r"LOOT (\{.*\})", log)
    assert found, log + parties.site(1).clientapp.log + parties.site(1).worker.log
    loot: dict[str, Any] = json.loads(found[1])
    return loot


def test_a_hostile_bundle_gets_nothing_that_the_policy_does_not_allow(
    parties: Federation, tmp_path: Path
) -> None:
    site = parties.site(1)
    loot = submitted(parties, tmp_path / "hostile", wishes(site, parties))
    assert loot["rights"] == 0
    # It reads and writes nothing that is the site's.
    assert loot["read"] == []
    assert not (parties.folder / "touched").exists()
    # What it may have is paid for, and holds nothing that was not declared public.
    asked = loot["asked"]
    assert asked["private"]["metrics"] == {"num-examples": "1"}
    assert "epsilon-spent" in asked["private"]["privacy"]
    assert len(site.ledger.read_text().splitlines()) == 2
    assert fl_app("ledger", "verify", str(site.ledger), cwd=tmp_path).returncode == 0
    # All else is refused in words that say nothing.
    assert "BudgetExhaustedError" in asked["no noise"]["reason"]
    for wish in ("nothing hidden", "known noise", "files", "evaluate"):
        assert asked[wish]["reason"] == "PolicyError: this client's own log says why", asked[wish]
    assert "os.system' is not code that a server may name" in asked["code"]["reason"]
    assert asked["query"] == asked["another client"] == {"client": {"client-id": "0"}}
    assert "is not known" in asked["raw data"]
    assert "a body of 68719476736 bytes" in asked["64 GiB"]
    log = site.worker.log
    assert "names a file, and which one is the site's to say" in log


def test_after_it_the_site_serves_as_before(parties: Federation, tmp_path: Path) -> None:
    assert parties.site(1).worker.running
    overrides = ("experiment=federation", *BASE, *PRIVATE, "rounds=1", "selection.min_clients=1")
    done = fl_app("run", *overrides, *parties.engine, "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (entry,) = rounds_of(tmp_path / "run")
    assert entry["num_updates"] == 1
    assert summary_of(tmp_path / "run")["privacy"]["unit"] == "record"
    shutil.rmtree(tmp_path / "run")
