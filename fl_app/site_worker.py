"""What a site's own worker answers: checks, then what serves any client.

`fl-app site` starts one. It is long-lived, run by the data's owner from what is installed at the
site, and alone holds data, ledger, budget, policy and client state. Bundles that a server sends
reach it over a local socket (`fl_app.site_server`) and can ask for no more than the policy allows.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto

from fl_app import codec
from fl_app.client import ClientRuntime
from fl_app.client_messages import answer_content, client_of, one_line, runtime_of, told_error
from fl_app.client_state import DiskClientState, forget_runs
from fl_app.cohort import CohortTrainer
from fl_app.components import Components, build
from fl_app.config import to_json
from fl_app.privacy.base import PolicyError
from fl_app.privacy.policy import Policy
from fl_app.privacy.policy_file import read_policy
from fl_app.site import DeployedSite
from fl_app.site_config import site_config, version_of
from fl_app.site_protocol import Kind, ProtocolError, Reply, Request
from fl_app.stacked.layer import NotStackableError
from fl_app.types import ClientId, ConfigError
from fl_app.vectorizing import cohort_trainer

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
STATES = "client_state"
KEPT_RUNS = 10
"""Runs, those used last, of which a client remembers anything: a server can name ever new ones."""


@dataclass(frozen=True, kw_only=True)
class SiteWorker:
    """Answers for the records of one owner.

    Attributes:
        policy: File of the owner's policy; read again whenever it has changed, so that consent
            can be withdrawn while the worker runs.
        state: Folder for what the client remembers between rounds.
        name: The client's name in the federation, or None for the one at the position that its
            SuperNode was given.
        device: Where it trains; what cannot be trained elsewhere is trained on the CPU.
        most_round_s: Seconds that a message may take, however long the server would wait: nobody
            else is answered meanwhile, and a consent that is withdrawn takes effect after it.
    """

    policy: Path
    state: Path
    name: str | None = None
    device: torch.device = CPU
    most_round_s: float = 3600.0

    def answer(self, request: Request, body: bytes) -> tuple[Reply, bytes]:
        """Return the answer to a request; never raises because of what was asked."""
        try:
            content = _decoded(body)
            answer = self._answer(request, content)
            return Reply(), recorddict_to_proto(answer).SerializeToString()
        except Exception as error:
            code, reason = told_error(error, trusted=False)
            return Reply(code=code, reason=reason), b""

    def current_policy(self) -> Policy:
        """Return what the owner's file says now.

        Raises:
            ConfigError: It cannot be used.
        """
        try:
            stat = self.policy.stat()
            changed = (stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_mode, stat.st_uid)
        except OSError:
            return read_policy(self.policy)  # which says what is wrong
        return _read(self.policy, changed)

    def _answer(self, request: Request, content: RecordDict) -> RecordDict:
        try:
            policy = self.current_policy()
        except ConfigError as error:
            raise PolicyError(f"the policy of this site cannot be used: {error}") from error
        if objection := policy.objection(now=datetime.now().time()):
            raise PolicyError(objection)
        codec.check_version(content)
        client, runtime = _served(
            request.config_json,
            request.overrides,
            tuple(sorted(request.node.items())),
            policy=policy,
            version="" if policy.data is None else version_of(policy.data),
            state=self.state,
            name=self.name,
            device=self.device,
        )
        answer = answer_content(
            *(str(request.kind), content, runtime, client),
            deadline_s=min(request.patience_s, self.most_round_s),
        )
        forget_runs(self.state / STATES, keep=KEPT_RUNS)
        told = one_line(codec.described(request.kind, content))
        log.info("Answered %s for client %s.", told, client)
        return answer


@lru_cache(maxsize=2)
def _read(path: Path, changed: tuple[int, ...]) -> Policy:
    """Return a policy; ``changed`` is another one whenever the file may be another one."""
    return read_policy(path)


@lru_cache(maxsize=2)
def _served(
    config_json: str,
    overrides: str,
    node: tuple[tuple[str, str | int | float | bool], ...],
    *,
    policy: Policy,
    version: str,
    state: Path,
    name: str | None,
    device: torch.device,
) -> tuple[ClientId, ClientRuntime]:
    """Return which client a site is under a configuration, and what serves it.

    Args:
        config_json: What the server sent.
        overrides: What the server sent.
        node: What the site's SuperNode was started with, as a bundle says.
        policy: Of the owner.
        version: Of the site's own records: another one has them read anew.
        state: Folder for what the client remembers.
        name: The client's, if it was given one.
        device: Where it trains.

    Raises:
        ConfigError: The configuration is not valid, or names no client that the site could be.
        PolicyError: It asks for what the policy does not allow.
    """
    known: Mapping[str, str | int | float | bool] = dict(node)
    request = Request(
        kind=Kind.QUERY,
        config_json=config_json,
        overrides=overrides,
        node=known,
        patience_s=1.0,
    )
    config = site_config(request, policy, name=name)
    components = build(to_json(config))
    try:
        policy.check_task(components.task.name)
    except ConfigError as error:
        raise PolicyError(str(error)) from error
    runtime = runtime_of(
        config,
        states=DiskClientState(state / STATES),
        site=DeployedSite(privacy=components.privacy, policy=policy),
        trainer=None if device == CPU else _trainer(components, device),
    )
    own = name or ("site" if policy.data is not None else None)
    return client_of({"client-id": own} if own else known, runtime), runtime


def _trainer(components: Components, device: torch.device) -> CohortTrainer | None:
    """Return what trains on a device; None, with the reason in the log, if that has to be a CPU."""
    try:
        return cohort_trainer(components, device=device, chunk_bytes=None)
    except NotStackableError as error:
        log.warning("Training on the CPU instead of %s: %s.", device, error)
        return None


def _decoded(body: bytes) -> RecordDict:
    """Return what a body holds. Raises `ProtocolError`."""
    try:
        return recorddict_from_proto(RecordDictProto.FromString(body))
    except Exception as error:  # protobuf's own kinds, and those of whatever it then describes
        raise ProtocolError("the body is no RecordDict of Flower.") from error
