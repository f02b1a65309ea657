"""The keys and certificates of a federation: one folder, a sub-folder for each party.

Each party gets its own sub-folder and nothing else: mount or copy that one alone. Folders are
0700, keys and secrets 0600, certificates and public keys 0644; ``ca.crt`` is in each.

==============  ====================================================================
``ca``          ``ca.key``, ``ca.crt``: keep it off all machines that run anything
``public``      ``ca.crt``, ``site-N.pub``: for anybody
``superlink``   ``tls.key``, ``tls.crt``, ``superexec.secret``
``gateway``     ``tls.key``, ``tls.crt``
``serverapp``   ``superexec.secret``: the SuperExec beside the SuperLink
``site-N``      ``node.key``, ``node.pub``, ``runtime.key``, ``runtime.crt``,
                ``superexec.secret``: a SuperNode
``site-N-app``  ``superexec.secret``: the SuperExec beside that SuperNode
==============  ====================================================================

What operators must know:

* **Make** as often as you like: only what is missing is made, nothing is ever replaced.
* **A site elsewhere** runs ``fl-app certs node NAME --out DIR`` itself; only ``node.pub`` leaves
  it, and ``public/ca.crt`` goes to it. Register: ``flwr supernode register node.pub``. For a
  new key it names a new DIR.
* **Expiry**: server certificates last ``--days``, the authority ten years; keys of SuperNodes do
  not expire. ``fl-app certs check`` warns 14 days ahead.
* **Rotate** with ``fl-app certs rotate DIR tls`` once a year: the authority stays, so no site
  needs anything new. The gateway takes up its new certificate by itself; the SuperLink and
  SuperNodes read theirs when they start. ``rotate DIR site-N`` also makes a new node key, which
  the SuperLink does not know: register it, unregister the old one, restart the site.
* **Revoke** a site: ``flwr supernode list``, then ``flwr supernode unregister NODE_ID``. From
  then on the SuperLink answers it 401, and the SuperNode ends. Nobody but the SuperLink decides
  that, so there is no list of revoked certificates.
* **A new authority** (its key leaked): a new folder, and all parties anew.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fl_app.deployment.authority import (
    Authority,
    general_name,
    hosts_of,
    is_for,
    node_key,
    node_public,
    tls_key,
)
from fl_app.deployment.certificate_checks import certificates_in, check_node_key, check_server
from fl_app.errors import ConfigError
from fl_app.files import write_atomically

__all__ = ["Owner", "check_node_key", "check_server", "make", "make_node", "rotate"]

Owner = tuple[int, int]
"""User and group id."""

SECRET, PUBLIC = 0o600, 0o644
DAYS = 365
LOOPBACK = ("localhost", "127.0.0.1", "::1")
HOSTS = {
    "superlink": ("superlink", "gateway", *LOOPBACK),
    "gateway": ("gateway", "superlink", *LOOPBACK),
}
"""What the servers of the operator are called, by party; ``--host`` adds to it."""


def make(
    folder: Path,
    sites: int,
    hosts: Sequence[str] = (),
    days: int = DAYS,
    owners: Mapping[str, Owner] | None = None,
) -> list[Path]:
    """Make what is missing of the keys and certificates of a federation.

    Args:
        folder: Where; made if it is not there.
        sites: How many sites get a folder; those that have one keep it.
        hosts: Further names or addresses by which the SuperLink and the gateway are reached.
        days: How long server certificates last, in [1, 3650].
        owners: Party -> who gets its folder. Others keep the owner that they have.

    Returns:
        The files that were made, in order; none if all were there.

    Raises:
        ConfigError: A value is out of range, a certificate is there without its key, something
            cannot be written, or a certificate that was there is not for one of `hosts`.
    """
    _check_arguments(sites, hosts, days)
    pki = _Pki(folder, days=days, owners=owners or {})
    names = [f"site-{number}" for number in range(1, sites + 1)]
    _check_owners(pki.owners, names)
    try:
        pki.complete(hosts, names)
    except OSError as error:
        raise _unwritable(folder, error) from error
    _check_hosts(folder, hosts)
    return pki.made


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """What was replaced, and what is to be done now.

    Attributes:
        made: The new files.
        next_steps: For the operator, in order; a line each.
    """

    made: tuple[Path, ...]
    next_steps: tuple[str, ...]


def rotate(folder: Path, party: str, hosts: Sequence[str] = (), days: int = DAYS) -> Rotation:
    """Replace the keys and certificates of one party, signed by the authority that is there.

    Certificates stay good for all hosts that they were for. Files keep their owner.

    Args:
        folder: That of the federation.
        party: ``superlink``, ``gateway``, ``site-N``; or ``tls``: the TLS keys and certificates
            of all, which asks nobody to register anew.
        hosts: Further hosts for the SuperLink and the gateway.
        days: How long the new certificates last, in [1, 3650].

    Raises:
        ConfigError: There is no such party, no authority's key, or something cannot be written.
    """
    _check_arguments(1, hosts, days)
    sites = sites_in(folder)
    known = [name for name in (*HOSTS, *sites) if (folder / name).is_dir()]
    if party != "tls" and party not in known:
        raise ConfigError(
            f"{folder} has no party {party!r}: choose one of {', '.join((*known, 'tls'))}, or make "
            "it first (fl-app certs make)."
        )
    pki = _Pki(folder, days=days, owners={})
    try:
        pki.authority()  # fails before anything is replaced
        for name in known if party == "tls" else [party]:
            pki.tls(name, hosts, anew=True)
        if party in sites:
            pki.node(party, anew=True)
        if party in sites or party == "superlink":
            pki.secret(party, anew=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return Rotation(made=tuple(pki.made), next_steps=_next_steps(folder, party, sites))


def make_node(name: str, out: Path) -> list[Path]:
    """Make the key of a SuperNode alone, for a site that runs elsewhere; return what was made."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ConfigError(
            f"NAME={name!r} must begin with a letter or digit and may go on with these and . _ -, "
            "such as clinic-north."
        )
    pki = _Pki(out, days=DAYS, owners={})
    try:
        pki.node_pair(out, name, anew=False)
    except OSError as error:
        raise _unwritable(out, error) from error
    return pki.made


def sites_in(folder: Path) -> list[str]:
    """Return the names of the sites that have a folder, in order."""
    found = [p.name for p in folder.glob("site-*") if re.fullmatch(r"site-[1-9]\d*", p.name)]
    return sorted(found, key=lambda name: int(name.removeprefix("site-")))


def public_of(path: Path, name: str) -> bytes:
    """Return the public half of a SuperNode's key file."""
    check_node_key(path)
    key = load_ssh_private_key(path.read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError(f"{path} was an EC key a moment ago")
    return node_public(key, name)


@dataclass
class _Pki:
    """A folder that is being completed.

    Attributes:
        folder: That of the federation.
        days: How long new certificates last.
        owners: Party -> who gets its folder.
        made: What was written so far.
    """

    folder: Path
    days: int
    owners: Mapping[str, Owner]
    made: list[Path] = field(default_factory=list)
    _authority: Authority | None = None

    def complete(self, hosts: Sequence[str], sites: Sequence[str]) -> None:
        """Make what is missing of all parties."""
        self.folder_of("ca")
        if not (self.folder / "ca" / "ca.crt").exists():
            self.authority()
        for name in HOSTS:
            self.tls(name, hosts)
        self.secret("superlink")
        for name in sites:
            self.node(name)
            self.tls(name, ())
            self.secret(name)
        everybody = ("public", *HOSTS, "serverapp", *sites, *(f"{name}-app" for name in sites))
        for name in everybody:
            self.copy(self.folder / "ca" / "ca.crt", self.folder_of(name) / "ca.crt")

    def authority(self) -> Authority:
        """Who signs; made if neither its key nor its certificate is there."""
        if self._authority is None:
            key, certificate = (self.folder / "ca" / name for name in ("ca.key", "ca.crt"))
            if not key.exists():
                if certificate.exists():
                    raise ConfigError(
                        f"{key} is not there, and nothing can be signed without it: put it back "
                        "where it belongs to make certificates, and take it away after."
                    )
                self.write(key, tls_key(), SECRET)
            if not certificate.exists():
                self.write(certificate, Authority.of_key(key.read_bytes()).pem(), PUBLIC)
            self._authority = Authority.load(key.read_bytes(), certificate.read_bytes())
        return self._authority

    def tls(self, party: str, hosts: Sequence[str], *, anew: bool = False) -> None:
        """Make the TLS key and certificate of a party."""
        stem = "tls" if party in HOSTS else "runtime"
        key, certificate = (self.folder_of(party) / f"{stem}.{end}" for end in ("key", "crt"))
        own = HOSTS.get(party) or (party.replace("site", "supernode"), "localhost", "127.0.0.1")
        names = [*own, *_readable_hosts(certificate), *(hosts if party in HOSTS else ())]
        if certificate.exists() and not key.exists() and not anew:
            raise ConfigError(
                f"{certificate} is there without {key}: put the key back, or have a new pair made "
                f"(fl-app certs rotate {self.folder} {party})."
            )
        if anew or not key.exists():
            self.write(key, tls_key(), SECRET)
        if anew or not certificate.exists():
            issued = self.authority().issue(key.read_bytes(), names, days=self.days)
            self.write(certificate, issued, PUBLIC)

    def node(self, site: str, *, anew: bool = False) -> None:
        """Make the key by which a site's SuperNode authenticates itself."""
        folder = self.folder_of(site)
        self.node_pair(folder, site, anew=anew)
        self.copy(folder / "node.pub", self.folder_of("public") / f"{site}.pub", anew=anew)

    def node_pair(self, folder: Path, name: str, *, anew: bool) -> None:
        """Make ``node.key`` and ``node.pub`` in a folder."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        key, public = folder / "node.key", folder / "node.pub"
        if public.exists() and not key.exists() and not anew:
            raise ConfigError(
                f"{public} is there without {key}: put the key back, or remove the .pub and have "
                "a new pair made, which must then be registered."
            )
        if anew or not key.exists():
            self.write(key, node_key(), SECRET)
        if anew or not public.exists():
            self.write(public, public_of(key, name), PUBLIC)

    def secret(self, party: str, *, anew: bool = False) -> None:
        """Make the secret that a party and its SuperExec share."""
        other = "serverapp" if party == "superlink" else f"{party}-app"
        both = [self.folder_of(name) / "superexec.secret" for name in (party, other)]
        there = [path for path in both if path.exists()]
        # Flower takes the bytes as they are, so no newline.
        content = there[0].read_bytes() if there and not anew else secrets.token_hex(32).encode()
        for path in both:
            if anew or path not in there:
                self.write(path, content, SECRET)

    def copy(self, source: Path, target: Path, *, anew: bool = False) -> None:
        """Copy a public file to where it is missing."""
        if anew or not target.exists():
            self.write(target, source.read_bytes(), PUBLIC)

    def folder_of(self, party: str) -> Path:
        """Return the folder of a party; made, and given to its owner, if need be."""
        path = self.folder / party
        if not path.is_dir():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.mkdir(mode=0o755 if party == "public" else 0o700)
        for file in (path, *path.iterdir()) if party in self.owners else ():
            if (file.stat().st_uid, file.stat().st_gid) != self.owners[party]:
                shutil.chown(file, *self.owners[party])
        return path

    def write(self, path: Path, content: bytes, mode: int) -> None:
        """Write a file that belongs to whom its folder belongs to."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        above = path.parent.stat()
        owner = (above.st_uid, above.st_gid) if os.geteuid() == 0 else None
        write_atomically(path, content, mode=mode, owner=owner)
        if mode == PUBLIC:
            path.chmod(mode)  # whatever the umask: other parties run as other users
        self.made.append(path)


def _check_arguments(sites: int, hosts: Sequence[str], days: int) -> None:
    if not 1 <= sites <= 1000:
        raise ConfigError(f"--sites={sites} must lie in [1, 1000].")
    if not 1 <= days <= 3650:
        raise ConfigError(
            f"--days={days} must lie in [1, 3650]: the authority itself lasts ten years."
        )
    for host in hosts:
        general_name(host)


def _check_owners(owners: Mapping[str, Owner], sites: Sequence[str]) -> None:
    known = ["ca", "public", *HOSTS, "serverapp", *sites, *(f"{name}-app" for name in sites)]
    for name in owners:
        if name not in known:
            raise ConfigError(
                f"--owner {name}=... names no party: choose one of {', '.join(known)}."
            )


def _check_hosts(folder: Path, hosts: Sequence[str]) -> None:
    """Refuse a host that a certificate made earlier is not for: clients would not believe it."""
    for party in HOSTS:
        certificate = folder / party / "tls.crt"
        for host in hosts:
            if not is_for(certificates_in(certificate)[0], host):
                raise ConfigError(
                    f"{certificate} was there already and is not for {host}: have a new one made "
                    f"(fl-app certs rotate {folder} {party} --host {host})."
                )


def _readable_hosts(certificate: Path) -> list[str]:
    """Return what a certificate is for; nothing if there is none that can be read."""
    try:
        return hosts_of(certificates_in(certificate)[0])
    except ConfigError:
        return []


def _next_steps(folder: Path, party: str, sites: Sequence[str]) -> tuple[str, ...]:
    if party == "tls":
        return (
            "The gateway takes up its new certificate by itself, within seconds.",
            "Restart the superlink, then each supernode, one at a time: a run goes on meanwhile.",
        )
    if party == "gateway":
        return ("The gateway takes up its new certificate by itself, within seconds.",)
    if party == "superlink":
        return ("Restart the superlink and the serverapp: they share a new secret.",)
    return (
        f"Register the new key: flwr supernode register {folder / 'public' / f'{party}.pub'}",
        "Unregister the old one: flwr supernode list, then flwr supernode unregister NODE_ID",
        f"Give the site its new folders {party} and {party}-app, if it runs elsewhere, and restart "
        "its supernode and clientapp.",
    )


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    way_out = (
        "--owner needs root, as in a one-shot container"
        if isinstance(error, PermissionError)
        else "see to it that it can be"
    )
    return ConfigError(
        f"{error.filename or folder} cannot be read, written or given away ({error.strerror}): "
        f"{way_out}, or choose another folder."
    )
