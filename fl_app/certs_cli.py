"""``fl-app certs``: make, check and rotate the keys and certificates of a federation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fl_app.deployment.certificates import Owner

certs_cli = typer.Typer(
    no_args_is_help=True, help="Make, check or rotate the keys and certificates of a federation."
)

_Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A sub-folder for each party.")]
_Hosts = Annotated[
    list[str] | None,
    typer.Option(
        "--host",
        help="Name or IP address by which sites reach the SuperLink or the gateway; repeatable.",
    ),
]
_Days = Annotated[int, typer.Option(help="How long server certificates last.")]


@certs_cli.command()
def make(
    folder: _Folder,
    sites: Annotated[int, typer.Option(help="Number of sites: site-1, site-2, ...")] = 3,
    host: _Hosts = None,
    days: _Days = 365,
    owner: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PARTY=UID:GID", help="Who gets a party's folder; takes root; repeatable."
        ),
    ] = None,
) -> None:
    """Make what is missing, and never replace anything: run it as often as you like.

    Each party gets the one sub-folder that bears its name; DIR/public is for everybody, and
    DIR/ca, with the authority's secret key, for none of them. Keys of SuperNodes do not expire;
    server certificates do, after --days: fl-app certs rotate DIR tls.
    """
    from fl_app.deployment.certificates import make as make_certificates

    _print_made(make_certificates(folder, sites, host or (), days, _owners(owner or ())), folder)


@certs_cli.command()
def rotate(
    folder: _Folder,
    party: Annotated[str, typer.Argument(help="superlink, gateway, site-N, or tls of all.")],
    host: _Hosts = None,
    days: _Days = 365,
) -> None:
    """Replace the keys and certificates of one party, and say what is to be done then.

    The authority stays, so that nobody else needs anything new. `tls` replaces all server
    certificates and no key of a SuperNode: that is the one to run once a year. `site-N` makes a
    new key for its SuperNode too, which must be registered; the old one is good until it is
    unregistered (flwr supernode unregister NODE_ID, which is also how a site is shut out).
    """
    from fl_app.deployment.certificates import rotate as rotate_certificates

    done = rotate_certificates(folder, party, host or (), days)
    _print_made(done.made, folder)
    for step in done.next_steps:
        typer.echo(f"Next: {step}")


@certs_cli.command()
def check(folder: _Folder, host: _Hosts = None) -> None:
    """Say what is wrong with a folder of keys and certificates; exit code 2 if anything is.

    Expired, not for --host, readable by others, key and certificate not of one pair, not signed
    by this authority. What expires within 14 days is only a warning.
    """
    from fl_app.deployment.inspection import inspect
    from fl_app.errors import ConfigError

    found = inspect(folder, host or ())
    for warning in found.warnings:
        typer.echo(f"Warning: {warning}", err=True)
    if found.faults:
        raise ConfigError("\n".join(found.faults))
    typer.echo(f"OK: {folder} holds {', '.join(found.checked)}.")


@certs_cli.command()
def node(
    name: Annotated[str, typer.Argument(help="What the site is called.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the two files go.")],
) -> None:
    """Make the key of a SuperNode alone, at a site that runs elsewhere.

    DIR/node.key stays there. Send DIR/node.pub to whoever runs the SuperLink, who registers it:
    flwr supernode register node.pub (in containers: DEPLOYMENT.md). In return you get their
    public/ca.crt.
    """
    from fl_app.deployment.certificates import make_node

    _print_made(make_node(name, out), out)


def _print_made(made: Sequence[Path], folder: Path) -> None:
    for path in made:
        typer.echo(f"made {path}")
    if not made:
        typer.echo(f"Nothing is missing in {folder}.")


def _owners(given: Sequence[str]) -> dict[str, Owner]:
    """Return what ``PARTY=UID:GID`` say."""
    from fl_app.errors import ConfigError

    owners = {}
    for text in given:
        match = re.fullmatch(r"([^=]+)=(\d+):(\d+)", text)
        if match is None:
            raise ConfigError(
                f"--owner={text} must be PARTY=UID:GID with numbers, such as gateway=1000:1000."
            )
        owners[match[1]] = (int(match[2]), int(match[3]))
    return owners
