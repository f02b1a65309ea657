"""``fl-app site``: the worker that a data owner runs beside a SuperNode."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fl_app.errors import ConfigError
from fl_app.files import held
from fl_app.site_protocol import MOST_BODY_BYTES, SOCKET, Kind, Request, ask

site_cli = typer.Typer(
    invoke_without_command=True,
    help="Serve a site: train on its records what its owner's policy allows.",
)

_Socket = Annotated[
    Path, typer.Option(help="Where bundles reach the worker; in a folder that they may enter.")
]


@dataclass(frozen=True, kw_only=True)
class _Options:
    """How a worker works, none of which a server can say."""

    name: str | None
    device: str
    threads: int
    most_round_s: float
    most_body_bytes: int


@site_cli.callback()
def site(
    context: typer.Context,
    policy: Annotated[
        Path | None, typer.Option(help="The owner's policy file; see PRIVACY.md.")
    ] = None,
    socket: Annotated[
        Path | None, typer.Option(envvar=SOCKET, help="Where bundles reach the worker.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="Folder for what the client remembers between rounds.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="The client's name; default: by the position of its SuperNode."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where it trains: cpu, cuda, cuda:N, or auto for a GPU if any.")
    ] = "cpu",
    threads: Annotated[
        int, typer.Option(min=1, max=256, help="CPU threads of a step; more than 1 changes bits.")
    ] = 1,
    most_round_s: Annotated[
        float, typer.Option(min=1.0, help="Seconds that a message may take.")
    ] = 3600.0,
    most_mib: Annotated[
        int, typer.Option(min=1, help="MiB that a request may have.")
    ] = MOST_BODY_BYTES >> 20,
) -> None:
    """Serve until ended. SIGTERM lets a round in progress end, for some seconds."""
    if context.invoked_subcommand is not None:
        return
    if policy is None or socket is None or state is None:
        raise ConfigError(
            "a worker needs --policy FILE, --socket PATH and --state FOLDER; --help says more."
        )
    _serve(
        policy,
        socket,
        state,
        _Options(
            name=name,
            device=device,
            threads=threads,
            most_round_s=most_round_s,
            most_body_bytes=most_mib << 20,
        ),
    )


@site_cli.command()
def health(socket: _Socket) -> None:
    """Exit with 0 if a worker answers at a socket, else with 1."""
    try:
        request = Request(kind=Kind.HEALTH, node={}, patience_s=5.0)
        ask(str(socket), request, b"", patience_s=5.0, most_body_bytes=0)
    except OSError as error:
        typer.echo(f"Error: nobody answers at {socket} ({error}).", err=True)
        raise typer.Exit(1) from error


def _serve(
    policy: Path,
    socket: Path,
    state: Path,
    options: _Options,
) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    log = logging.getLogger(__name__)
    from fl_app.privacy.policy_file import read_policy

    owners = read_policy(policy)
    _check_data(owners.data)
    for key, folder in (("state", state), ("ledger", owners.ledger and owners.ledger.parent)):
        if folder is not None:
            check_writable(key, folder)
    taken = f"state={state}: another worker is using it. End that one, or choose another."
    with held(state, taken):
        # What takes seconds to import is there before the first request.
        import torch

        from fl_app.site_server import SiteServer
        from fl_app.site_worker import SiteWorker
        from fl_app.vectorizing import device_of

        torch.set_num_threads(options.threads)
        worker = SiteWorker(
            policy=policy,
            state=state,
            name=options.name,
            device=device_of("--device", options.device),
            most_round_s=options.most_round_s,
        )
        server = SiteServer(socket, worker.answer, most_body_bytes=options.most_body_bytes)

        def end(*_: object) -> None:
            raise SystemExit(0)

        signal.signal(signal.SIGTERM, end)
        log.info("Serving %s under %s, at %s.", owners.data_set, policy, socket)
        try:
            with contextlib.suppress(KeyboardInterrupt):
                server.serve()
        finally:
            server.close()


def _check_data(path: Path | None) -> None:
    """Refuse to serve without the records. Raises `ConfigError`."""
    if path is None:
        return
    if not path.exists():
        raise ConfigError(
            f"data={path} of the policy is not there: mount the volume that holds the records, or "
            "correct the path."
        )
    if not os.access(path, os.R_OK):
        raise ConfigError(
            f"data={path} of the policy cannot be read by this user (id {os.getuid()}): allow it "
            "to, or start the worker as the user who may."
        )


def check_writable(key: str, folder: Path) -> None:
    """Refuse a folder in which this user cannot write, before a round finds out.

    Raises:
        ConfigError: It is not there, or cannot be written.
    """
    probe = folder / f".writable-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{key}={folder} cannot be written by this user, id {os.getuid()} ({error.strerror}): "
            "mount a volume there that it owns (chown)."
        ) from error
