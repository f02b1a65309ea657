"""What is wrong with a federation's folder of keys and certificates, as a list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fl_app.deployment.certificate_checks import (
    certificates_in,
    expiry_fault,
    expiry_warning,
    node_key_faults,
    secret_faults,
    server_faults,
)
from fl_app.deployment.certificates import HOSTS, public_of, sites_in
from fl_app.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a look into a folder showed; a sentence each.

    Attributes:
        checked: Parties that have a folder.
        faults: What will not work, or is not safe.
        warnings: What will not work for long.
    """

    checked: tuple[str, ...]
    faults: tuple[str, ...]
    warnings: tuple[str, ...]


def inspect(folder: Path, hosts: Sequence[str] = ()) -> Findings:
    """Check all that a folder holds; parties without a sub-folder are left out.

    Args:
        folder: As `certificates.make` makes it, or a copy of some of its sub-folders.
        hosts: What the certificates of the SuperLink and the gateway must be for.

    Raises:
        ConfigError: It holds no party at all.
    """
    sites = sites_in(folder)
    known = ("ca", "public", *HOSTS, "serverapp", *sites, *(f"{site}-app" for site in sites))
    checked = tuple(party for party in known if (folder / party).is_dir())
    if not checked:
        raise ConfigError(
            f"{folder} holds no keys or certificates: name the folder that fl-app certs make made."
        )
    faults: list[str] = []
    for party in checked:
        faults += _party_faults(folder, party, hosts)
    certificates = [path for party in checked for path in sorted((folder / party).glob("*.crt"))]
    expiring = {expiry_warning(path) for path in certificates if path.name != "ca.crt"}
    expiring.add(expiry_warning(_authority(folder, checked)))
    warnings = tuple(sorted(text for text in expiring if text))
    return Findings(checked=checked, faults=tuple(dict.fromkeys(faults)), warnings=warnings)


def _party_faults(folder: Path, party: str, hosts: Sequence[str]) -> Iterator[str]:
    own = folder / party
    yield from _authority_faults(folder, party)
    if party == "ca":
        if (own / "ca.key").exists():  # it may well be kept elsewhere
            yield from secret_faults(own / "ca.key")
    elif party in HOSTS:
        yield from server_faults(own / "tls.crt", own / "tls.key", own / "ca.crt", tuple(hosts))
    elif party in sites_in(folder):
        yield from server_faults(own / "runtime.crt", own / "runtime.key", own / "ca.crt", ())
        yield from _node_faults(folder, party)
    if party not in ("ca", "public", "gateway"):
        yield from secret_faults(own / "superexec.secret")
        yield from _shared_secret_faults(folder, party)


def _authority_faults(folder: Path, party: str) -> Iterator[str]:
    """Yield what is wrong with the certificate that a party trusts."""
    own, first = folder / party / "ca.crt", folder / "ca" / "ca.crt"
    try:
        found = certificates_in(own)
    except ConfigError as error:
        yield str(error)
        return
    if fault := expiry_fault(own, found[0]):
        yield fault
    if first.exists() and first.read_bytes() != own.read_bytes():
        yield f"{own} is another than {first}: replace it by that one."


def _node_faults(folder: Path, site: str) -> Iterator[str]:
    key = folder / site / "node.key"
    faults = list(node_key_faults(key))
    yield from faults
    if faults:
        return
    public = public_of(key, site).split()[:2]
    for path in (folder / site / "node.pub", folder / "public" / f"{site}.pub"):
        if path.exists() and path.read_bytes().split()[:2] != public:
            yield (
                f"{path} is not the public half of {key}: remove it, have it made again (fl-app "
                "certs make), and register it at the SuperLink."
            )


def _shared_secret_faults(folder: Path, party: str) -> Iterator[str]:
    other = "serverapp" if party == "superlink" else f"{party}-app"
    pair = [folder / name / "superexec.secret" for name in (party, other)]
    if all(path.exists() for path in pair) and pair[0].read_bytes() != pair[1].read_bytes():
        yield f"{pair[0]} and {pair[1]} must be the same file: copy the first over the second."


def _authority(folder: Path, checked: Sequence[str]) -> Path:
    return folder / ("ca" if "ca" in checked else checked[0]) / "ca.crt"
