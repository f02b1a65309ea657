"""``fl-app ledger``: what a ledger says, whether it is whole, and all of it as a file."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fl_app.privacy.accounting import Accountant
    from fl_app.privacy.ledger import Ledger
    from fl_app.privacy.policy import Policy
    from fl_app.privacy.statement import BoundOverRuns, Statement

DEFAULT_DELTA = 1e-5

ledger_cli = typer.Typer(no_args_is_help=True, help="Show, verify or export a privacy ledger.")


class Format(StrEnum):
    """How `export` writes."""

    JSON = "json"
    CSV = "csv"


_Path = Annotated[
    Path, typer.Argument(help="A ledger, the folder of a run, or an owner's policy file.")
]
_Delta = Annotated[
    float | None, typer.Option(help="Delta of the epsilons; default: the policy's, or 1e-5.")
]
_Accountant = Annotated[
    str | None, typer.Option(help="rdp, pld or prv; default: the policy's, or rdp.")
]


@ledger_cli.command()
def show(
    path: _Path,
    delta: _Delta = None,
    accountant: _Accountant = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what each account has spent, and what is left of its budget."""
    from fl_app.privacy.statement import bound_over_runs, statements

    source = _source(path, delta, accountant)
    source.ledger.verify()
    found = statements(source.ledger, source.accountant, delta=source.delta, policy=source.policy)
    bound = bound_over_runs(source.ledger, source.accountant, delta=source.delta)
    if as_json:
        typer.echo(json.dumps(_shown(source, found, bound), indent=2))
    else:
        _print(source, found, bound)


@ledger_cli.command()
def verify(path: _Path) -> None:
    """Check that nothing in a ledger was changed, moved or lost; exit code 1 if it was."""
    ledger = _source(path, None, None).ledger
    found = ledger.verify()
    notes = []
    if found.torn_bytes:
        notes.append(
            f"; {found.torn_bytes} bytes at the end are of a charge that was cut short and never "
            "acknowledged, and go with the next charge"
        )
    if found.ahead:
        notes.append(f"; the last {found.ahead} are not in the head yet, as after a crash")
    typer.echo(f"OK: {ledger.path} holds {found.entries} entries{''.join(notes)}.")


@ledger_cli.command()
def export(
    path: _Path,
    format: Annotated[Format, typer.Option(help="One object a line, or a table.")] = Format.JSON,
    delta: _Delta = None,
    accountant: _Accountant = None,
) -> None:
    """Print all entries, each with the epsilon that its account had spent after it."""
    source = _source(path, delta, accountant)
    source.ledger.verify()
    rows = _rows(source)
    if format is Format.JSON:
        for row in rows:
            typer.echo(json.dumps(row))
        return
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows([row[column] for column in _COLUMNS] for row in rows)


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What a path leads to, and how it is counted."""

    ledger: Ledger
    accountant: Accountant
    delta: float
    policy: Policy | None


_COLUMNS = (
    *("seq", "time", "client", "data_set", "unit", "run", "round"),
    *("noise_multiplier", "sample_rate", "count", "epsilon", "delta"),
)


def _source(path: Path, delta: float | None, accountant: str | None) -> _Source:
    """Return what a path leads to.

    Raises:
        ConfigError: It leads to no ledger, or delta or accountant cannot be.
    """
    from fl_app.errors import ConfigError
    from fl_app.privacy.accounting import accountant_named
    from fl_app.privacy.ledger import LEDGER_NAME, Ledger
    from fl_app.privacy.policy_file import read_policy

    policy = read_policy(path) if path.suffix in (".yaml", ".yml") else None
    if policy is not None:
        ledger = policy.open_ledger()
    else:
        ledger = Ledger(path / LEDGER_NAME if path.is_dir() else path)
    if not ledger.path.exists() and not ledger.head_path.exists():
        raise ConfigError(
            f"{ledger.path} does not exist: nothing has been charged there, or PATH is not a "
            "ledger, the folder of a run with privacy, or a policy file (.yaml)."
        )
    if delta is None:
        delta = policy.terms.delta if policy is not None else DEFAULT_DELTA
    if not 0 < delta < 1:
        raise ConfigError(f"--delta={delta} must lie between 0 and 1, such as 1e-5.")
    name = accountant or (policy.accountant if policy is not None else "rdp")
    return _Source(ledger=ledger, accountant=accountant_named(name), delta=delta, policy=policy)


def _shown(source: _Source, found: list[Statement], bound: BoundOverRuns | None) -> dict[str, Any]:
    return {
        "ledger": str(source.ledger.path),
        "delta": source.delta,
        "accountant": source.accountant.name,
        "accounts": [
            {
                "client": one.account.client,
                "data_set": one.account.data_set,
                "unit": str(next(iter(one.tally.units))),
                "rounds": one.tally.rounds,
                "runs": list(one.runs),
                "events": [
                    {
                        "noise_multiplier": event.noise_multiplier,
                        "sample_rate": event.sample_rate,
                        "count": event.count,
                    }
                    for event in one.tally.events
                ],
                "epsilon": _finite(one.epsilon),
                "limit": one.limit,
                "rounds_left": one.rounds_left,
            }
            for one in found
        ],
        "bound_over_runs": None
        if bound is None
        else {
            "client": bound.account.client,
            "data_set": bound.account.data_set,
            "runs": bound.runs,
            "epsilon": _finite(bound.epsilon),
            "delta": bound.delta,
        },
    }


def _print(source: _Source, found: list[Statement], bound: BoundOverRuns | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(Text(str(source.ledger.path)))
    by = f"by {source.accountant.name} at delta={source.delta:g}, over all rounds of all runs"
    if not found:
        console.print("No account has been charged yet.")
        return
    limited = any(one.limit is not None for one in found)
    table = Table("client", "data set", "unit", "rounds", "runs", "events", "ε")
    if limited:
        table.add_column("of")
        table.add_column("rounds left")
    for one in found:
        left = [_number(one.limit), "–" if one.rounds_left is None else f"{one.rounds_left:,}"]
        cells = [
            one.account.client,
            one.account.data_set,
            next(iter(one.tally.units)),
            f"{one.tally.rounds:,}",
            f"{len(one.runs):,}",
            _events(one),
            _number(one.epsilon),
            *(left if limited else []),
        ]
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    console.print(Text(f"ε is an upper bound {by}."))
    if bound is not None and bound.runs > 1:
        told = (
            f"Over the {bound.runs} runs together, by basic composition, client "
            f"{bound.account.client} stands worst: ε = {_number(bound.epsilon)} at "
            f"δ = {bound.delta:g}."
        )
        console.print(Text(told))


def _events(one: Statement) -> str:
    """Return the mechanisms of an account in a few words."""
    most = 3
    told = [
        f"{e.count:,} × z={e.noise_multiplier:g} q={e.sample_rate:.4g}" for e in one.tally.events
    ]
    more = [f"and {len(told) - most} more"] if len(told) > most else []
    return "\n".join([*told[:most], *more])


def _rows(source: _Source) -> Iterator[dict[str, Any]]:
    from fl_app.privacy.statement import cumulative

    for entry, epsilon in cumulative(source.ledger, source.accountant, delta=source.delta):
        yield {
            "seq": entry.seq,
            "time": entry.time.isoformat(timespec="milliseconds"),
            **entry.charge.fields(),
            "epsilon": _finite(epsilon),
            "delta": source.delta,
        }


def _finite(epsilon: float) -> float | None:
    return epsilon if math.isfinite(epsilon) else None


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}" if math.isfinite(value) else "∞"
