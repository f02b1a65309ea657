"""Submit the app to a SuperLink, show its log, and exit 0 only if the run completed.

The SuperLink's own word decides, because `flwr run --stream` exits 0 for a failed run, too.
Standard library and the `flwr` command only. Read from the environment:

    SUPERLINK     host:port of the SuperLink, without TLS (default: superlink:8000)
    OVERRIDES     Hydra overrides of the run, as after `fl-app run`
    CONFIG_JSON   a whole resolved configuration instead; wins over OVERRIDES
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

APP = Path(__file__).resolve().parent.parent
CONNECTION = "federation"
POLL_S = 1.0


def flwr_json(*arguments: str) -> Any:
    """Return what ``flwr <arguments> --format json`` prints, or end with its complaint."""
    done = subprocess.run(
        ["flwr", *arguments, "--format", "json"], capture_output=True, text=True, check=False
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        sys.exit(f"flwr {arguments[0]} answered no JSON:\n{done.stdout}{done.stderr}")
    if done.returncode != 0 or not answer.get("success"):
        sys.exit(f"flwr {arguments[0]} failed: {answer.get('error-message') or done.stdout}")
    return answer


def status_of(run_id: str) -> str:
    """Return the SuperLink's word on a run, such as ``running`` or ``finished:completed``."""
    return str(flwr_json("ls", CONNECTION, "--run-id", run_id)["runs"][0]["status"])


def main() -> int:
    """Submit, follow, judge."""
    with tempfile.TemporaryDirectory() as home:
        os.environ["FLWR_HOME"] = home  # the connections of whoever runs this stay as they are
        address = os.environ.get("SUPERLINK", "superlink:8000")
        Path(home, "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n'
            f'[superlink.{CONNECTION}]\naddress = "{address}"\ninsecure = true\n'
        )
        run_config = Path(home, "run.toml")  # a file, so that no shell and no parser eats quotes
        run_config.write_text(
            "".join(
                f"{key} = {json.dumps(os.environ.get(variable, ''), ensure_ascii=False)}\n"
                for key, variable in (("overrides", "OVERRIDES"), ("config-json", "CONFIG_JSON"))
            ),  # a JSON string is a TOML string
            encoding="utf-8",
        )
        started = flwr_json("run", str(APP), CONNECTION, "--run-config", str(run_config))
        run_id = str(started["run-id"])
        print(f"run {run_id} submitted", flush=True)
        subprocess.run(["flwr", "log", run_id, CONNECTION, "--stream"], check=False)
        while not (status := status_of(run_id)).startswith("finished"):
            time.sleep(POLL_S)
        print(f"run {run_id} {status}", flush=True)
        return 0 if status == "finished:completed" else 1


if __name__ == "__main__":
    sys.exit(main())
