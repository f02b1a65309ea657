"""Whether a SuperLink can be used from here: asked before anything is sent to it."""

from __future__ import annotations

import http.client
import re
import ssl
import time
from pathlib import Path

from fl_app.engines.flower_command import ANSWER_S, CONNECTION, FlowerCommand
from fl_app.types import ConfigError, EmptyCohortError

TIMEOUT_S = 10.0
"""Seconds that a SuperLink has to answer a question of a few bytes."""

_NODES_POLL_S = 2.0

_EXPIRED, _NOT_YET = 10, 9
_OTHER_HOST = (62, 64)
_OTHER_CA = (18, 19, 20, 21)


def host_and_port(address: str) -> tuple[str, int]:
    """Return what ``engine.superlink`` names.

    Raises:
        ConfigError: It names neither.
    """
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^\s/\[\]:]+)):(\d{1,5})", address)
    if not found or not 0 < int(found[3]) < 65536:
        raise ConfigError(
            f"engine.superlink={address} must be HOST:PORT, such as 10.0.0.5:8000, without a "
            "scheme; null for a federation of containers on this machine."
        )
    return found[1] or found[2], int(found[3])


def check_superlink(address: str, *, root_certificates: Path | None, insecure: bool) -> None:
    """Refuse a SuperLink that does not answer, or is not the one that its CA vouches for.

    Raises:
        ConfigError: In the words of whoever has to mend it.
    """
    host, port = host_and_port(address)
    if insecure:
        connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    else:
        context = _context(root_certificates)
        connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(_unvouched(address, host, root_certificates, error)) from error
    except (ssl.SSLError, http.client.HTTPException, ConnectionResetError) as error:
        if insecure:
            way_out = "it may speak TLS: set engine.insecure=false and engine.root_certificates."
        else:
            way_out = "it may speak no TLS: set engine.insecure=true, on a network you trust."
        raise ConfigError(
            f"engine.superlink={address} does not answer as a SuperLink ({error}); {way_out}"
        ) from error
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise ConfigError(
            f"engine.superlink={address} cannot be reached ({reason}): start the SuperLink, or "
            "name the address that it listens at; a gateway's is for clients alone."
        ) from error
    finally:
        connection.close()
    if status != 200:
        raise ConfigError(
            f"engine.superlink={address} answers with status {status}, so it is no SuperLink, or "
            "one that is not well: name the address of its Control API."
        )


def _context(root_certificates: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=root_certificates)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"engine.root_certificates={root_certificates} cannot be used "
            f"({error.strerror or error}): name the CA's certificate, a PEM file that begins with "
            "-----BEGIN CERTIFICATE-----."
        ) from error


def _unvouched(
    address: str, host: str, root_certificates: Path | None, error: ssl.SSLCertVerificationError
) -> str:
    """Return what is wrong with a SuperLink's certificate, and who can mend it."""
    where = f"the certificate of engine.superlink={address}"
    if error.verify_code == _EXPIRED:
        return (
            f"{where}, or its CA's, has expired: make new ones where it runs, with "
            "fl-app certs rotate, and start it again."
        )
    if error.verify_code == _NOT_YET:
        return f"{where} is not valid yet: set the clocks of both machines right."
    if error.verify_code in _OTHER_HOST:
        return (
            f"{where} is not for {host}: name the SuperLink as its certificate does, or make one "
            f"with fl-app certs make --host {host}."
        )
    if error.verify_code in _OTHER_CA:
        known = root_certificates or "null, those that the system trusts"
        return (
            f"{where} is not signed by engine.root_certificates={known}: get ca.crt from whoever "
            "runs it."
        )
    return f"{where} cannot be trusted: {error.verify_message}."


def wait_for_supernodes(flwr: FlowerCommand, *, patience_s: float) -> int:
    """Return how many SuperNodes are online, once there is one.

    Raises:
        EmptyCohortError: None came.
        SuperLinkError: The SuperLink does not say.
    """
    deadline = time.monotonic() + patience_s
    while True:
        # The last look may begin at the deadline, and needs its own time.
        left_s = min(ANSWER_S, max(TIMEOUT_S, deadline - time.monotonic()))
        told = flwr.answer("supernode", "ls", CONNECTION, timeout_s=left_s)
        nodes = told.get("nodes", [])
        online = [node for node in nodes if node.get("status") == "online"]
        if online:
            return len(online)
        if time.monotonic() >= deadline:
            raise EmptyCohortError(
                f"no SuperNode is connected to engine.superlink={flwr.address} "
                f"({len(nodes)} registered) within engine.start_s={patience_s:.0f} s: start some, "
                "and look at their logs if they are."
            )
        time.sleep(_NODES_POLL_S)
