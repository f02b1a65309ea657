"""What privacy costs: accuracy against epsilon, and seconds a round against plain training.

Run: ``make bench-privacy``. Every figure is of the quickstart, five seeds each; the noise is solved
from the target, for as many rounds as the schedule asks a client. Prints what PRIVACY.md shows.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import play, summary_of

EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0, None)
SEEDS = (1, 2, 3, 4, 5)


def played(epsilon: float | None, seed: int, *more: str) -> dict[str, Any]:
    """Return the summary of one run; None for training without privacy, with the same settings."""
    privacy = ["privacy=none"] if epsilon is None else [f"privacy.target_epsilon={epsilon}"]
    with tempfile.TemporaryDirectory() as folder:
        recipe = ("experiment=quickstart", f"seed={seed}", "progress=none", *privacy, *more)
        return summary_of(play(Path(folder) / "run", *recipe, tiny=False))


def main() -> None:
    """Print the table and the plot of accuracy, and the overhead."""
    means = []
    print("| ε | accuracy, mean of 5 seeds | lowest, highest |\n|---|---|---|")
    for epsilon in EPSILONS:
        found = [played(epsilon, seed)["metrics"]["accuracy"] for seed in SEEDS]
        means.append(statistics.fmean(found))
        name = "∞ (no privacy)" if epsilon is None else f"{epsilon:g}"
        print(f"| {name} | {means[-1]:.3f} | {min(found):.3f}, {max(found):.3f} |", flush=True)
    labels = json.dumps(["none" if epsilon is None else f"{epsilon:g}" for epsilon in EPSILONS])
    print("\n```mermaid\nxychart-beta")
    print(f'    title "Accuracy against ε"\n    x-axis "ε" {labels}')
    print('    y-axis "accuracy" 0 --> 1')
    print(f"    line [{', '.join(f'{mean:.3f}' for mean in means)}]\n```\n")
    for model in ("task/model=logistic", "task/model=mlp", "task/model=cnn"):
        pairs = [(played(8.0, s, model), played(None, s, model)) for s in SEEDS]  # in turn
        private, plain = (
            statistics.median(run["time_s"]["per_round"] for run in runs)
            for runs in zip(*pairs, strict=True)
        )
        print(
            f"{model}: {private * 1e3:.1f} ms a round with privacy, {plain * 1e3:.1f} ms without: "
            f"{private / plain:.1f}x"
        )


if __name__ == "__main__":
    main()
