"""``fl-app gateway``: the one door of the sites into a federation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def gateway(
    superlink: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the SuperLink is.")],
    root_certificates: Annotated[
        Path | None, typer.Option(metavar="FILE", help="ca.crt, which signed both certificates.")
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The gateway's own certificate.")
    ] = None,
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="The key of that.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8443,
    max_reply_mib: Annotated[
        int, typer.Option(min=1, help="How large a client's reply may be, in MiB.")
    ] = 512,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Without TLS on either side: one machine only.")
    ] = False,
) -> None:
    """Let sites reach the SuperLink's Fleet API, and nothing else of it.

    Whoever reaches a SuperLink itself may submit and stop runs, with no password: let sites reach
    the gateway alone. Its certificate may be replaced while it runs; it takes the new one up
    within seconds, and connections go on. It need not be started after the SuperLink, and
    outlives its restarts.
    """
    from fl_app.deployment.gateway_server import Tls, serve
    from fl_app.errors import ConfigError

    tls = None
    if not insecure:
        if root_certificates is None or certificate is None or key is None:
            raise ConfigError(
                "--root-certificates, --certificate and --key are needed: fl-app certs make makes "
                "them. Without TLS, on one trusted machine: --insecure."
            )
        tls = Tls(root_certificates=root_certificates, certificate=certificate, key=key)
    serve(superlink=superlink, host=host, port=port, tls=tls, max_reply_mib=max_reply_mib)
