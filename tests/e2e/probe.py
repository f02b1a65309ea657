"""What somebody hostile tries in a container; reads what to try as JSON, prints what came of it.

Runs inside, from stdin, with the standard library and whatever the image has.

    {"tcp": [[host, port]], "http": [[host, port, method, path]], "flwr": [[host:port, command...]],
     "files": [names]}
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CA = "/pki/ca.crt"


def tcp(host: str, port: int) -> str:
    """Return ``open``, or why there is no connection."""
    try:
        with socket.create_connection((host, port), timeout=3):
            return "open"
    except OSError as error:
        return type(error).__name__


def http_status(host: str, port: int, method: str, path: str) -> int | str:
    """Return the status of a request over TLS that trusts any certificate, or the error."""
    context = ssl._create_unverified_context()
    connection = http.client.HTTPSConnection(host, port, timeout=10, context=context)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        connection.putheader("Content-Type", "application/protobuf")
        connection.putheader("Content-Length", "0")
        connection.endheaders()
        return connection.getresponse().status
    except OSError as error:
        return type(error).__name__
    finally:
        connection.close()


def flwr(address: str, *command: str) -> str:
    """Return what Flower's own command says, pointed at an address."""
    with tempfile.TemporaryDirectory() as home:
        Path(home, "config.toml").write_text(
            f'[superlink.there]\naddress = "{address}"\nroot-certificates = "{CA}"\n'
        )
        place = ["/app", "there"] if command[0] == "run" else ["there"]
        if command[0] == "stop":
            place = [command[1], "there"]
        try:
            done = subprocess.run(
                ["flwr", command[0], *place, "--format", "json"],
                env={**os.environ, "FLWR_HOME": home, "HOME": home},
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "no answer"
    return done.stdout + done.stderr


def readable(names: list[str]) -> list[str]:
    """Return all files of these names, or below folders of these names, that can be read."""
    found = []
    for folder, _, files in os.walk("/"):
        if folder.startswith(("/proc", "/sys", "/opt/venv", "/usr/lib")):
            continue
        for file in files:
            path = os.path.join(folder, file)
            if any(part in names for part in path.split("/")) and os.access(path, os.R_OK):
                found.append(path)
    return found


asked = json.loads(sys.argv[1])
with ThreadPoolExecutor(4) as pool:  # most of them wait for an answer that does not come
    tried = {
        name: list(pool.map(lambda one, try_=try_: try_(*one), asked.get(name, ())))
        for name, try_ in (("tcp", tcp), ("http", http_status), ("flwr", flwr))
    }
print(json.dumps({**tried, "files": readable(asked["files"]) if "files" in asked else []}))
