"""Certificates that TLS believes, keys that Flower reads, and messages for all that is wrong."""

from __future__ import annotations

import argparse
import os
import socket
import ssl
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from flwr.cli.supernode.register import try_load_public_key
from flwr.supercore.auth.superexec_secret import load_superexec_auth_secret
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

from fl_app import cli
from fl_app.deployment.authority import Authority, hosts_of, tls_key
from fl_app.deployment.certificate_checks import certificates_in
from fl_app.deployment.certificates import check_node_key, check_server, make, make_node, rotate
from fl_app.deployment.inspection import inspect
from fl_app.errors import ConfigError


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def authority_of(pki: Path) -> Authority:
    return Authority.load((pki / "ca/ca.key").read_bytes(), (pki / "ca/ca.crt").read_bytes())


def replace_certificate(pki: Path, party: str, *, days: int, now: datetime) -> None:
    folder = pki / party
    certificate = folder / "tls.crt"
    hosts = hosts_of(certificates_in(certificate)[0])
    key = (folder / "tls.key").read_bytes()
    certificate.write_bytes(authority_of(pki).issue(key, hosts, days=days, now=now))


def shake_hands(folder: Path, ca: Path, host: str, *, strict: bool = True) -> None:
    """Connect by TLS to a server with a party's certificate, as a client that calls it `host`."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    client = ssl.create_default_context(cafile=str(ca))
    if strict:  # Python 3.13's default
        client.verify_flags |= ssl.VERIFY_X509_STRICT
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            with server.wrap_socket(theirs, server_side=True) as accepted:
                accepted.recv(1)
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=host) as connected:
            connected.send(b"x")
    finally:
        ours.close()
        thread.join(timeout=10)


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    make(tmp_path / "pki", sites=2, hosts=["fl.example.org", "192.0.2.7"])
    return tmp_path / "pki"


def test_every_party_gets_its_own_files_and_no_others(pki: Path) -> None:
    tls = {"tls.key", "tls.crt", "ca.crt"}
    site = {"node.key", "node.pub", "runtime.key", "runtime.crt", "superexec.secret", "ca.crt"}
    assert {folder.name: {file.name for file in folder.iterdir()} for folder in pki.iterdir()} == {
        "ca": {"ca.key", "ca.crt"},
        "public": {"ca.crt", "site-1.pub", "site-2.pub"},
        "superlink": tls | {"superexec.secret"},
        "gateway": tls,
        "serverapp": {"superexec.secret", "ca.crt"},
        "site-1": site,
        "site-2": site,
        "site-1-app": {"superexec.secret", "ca.crt"},
        "site-2-app": {"superexec.secret", "ca.crt"},
    }


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_secrets_are_their_owners_alone_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        make(tmp_path / "pki", sites=1)
    finally:
        os.umask(before)
    for path in (tmp_path / "pki").rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_dir():
            assert mode == (0o755 & ~umask if path.name == "public" else 0o700), path
        else:
            assert mode == (0o600 if path.suffix in (".key", ".secret") else 0o644), path


def test_no_secret_is_readable_by_others_at_any_instant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    real = os.open

    def record(path: str, flags: int, mode: int = 0o777, **rest: int) -> int:
        if flags & os.O_CREAT:
            opened.append((str(path), mode))
        return real(path, flags, mode, **rest)

    monkeypatch.setattr(os, "open", record)
    make(tmp_path, sites=1)
    modes = {mode for path, mode in opened if ".key." in path or ".secret." in path}
    assert modes == {0o600}


def test_making_twice_changes_nothing(pki: Path) -> None:
    before = state_of(pki)
    assert make(pki, sites=2, hosts=["fl.example.org"]) == []
    assert state_of(pki) == before


def test_a_half_made_folder_is_completed_around_what_is_there(pki: Path) -> None:
    before = state_of(pki)
    missing = {
        *("superlink/tls.crt", "gateway/ca.crt", "serverapp/superexec.secret"),
        *("site-1/node.pub", "public/site-1.pub", "site-2/runtime.crt", "site-2-app/ca.crt"),
    }
    for name in missing:
        (pki / name).unlink()
    made = make(pki, sites=3, hosts=["fl.example.org"])
    new = {str(path.relative_to(pki)) for path in made}
    assert missing < new
    assert all("site-3" in name for name in new - missing)
    after = state_of(pki)
    assert all(after[name] == before[name] for name in before if name not in missing)
    assert inspect(pki, ["fl.example.org"]).faults == ()


def test_without_the_authoritys_key_nothing_is_signed_and_the_rest_still_works(pki: Path) -> None:
    (pki / "ca/ca.key").unlink()
    assert make(pki, sites=2) == []
    assert inspect(pki).faults == ()
    with pytest.raises(ConfigError, match=r"ca\.key is not there.*put it back"):
        make(pki, sites=3)
    before = state_of(pki / "gateway")
    with pytest.raises(ConfigError, match=r"ca\.key is not there"):
        rotate(pki, "gateway")
    assert state_of(pki / "gateway") == before


@pytest.mark.parametrize("name", ["gateway/tls.key", "site-1/runtime.key", "site-1/node.key"])
def test_a_lost_key_is_never_replaced_on_the_quiet(pki: Path, name: str) -> None:
    (pki / name).unlink()
    with pytest.raises(ConfigError, match="is there without"):
        make(pki, sites=2)


def test_a_host_that_an_older_certificate_is_not_for_is_refused(pki: Path) -> None:
    with pytest.raises(ConfigError, match=r"not for other\.example.*rotate .* --host other"):
        make(pki, sites=2, hosts=["other.example"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sites": 0}, r"--sites=0 must lie"),
        ({"days": 0}, r"--days=0 must lie"),
        ({"days": 4000}, r"--days=4000 must lie"),
        ({"hosts": ["https://fl.example"]}, r"without https://"),
        ({"hosts": ["fl.example:8443"]}, r"or a port behind"),
        ({"owners": {"site-9": (0, 0)}}, r"--owner site-9=\.\.\. names no party"),
    ],
)
def test_arguments_out_of_range_are_told(
    tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, **{"sites": 1, **arguments})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_files_go_to_their_owner_and_stay_with_it(tmp_path: Path) -> None:
    make(tmp_path, sites=1, owners={"gateway": (1234, 2345), "site-1": (3456, 3456)})
    rotate(tmp_path, "tls")
    (tmp_path / "gateway/ca.crt").unlink()
    make(tmp_path, sites=1)

    def owners(party: str) -> set[tuple[int, int]]:
        paths = [tmp_path / party, *(tmp_path / party).iterdir()]
        return {(path.stat().st_uid, path.stat().st_gid) for path in paths}

    assert owners("gateway") == {(1234, 2345)}
    assert owners("site-1") == {(3456, 3456)}
    assert owners("superlink") == {(0, 0)}


@pytest.mark.parametrize("party", ["superlink", "gateway"])
@pytest.mark.parametrize("host", ["gateway", "superlink", "localhost", "127.0.0.1", "::1"])
def test_tls_believes_a_server_by_each_of_its_names(pki: Path, party: str, host: str) -> None:
    shake_hands(pki / party, pki / "public/ca.crt", host)


@pytest.mark.parametrize("host", ["fl.example.org", "192.0.2.7"])
def test_tls_believes_a_server_by_the_hosts_that_were_asked_for(pki: Path, host: str) -> None:
    shake_hands(pki / "gateway", pki / "public/ca.crt", host)


@pytest.mark.parametrize("host", ["evil.example.org", "192.0.2.8"])
def test_tls_and_the_check_refuse_another_host(pki: Path, host: str) -> None:
    folder, ca = pki / "gateway", pki / "public/ca.crt"
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(folder, ca, host)
    with pytest.raises(ConfigError, match=f"not for {host} but for gateway"):
        check_server(folder / "tls.crt", folder / "tls.key", ca, host)


def test_tls_and_the_check_refuse_another_authority(pki: Path, tmp_path: Path) -> None:
    make(tmp_path / "other", sites=1)
    folder, ca = pki / "gateway", tmp_path / "other/public/ca.crt"
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(folder, ca, "gateway")
    with pytest.raises(ConfigError, match="not signed by the authority"):
        check_server(folder / "tls.crt", folder / "tls.key", ca, "gateway")


@pytest.mark.parametrize(
    ("age", "days", "message"), [(400, 365, "expired on"), (-30, 365, "not valid before")]
)
def test_tls_and_the_check_refuse_what_is_not_valid_today(
    pki: Path, age: int, days: int, message: str
) -> None:
    replace_certificate(pki, "gateway", days=days, now=datetime.now(UTC) - timedelta(days=age))
    folder, ca = pki / "gateway", pki / "public/ca.crt"
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(folder, ca, "gateway")
    with pytest.raises(ConfigError, match=message):
        check_server(folder / "tls.crt", folder / "tls.key", ca, "gateway")


def test_a_certificate_within_two_weeks_of_its_end_is_warned_of(pki: Path) -> None:
    replace_certificate(pki, "gateway", days=20, now=datetime.now(UTC) - timedelta(days=10))
    found = inspect(pki)
    assert found.faults == ()
    assert len(found.warnings) == 1
    assert "gateway/tls.crt expires on" in found.warnings[0]
    assert "in 9 days" in found.warnings[0]


def test_a_certificate_never_outlives_its_authority() -> None:
    authority = Authority.of_key(tls_key(), now=datetime.now(UTC) - timedelta(days=3600))
    issued = x509.load_pem_x509_certificate(authority.issue(tls_key(), ["a"], days=365))
    assert issued.not_valid_after_utc == authority.certificate.not_valid_after_utc


def test_keys_and_certificates_of_different_pairs_are_told(pki: Path) -> None:
    other = (pki / "superlink/tls.key").read_bytes()
    (pki / "gateway/tls.key").write_bytes(other)
    folder = pki / "gateway"
    with pytest.raises(ConfigError, match="do not belong together"):
        check_server(folder / "tls.crt", folder / "tls.key", folder / "ca.crt", "gateway")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_secrets_that_others_may_read_are_told(pki: Path, mode: int) -> None:
    names = ("gateway/tls.key", "site-1/node.key", "serverapp/superexec.secret", "ca/ca.key")
    for name in names:
        (pki / name).chmod(mode)
    faults = inspect(pki).faults
    assert len(faults) == len(names)
    for name in names:
        assert any(f"{name} is readable by others (mode {mode:04o})" in f for f in faults)
    with pytest.raises(ConfigError, match="chmod 600"):
        check_node_key(pki / "site-1/node.key")


@pytest.mark.parametrize("content", [b"", b"garbage", b"-----BEGIN CERTIFICATE-----\nx\n"])
def test_files_that_hold_something_else_are_told(pki: Path, content: bytes) -> None:
    folder = pki / "gateway"
    for name in ("tls.key", "tls.crt"):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
            check_server(folder / "tls.crt", folder / "tls.key", folder / "ca.crt", "gateway")
        (folder / name).write_bytes(kept)
    (pki / "site-1/node.key").write_bytes(content)
    with pytest.raises(ConfigError, match="OpenSSH's format"):
        check_node_key(pki / "site-1/node.key")


def test_flower_reads_node_keys_and_the_shared_secret(pki: Path) -> None:
    site = pki / "site-1"
    arguments = argparse.Namespace(
        auth_supernode_private_key=str(site / "node.key"), auth_supernode_public_key=None
    )
    keys = _try_setup_client_authentication(arguments)
    assert keys is not None
    own = public_key_to_bytes(keys[1])
    assert own == try_load_public_key(pki / "public/site-1.pub")
    assert own != try_load_public_key(pki / "public/site-2.pub")
    secret = load_superexec_auth_secret(str(site / "superexec.secret"))
    assert secret == load_superexec_auth_secret(str(pki / "site-1-app/superexec.secret"))
    assert secret is not None
    assert len(bytes.fromhex(secret.decode())) == 32


def test_a_site_elsewhere_makes_its_key_alone(tmp_path: Path) -> None:
    made = make_node("clinic-north", tmp_path / "own")
    assert [path.name for path in made] == ["node.key", "node.pub"]
    assert (tmp_path / "own/node.pub").read_text().split()[2] == "clinic-north"
    before = state_of(tmp_path)
    assert make_node("clinic-north", tmp_path / "own") == []
    assert state_of(tmp_path) == before
    check_node_key(tmp_path / "own/node.key")
    with pytest.raises(ConfigError, match="NAME='../x'"):
        make_node("../x", tmp_path)


@pytest.mark.parametrize(
    ("party", "replaced"),
    [
        ("gateway", {"gateway/tls.key", "gateway/tls.crt"}),
        (
            "superlink",
            {"superlink/tls.key", "superlink/tls.crt"}
            | {"superlink/superexec.secret", "serverapp/superexec.secret"},
        ),
        (
            "site-1",
            {"site-1/node.key", "site-1/node.pub", "public/site-1.pub", "site-1/runtime.key"}
            | {"site-1/runtime.crt", "site-1/superexec.secret", "site-1-app/superexec.secret"},
        ),
        (
            "tls",
            {f"{party}/tls.{end}" for party in ("superlink", "gateway") for end in ("key", "crt")}
            | {f"site-{n}/runtime.{end}" for n in (1, 2) for end in ("key", "crt")},
        ),
    ],
)
def test_rotation_replaces_one_party_and_keeps_the_authority(
    pki: Path, party: str, replaced: set[str]
) -> None:
    before = state_of(pki)
    done = rotate(pki, party)
    after = state_of(pki)
    assert {name for name in after if after[name] != before[name]} == replaced
    assert {str(path.relative_to(pki)) for path in done.made} == replaced
    assert inspect(pki, ["fl.example.org"]).faults == ()
    shake_hands(pki / "gateway", pki / "public/ca.crt", "fl.example.org")
    told = " ".join(done.next_steps)
    assert ("flwr supernode register" in told) == ("site" in party)


def test_rotation_adds_a_host(pki: Path) -> None:
    rotate(pki, "gateway", hosts=["new.example.org"])
    for host in ("new.example.org", "fl.example.org", "gateway"):
        shake_hands(pki / "gateway", pki / "public/ca.crt", host)


def test_rotation_of_nobody_names_those_that_there_are(pki: Path) -> None:
    with pytest.raises(ConfigError, match="choose one of superlink, gateway, site-1, site-2, tls"):
        rotate(pki, "site-7")


def test_the_command_makes_checks_and_says_each_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "pki")
    assert cli._main(["certs", "make", folder, "--sites", "1", "--host", "fl.example.org"]) == 0
    assert "made " in capsys.readouterr().out
    assert cli._main(["certs", "make", folder, "--sites", "1"]) == 0
    assert "Nothing is missing" in capsys.readouterr().out
    assert cli._main(["certs", "check", folder, "--host", "fl.example.org"]) == 0
    assert capsys.readouterr().out.startswith("OK: ")
    (tmp_path / "pki/gateway/tls.key").chmod(0o644)
    (tmp_path / "pki/public/site-1.pub").write_text("ssh-rsa AAAA other\n")
    assert cli._main(["certs", "check", folder, "--host", "other.example.org"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 4
    assert told[0].startswith("Error: ")
    for part in ("superlink/tls.crt is not for", "gateway/tls.crt is not for", "mode 0644"):
        assert sum(part in line for line in told) == 1
    assert sum("is not the public half" in line for line in told) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["make", "{}/pki", "--owner", "gateway=me"], "must be PARTY=UID:GID"),
        (["make", "{}/file"], "file"),
        (["check", "{}/nothing"], "holds no keys or certificates"),
        (["rotate", "{}/nothing", "gateway"], "has no party 'gateway'"),
        (["node", "a b", "--out", "{}"], "NAME='a b'"),
    ],
)
def test_the_command_answers_bad_input_by_one_message_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "file").write_text("")
    assert cli._main(["certs", *(text.format(tmp_path) for text in arguments)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
