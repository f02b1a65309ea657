"""A certificate authority in two files, and what it issues. Pure: bytes in, bytes out.

Elliptic curves throughout: P-256 for TLS, P-384 for SuperNodes, which is what Flower's
documentation has them made with (``ssh-keygen -t ecdsa -b 384``).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fl_app.errors import ConfigError

CA_DAYS = 3650
"""How long the authority itself lasts: every party holds its certificate, so it rarely changes."""

BACKDATED = timedelta(hours=1)
"""By how much a certificate is valid before it is made: clocks of other machines lag."""


@dataclass(frozen=True, kw_only=True)
class Authority:
    """Who signs the certificates of a federation.

    Attributes:
        key: Its secret key.
        certificate: What everybody trusts.
    """

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def of_key(cls, key_pem: bytes, *, now: datetime | None = None) -> Authority:
        """Return an authority with a new certificate for a key."""
        key = _private_key(key_pem)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fl-app federation")])
        draft = _draft(name, name, key, now=now, days=CA_DAYS)
        draft = draft.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        draft = draft.add_extension(_usage(signs_certificates=True), critical=True)
        return cls(key=key, certificate=draft.sign(key, hashes.SHA256()))

    @classmethod
    def load(cls, key_pem: bytes, certificate_pem: bytes) -> Authority:
        """Return the authority of two files.

        Raises:
            ConfigError: The two do not belong together.
        """
        key, certificate = _private_key(key_pem), x509.load_pem_x509_certificate(certificate_pem)
        if key.public_key() != certificate.public_key():
            raise ConfigError(
                "ca.key and ca.crt do not belong together: put back the pair that was made "
                "together, or start in a new folder."
            )
        return cls(key=key, certificate=certificate)

    def pem(self) -> bytes:
        """Return the certificate as a file."""
        return self.certificate.public_bytes(Encoding.PEM)

    def issue(
        self, key_pem: bytes, hosts: Sequence[str], *, days: int, now: datetime | None = None
    ) -> bytes:
        """Return the certificate of a server.

        Args:
            key_pem: Its key.
            hosts: Names and IP addresses by which it is reached, at least one; the first is
                also the common name.
            days: How long it lasts, yet never longer than the authority.
            now: When it is made; the moment of the call unless given.
        """
        key = _private_key(key_pem)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
        issuer = self.certificate
        draft = _draft(
            name, issuer.subject, key, now=now, days=days, latest=issuer.not_valid_after_utc
        )
        names = [general_name(host) for host in dict.fromkeys(hosts)]
        for extension, critical in (
            (x509.SubjectAlternativeName(names), False),
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (_usage(signs_certificates=False), True),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
            # Python 3.13 and newer insist on it.
            (_issuer_key(issuer), False),
        ):
            draft = draft.add_extension(extension, critical=critical)
        return draft.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM)


def tls_key() -> bytes:
    """Return a new key for TLS, or for an authority: P-256, PKCS #8, PEM."""
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )


def node_key() -> bytes:
    """Return a new key of a SuperNode: P-384, in OpenSSH's format, which is all Flower reads."""
    return ec.generate_private_key(ec.SECP384R1()).private_bytes(
        Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()
    )


def node_public(key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    """Return the public half of a SuperNode's key in OpenSSH's format, with a name on it."""
    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return line + b" " + name.encode() + b"\n"


def general_name(host: str) -> x509.GeneralName:
    """Return a host as certificates name it.

    Raises:
        ConfigError: It is neither an IP address nor a name.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    if not host or not host.isascii() or any(c in host for c in " /:@,*") or len(host) > 253:
        raise ConfigError(
            f"--host={host} must be a name, such as fl.example.org, or an IP address, without "
            "https:// before it or a port behind."
        )
    return x509.DNSName(host.lower())


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """Return the names and IP addresses that a certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    return [*names.get_values_for_type(x509.DNSName), *addresses]


def is_for(certificate: x509.Certificate, host: str) -> bool:
    """Return whether a certificate is for a host; ``*.`` stands for one label, as in browsers."""
    host = host.strip("[]").lower()
    try:
        host = str(ipaddress.ip_address(host))
    except ValueError:
        wildcard = "*." + host.partition(".")[2]
    else:
        wildcard = host
    return any(name.lower() in (host, wildcard) for name in hosts_of(certificate))


def is_signed_by(
    certificate: x509.Certificate,
    between: Iterable[x509.Certificate],
    trusted: Iterable[x509.Certificate],
) -> bool:
    """Return whether a chain of signatures leads from a certificate to a trusted one."""
    trusted, between = list(trusted), list(between)
    for _ in range(8):  # as long as chains get; a loop of two that sign each other ends too
        if any(_issued(certificate, issuer) for issuer in trusted):
            return True
        above = [c for c in between if c != certificate and _issued(certificate, c)]
        if not above:
            return False
        certificate = above[0]
    return False


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except Exception:  # a wrong name, key type or signature: each raises its own
        return False
    return True


def _draft(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    *,
    now: datetime | None,
    days: int,
    latest: datetime | None = None,
) -> x509.CertificateBuilder:
    now = now or datetime.now(UTC)
    end = now + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(min(end, latest) if latest else end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _issuer_key(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    found = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(found)


def _private_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            "a key file holds no key that can be read: put back the file that was made, or remove "
            "it to have a new one."
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError("a key file holds a key of another kind than fl-app certs makes.")
    return key
