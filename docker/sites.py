"""Print what docker-compose.yml lacks for more than three sites; both Compose versions read it.

    python docker/sites.py 5 > docker-compose.override.yml   # read by itself from then on
    echo CLIENTS=5 >> .env
    docker compose up

Site 3 of docker-compose.yml is the pattern: its text is copied with other numbers in it, so that
a site is described in one place. Standard library only.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

COMPOSE = Path(__file__).resolve().parent.parent / "docker-compose.yml"
PATTERN = 3
"""The last site that docker-compose.yml has, and the one that is copied."""

MOST = 14
"""Each site has two networks, and Docker's own pool of addresses holds about thirty."""


def overlay(sites: int, compose: str) -> str:
    """Return a compose file that adds the sites after the third to ``compose``.

    Raises:
        ValueError: `sites` is out of range, or ``compose`` lacks the parts that are looked for.
    """
    if not PATTERN < sites <= MOST:
        raise ValueError(
            f"sites={sites} must lie in ({PATTERN}, {MOST}]: docker-compose.yml has {PATTERN}, and "
            "more networks than that need address pools of their own (dockerd's "
            "default-address-pools)."
        )
    head, _, services = compose.partition("\nservices:\n")
    pattern = re.search(rf"  # site {PATTERN}\n(.*?)\n\n", services, re.DOTALL)
    volumes = compose.partition("\nvolumes:\n")[2]
    if pattern is None or not volumes:
        raise ValueError(f"{COMPOSE} has no services of site {PATTERN}, or no volumes.")
    new = range(PATTERN + 1, sites + 1)
    its_volumes = [line for line in volumes.splitlines() if f"-{PATTERN}" in line]
    text = [
        f"# Sites {PATTERN + 1} to {sites}, by docker/sites.py; they need CLIENTS={sites} too.",
        head[head.index("\nx-") :],
        "services:",
        *(_numbered(pattern[1], n) for n in new),
        *_wired(new),
        "networks:",
        *(f"  {kind}-{n}: {{internal: true}}" for n in new for kind in ("site", "app")),
        "volumes:",
        *(_numbered(line, n) for n in new for line in its_volumes),
    ]
    return "\n".join(text) + "\n"


def _wired(new: range) -> list[str]:
    """Return what the services that all sites share get for the new ones; Compose adds it."""
    lines = ["  certs:", "    volumes:"]
    lines += [f"      - pki-site-{n}{app}:/pki/site-{n}{app}" for n in new for app in ("", "-app")]
    lines += ["  gateway:", f"    networks: [{', '.join(f'site-{n}' for n in new)}]"]
    for run, worker in (("run", ""), ("run-gpu", "-gpu")):
        lines += [f"  {run}:", "    depends_on:"]
        for n in new:
            lines += [f"      clientapp-{n}: {{condition: service_started}}"]
            lines += [f"      site-{n}{worker}: {{condition: service_started}}"]
    return lines


def _numbered(text: str, number: int) -> str:
    """Return the text of site 3 with another number in it."""
    return re.sub(rf"(?<=-){PATTERN}\b|(?<=SITE_){PATTERN}(?=_)", str(number), text)


if __name__ == "__main__":
    try:
        print(overlay(int(sys.argv[1]), COMPOSE.read_text(encoding="utf-8")), end="")
    except (IndexError, ValueError) as error:
        sys.exit(f"usage: sites.py NUMBER_OF_SITES ({error})")
