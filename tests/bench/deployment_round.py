"""Where the seconds of a deployed round go, and how many rounds outlast a storm of faults.

    python tests/bench/deployment_round.py [--rounds 20]
    python tests/bench/deployment_round.py --soak 100

Three sites and their server as plain processes on loopback, as docker-compose.yml has them: TLS,
authentication, process isolation, gateway. The parts of a round are those of the site whose reply
came last, taken from when lines appear in the logs. With ``--soak`` every fifth round something
random is killed, paused or cut; the run must end with each round in its record once, and each
site's ledger must hold every round that it trained.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from federation_process import Federation, Party, federation  # noqa: E402 - needs the path above
from federation_run import Playing, ledgers_hold_what_was_trained  # noqa: E402

LOOK_S = 0.01
EVERY = 5
"""Rounds between two faults of the storm."""

TINY = (
    "experiment=federation",
    "task/model=logistic",
    "client.epochs=1",
    "fairness_clients=0",
    "hydra.run.dir=run",
)

PARTS = {
    "waits to be fetched (a SuperNode sleeps 3 s)": ("pushed", "Receiving: train"),
    "comes to the SuperNode": ("Receiving: train", "Received successfully"),
    "an interpreter starts for it": ("Received successfully", "Start `flwr-clientapp`"),
    "is relayed, and trained on": ("Start `flwr-clientapp`", "Answered train"),
    "the answer comes to the SuperNode": ("Answered train", "Sending: train"),
    "and to the SuperLink": ("Sending: train", "Sent successfully"),
    "the server adds up, measures, records": ("Sent successfully", "round"),
}
"""What happens to a message in a round, from one line of a log to another."""


@dataclass(kw_only=True)
class Watch:
    """When lines appeared in the logs of a site, looked at every `LOOK_S`."""

    party: Party
    words: tuple[str, ...]
    seen: list[tuple[float, str]] = field(default_factory=list)
    _position: int = 0

    def look(self) -> None:
        path = self.party.folder / f"{self.party.name}.log"
        if not path.exists():
            return
        with path.open("rb") as log:
            log.seek(self._position)
            new = log.read()
            self._position += len(new)
        now = time.time()
        for line in new.decode(errors="replace").splitlines():
            self.seen += [(now, word) for word in self.words if word in line]


def measure(rounds: int) -> None:
    """Print the parts of a round."""
    folder = Path(tempfile.mkdtemp())
    with federation(folder) as parties:
        watches = {
            site.client: [
                Watch(
                    party=site.supernode,
                    words=(
                        "Receiving: train",
                        "Received successfully",
                        "Sending: train",
                        "Sent successfully",
                    ),
                ),
                Watch(party=site.clientapp, words=("Start `flwr-clientapp`",)),
                Watch(party=site.worker, words=("Answered train",)),
            ]
            for site in parties.sites.values()
        }
        playing = Playing(parties, folder, *TINY, *parties.engine, f"rounds={rounds}")
        ends = _watched(playing, [w for each in watches.values() for w in each])
        played = playing.end()
        played.completed()
    seen = {c: sorted(x for w in each for x in w.seen) for c, each in watches.items()}
    table: dict[str, list[float]] = {part: [] for part in PARTS}
    for began, ended in pairwise(ends):
        last = max(seen, key=lambda c: _last(seen[c], "Sent successfully", began, ended))
        times = {"pushed": began, "round": ended}
        for word in {w for pair in PARTS.values() for w in pair} - times.keys():
            times[word] = _last(seen[last], word, began, ended)
        for part, (first, then) in PARTS.items():
            table[part].append(times[then] - times[first])
    print(f"{'a round':45} {statistics.median(b - a for a, b in pairwise(ends)):6.2f} s")
    for part, seconds in table.items():
        print(f"  {part:43} {statistics.median(seconds):6.2f} s")
    print(f"(medians of {len(ends) - 1} rounds; three sites, {_cores()} cores)")


def _watched(playing: Playing, watches: list[Watch]) -> list[float]:
    """Return when each round ended."""
    ends: list[float] = []
    while playing.process.poll() is None:
        for watch in watches:
            watch.look()
        while playing.has(len(ends) + 1):
            ends.append(time.time())
        time.sleep(LOOK_S)
    return ends


def _last(seen: list[tuple[float, str]], word: str, began: float, ended: float) -> float:
    times = [at for at, what in seen if what == word and began <= at <= ended]
    return times[-1] if times else began


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0))


# The storm ---------------------------------------------------------------------------------------


def faults(parties: Federation, dice: random.Random) -> dict[str, Callable[[], None]]:
    """Return what can happen, by name; each leaves everything running, or coming back."""
    site = parties.site(dice.choice(sorted(parties.sites)))

    def again(party: Party) -> Callable[[], None]:
        def happen() -> None:
            party.kill()
            party.start()

        return happen

    def supernode() -> None:
        site.supernode.kill()
        threading.Thread(target=site.supernode.come_back, daemon=True).start()

    def for_a_while(begin: Callable[[], None], stop: Callable[[], None]) -> Callable[[], None]:
        def happen() -> None:
            begin()
            time.sleep(dice.uniform(2.0, 20.0))
            stop()

        return happen

    return {
        "SuperNode killed": supernode,
        "ClientApp's SuperExec killed": again(site.clientapp),
        "site worker killed": again(site.worker),
        "SuperNode paused": for_a_while(site.supernode.pause, site.supernode.go_on),
        "network cut": for_a_while(site.link.cut, site.link.heal),
        "gateway killed": again(parties.gateway),
        "SuperLink killed": again(parties.superlink),
        "ServerApp killed": again(parties.serverapp),
    }


def soak(rounds: int, seed: int) -> None:
    """Play rounds in a storm, resuming whenever the run fails, and see that nothing is lost."""
    folder, dice = Path(tempfile.mkdtemp()), random.Random(seed)
    happened: Counter[str] = Counter()
    resumes = 0
    began = time.monotonic()
    with federation(folder, unit="record") as parties:
        private = ("privacy=record", "privacy.target_epsilon=null", "privacy.noise_multiplier=5.0")
        limits = (f"rounds={rounds}", "checkpoint_every=1", "selection.round_timeout_s=20")
        playing = Playing(parties, folder, *TINY, *private, *parties.engine, *limits)
        due, left = EVERY, list[str]()
        while True:
            while playing.process.poll() is None and not playing.has(due):
                time.sleep(0.2)
            if playing.process.poll() is None and due < rounds:
                # All in a random order, then again: chance alone leaves some out.
                possible = faults(parties, dice)
                left = left or dice.sample(sorted(possible), len(possible))
                name = left.pop()
                print(f"round {due}: {name}", flush=True)
                happened[name] += 1
                possible[name]()
                due += EVERY
                continue
            played = playing.end()
            if played.code == 0:
                break
            resumes += 1
            print(f"resumed: {played.said.strip().splitlines()[-1][:200]}", flush=True)
            assert resumes <= rounds, played.said
            engine = [e for e in parties.engine if not e.startswith("engine=")]
            playing = Playing(parties, folder, f"resume={playing.here}", *engine)
        summary = played.completed()
        numbers = [entry["round"] for entry in played.rounds]
        assert numbers == list(range(1, rounds + 1)), numbers
        ledgers_hold_what_was_trained(parties, played)
        updates = sum(entry["num_updates"] for entry in played.rounds)
    print(f"{summary['rounds']} rounds, {updates} of {3 * rounds} updates, none recorded twice")
    print(f"{resumes} resumes, {time.monotonic() - began:.0f} s")
    for name, times in happened.most_common():
        print(f"  {times:3} x {name}")


def main() -> None:
    """Measure, or weather the storm."""
    parser = argparse.ArgumentParser(description=re.sub(r"\s+", " ", __doc__ or "")[:100])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--soak", type=int, metavar="ROUNDS")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    if given.soak:
        soak(given.soak, given.seed)
    else:
        measure(given.rounds)


if __name__ == "__main__":
    main()
