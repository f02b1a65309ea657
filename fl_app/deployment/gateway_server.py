"""Serves the gateway: a socket, TLS, and a new certificate when there is one."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import ssl
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvicorn

from fl_app.deployment.certificate_checks import certificates_in, check_server, expiry_warning
from fl_app.deployment.fleet import MIB
from fl_app.deployment.gateway import LOG, Gateway
from fl_app.errors import ConfigError

LOOK_EVERY_S = 2.0
"""How often it is looked whether the certificate was replaced."""


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Files for both sides of the gateway.

    Attributes:
        root_certificates: Whom it trusts to sign the SuperLink's certificate, and what its own
            is signed by.
        certificate: Its own, PEM.
        key: The key of that.
    """

    root_certificates: Path
    certificate: Path
    key: Path

    def check(self) -> None:
        """Raise ConfigError if the gateway's certificate will not do."""
        check_server(self.certificate, self.key, self.root_certificates, None)

    def state(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Return what differs once certificate or key were replaced."""
        return tuple(_state(path) for path in (self.certificate, self.key))


def serve(*, superlink: str, host: str, port: int, tls: Tls | None, max_reply_mib: int) -> None:
    """Run the gateway until it is told to end.

    Args:
        superlink: HOST:PORT of the SuperLink; it need not be there yet.
        host: Address to listen on.
        port: Port to listen on; 0: any, which the log tells.
        tls: None: without TLS on either side, for one trusted machine.
        max_reply_mib: How large a client's reply may be, in MiB.

    Raises:
        ConfigError: The address is none, the certificate will not do, or the port is taken.
    """
    if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s/:@]+):[0-9]{1,5}", superlink):
        raise ConfigError(
            f"--superlink={superlink} must be HOST:PORT, such as superlink:8000, without https://."
        )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if tls is not None:
        tls.check()
        certificates_in(tls.root_certificates)
        if warning := expiry_warning(tls.certificate):
            LOG.warning(warning)
    listening = _listen(host, port)
    # An interrupt is how a server in the foreground is ended.
    with listening, suppress(KeyboardInterrupt):
        asyncio.run(_serve(superlink, listening, tls, max_reply_mib * MIB))


async def _serve(
    superlink: str, listening: socket.socket, tls: Tls | None, max_reply_bytes: int
) -> None:
    transport = httpx.AsyncHTTPTransport(
        verify=True if tls is None else _trusting(tls.root_certificates),
        # Shorter than the 5 s for which the SuperLink's server keeps idle connections.
        limits=httpx.Limits(
            max_connections=256, max_keepalive_connections=64, keepalive_expiry=4.0
        ),
    )
    scheme = "http" if tls is None else "https"
    async with transport:
        config = uvicorn.Config(
            Gateway(
                superlink=f"{scheme}://{superlink}",
                transport=transport,
                max_reply_bytes=max_reply_bytes,
            ),
            http="h11",  # hands on the target as it was written; httptools takes URLs apart
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=10,
            ssl_certfile=None if tls is None else tls.certificate,
            ssl_keyfile=None if tls is None else tls.key,
        )
        config.load()
        watch = None
        if tls is not None and config.ssl is not None:
            config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
            watch = asyncio.create_task(_keep_fresh(config.ssl, tls))
        name = listening.getsockname()
        LOG.info("the Fleet API of %s goes through %s port %d", superlink, *name[:2])
        try:
            await uvicorn.Server(config).serve(sockets=[listening])
        finally:
            if watch is not None:
                watch.cancel()


async def _keep_fresh(context: ssl.SSLContext, tls: Tls) -> None:
    """Take up certificate and key whenever both were replaced; connections go on undisturbed."""
    taken = tls.state()
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        now = tls.state()
        if now == taken:
            continue
        taken = now
        try:
            tls.check()
            context.load_cert_chain(tls.certificate, tls.key)
        except (ConfigError, OSError) as error:  # or one of the two is still to come
            LOG.warning("the new certificate is not taken up: %s", error)
        else:
            LOG.info("took up the new certificate in %s", tls.certificate)


def _trusting(root_certificates: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cafile=root_certificates)
    return context


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"--host={host} --port={port} cannot be listened on ({error.strerror or error}): end "
            "what listens there, or choose another port."
        ) from error


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
