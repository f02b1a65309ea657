"""What a site's own worker answers: checks, then what serves any client.

`fl-app site` starts one. It is long-lived, run by the data's owner from what is installed at the
site, and alone holds data, ledger, budget, policy and client state. Bundles that a server sends
reach it over a local socket (`fl_app.site_server`) and can ask for no more than the policy allows.
"""

from __future__ import annotations

import logging
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
from fl_app.site_config import RefusedRequestError, site_config, version_of
from fl_app.site_protocol import ProtocolError, Reply, Request
from fl_app.stacked.layer import NotStackableError
from fl_app.types import ConfigError
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
        if request.overrides or not request.config_json:
            raise RefusedRequestError(
                "a site composes no overrides, whose grammar reaches further than their words: "
                "submit with fl-app run engine=deployment, which sends the whole configuration."
            )
        own = self.name or (None if policy.data is None else "site")
        runtime = _runtime(
            request.config_json,
            policy=policy,
            version="" if policy.data is None else version_of(policy.data),
            state=self.state,
            name=own,
            device=self.device,
        )
        client = client_of(request.node if own is None else {"client-id": own}, runtime)
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
def _runtime(
    config_json: str,
    *,
    policy: Policy,
    version: str,
    state: Path,
    name: str | None,
    device: torch.device,
) -> ClientRuntime:
    """Return what serves a site's client under a configuration.

    Args:
        config_json: What the server sent.
        policy: Of the owner.
        version: Of the site's own records: another one has them read anew.
        state: Folder for what the client remembers.
        name: The client's, if it has one.
        device: Where it trains.

    Raises:
        ConfigError: The configuration is not valid.
        PolicyError: It asks for what the policy does not allow.
    """
    config = site_config(config_json, policy, name=name, version=version)
    components = build(to_json(config))
    try:
        policy.check_task(components.task.name)
    except ConfigError as error:
        raise PolicyError(str(error)) from error
    return runtime_of(
        config,
        states=DiskClientState(state / STATES),
        site=DeployedSite(privacy=components.privacy, policy=policy),
        trainer=None if device == CPU else _trainer(components, device),
    )


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
