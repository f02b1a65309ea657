"""Whether certificates and keys will do, said before anything is started that needs them."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    load_pem_private_key,
    load_ssh_private_key,
)

from fl_app.deployment.authority import hosts_of, is_for, is_signed_by
from fl_app.errors import ConfigError

WARN_BEFORE = timedelta(days=14)


def check_server(cert: Path, key: Path, ca: Path, host: str | None) -> None:
    """Check that a server can start with a certificate, and that its clients will believe it.

    Args:
        cert: Its certificate, PEM; certificates that lead to the authority may follow.
        key: The secret key of it, PEM.
        ca: Certificates that the clients trust, PEM.
        host: Name or IP address by which clients call it; None: not known here.

    Raises:
        ConfigError: Expired or not valid yet, for another host, key readable by others, key and
            certificate not of one pair, not signed by this authority, or a file cannot be read.
    """
    for fault in server_faults(cert, key, ca, () if host is None else (host,)):
        raise ConfigError(fault)


def check_node_key(path: Path) -> None:
    """Check that a SuperNode can authenticate itself with a key.

    Raises:
        ConfigError: It cannot be read, is no EC key in OpenSSH's format, or others may read it.
    """
    for fault in node_key_faults(path):
        raise ConfigError(fault)


def server_faults(cert: Path, key: Path, ca: Path, hosts: tuple[str, ...]) -> Iterator[str]:
    """Yield a message for each thing that is wrong with the certificate of a server."""
    try:
        chain, trusted = certificates_in(cert), certificates_in(ca)
    except ConfigError as error:
        yield str(error)
        return
    yield from secret_faults(key)
    leaf = chain[0]
    if fault := expiry_fault(cert, leaf):
        yield fault
    for host in hosts:
        if not is_for(leaf, host):
            yield (
                f"{cert} is not for {host} but for {', '.join(hosts_of(leaf)) or 'no host at all'}"
                f": reach it by one of these, or make it anew with --host {host}."
            )
    if not is_signed_by(leaf, chain[1:], trusted):
        yield (
            f"{cert} is not signed by the authority in {ca}: take ca.crt from whoever made the "
            "certificate, or make the certificate anew (fl-app certs rotate)."
        )
    fault = pair_fault(key, leaf, cert)
    if fault:
        yield fault


def pair_fault(key: Path, leaf: x509.Certificate, cert: Path) -> str | None:
    """Return what is wrong between a key and its certificate, if anything is."""
    try:
        found = load_pem_private_key(key.read_bytes(), None)
    except FileNotFoundError:
        return None  # said already
    except OSError as error:
        return f"{key} cannot be read ({error.strerror}): give it to the user that this runs as."
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return f"{key} holds no key without a passphrase in PEM format: make it anew."
    if found.public_key() != leaf.public_key():
        return (
            f"{key} and {cert} do not belong together: put back the pair that was made together, "
            "or make both anew (fl-app certs rotate)."
        )
    return None


def node_key_faults(path: Path) -> Iterator[str]:
    """Yield a message for each thing that is wrong with the key of a SuperNode."""
    faults = list(secret_faults(path))
    yield from faults
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except FileNotFoundError:
        return  # said already
    except OSError as error:
        yield f"{path} cannot be read ({error.strerror}): give it to the user that this runs as."
        return
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        yield (
            f"{path} holds no EC key in OpenSSH's format without a passphrase, which is what "
            "flower-supernode reads: make one with fl-app certs node NAME --out DIR."
        )


def secret_faults(path: Path) -> Iterator[str]:
    """Yield a message if a secret is not there, or not secret."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        yield f"{path} cannot be read ({error.strerror}): make it with fl-app certs make."
        return
    if mode & 0o077:
        yield (
            f"{path} is readable by others (mode {mode:04o}) and must be its owner's alone: "
            f"chmod 600 {path}; if others may have read it already, rotate it."
        )


def expiry_fault(path: Path, certificate: x509.Certificate) -> str | None:
    """Return a message if a certificate is not valid today."""
    now = datetime.now(UTC)
    if certificate.not_valid_after_utc <= now:
        return (
            f"{path} expired on {certificate.not_valid_after_utc:%Y-%m-%d}: make it anew "
            "(fl-app certs rotate)."
        )
    if certificate.not_valid_before_utc > now:
        return (
            f"{path} is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC: "
            "set the clock of this machine, or of the one that made it."
        )
    return None


def expiry_warning(path: Path) -> str | None:
    """Return a message if a certificate is valid, but expires within `WARN_BEFORE`."""
    try:
        end = certificates_in(path)[0].not_valid_after_utc
    except ConfigError:
        return None
    left = end - datetime.now(UTC)
    if not timedelta(0) < left <= WARN_BEFORE:
        return None
    return f"{path} expires on {end:%Y-%m-%d}, in {left.days} days (fl-app certs rotate)."


def certificates_in(path: Path) -> list[x509.Certificate]:
    """Return the certificates of a file, in their order.

    Raises:
        ConfigError: There are none, or the file cannot be read.
    """
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}): make it with fl-app certs make."
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"{path} holds no certificate in PEM format: make it with fl-app certs make."
        ) from error
