"""What is compared with what, and which ratio each comparison needs."""

from __future__ import annotations

from dataclasses import dataclass

from line_up import (
    BARE,
    BARE_PROCESSES,
    BARE_THREADS,
    FLOWER,
    FLOWER_TUNED,
    LIMIT,
    LIMIT_THREADS,
    LIMIT_TUNED,
    LIMIT_TUNED_THREADS,
    OPACUS,
    OPACUS_THREADS,
    OURS,
    PFL,
    PRIVATE,
    MakeContender,
    bare,
    flower,
    opacus,
    ours,
    ours_one_by_one,
    pfl,
    the_limit,
)
from workloads import MEAN_RAGGED, WORKLOADS, Workload


@dataclass(frozen=True, kw_only=True)
class Need:
    """A bound on a ratio of seconds; where several contenders are named, the fastest counts.

    Attributes:
        of: Contenders above the line.
        over: Contenders below it.
        at_least: Lower bound, or None.
        at_most: Upper bound, or None.
    """

    of: tuple[str, ...]
    over: tuple[str, ...]
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison.

    Attributes:
        key: What ``--only`` calls it.
        title: Heading of its table.
        workload: What all contenders train, but those of another workload of the same cohort.
        contenders: Who competes, in the order of their turns.
        needs: What must be reached.
        reference: Contender that the others are quoted as multiples of.
        per_record: Compare seconds a record and not seconds a round: rounds differ in size.
        same_model: Contenders of ours must end with the bare loop's model.
        distinct_clients: Play at least so many rounds that so many different clients can take
            part, and show the memory; 0: as many rounds as are asked for.
    """

    key: str
    title: str
    workload: Workload
    contenders: tuple[MakeContender, ...]
    needs: tuple[Need, ...]
    reference: str = OURS
    per_record: bool = False
    same_model: bool = False
    distinct_clients: int = 0


def _plain(key: str, title: str, *, needed: tuple[float, float, float, float]) -> Row:
    """Return a model without privacy against all others; needed: bare, pfl, Flower, limit."""
    over_bare, over_pfl, over_flower, over_limit = needed
    return Row(
        key=key,
        title=title,
        workload=WORKLOADS[key],
        contenders=(
            ours(key),
            ours_one_by_one(key),
            bare(key),
            pfl(key),
            the_limit(key, LIMIT, threads=1, tuned=False),
            the_limit(key, LIMIT_THREADS, threads=2, tuned=False),
            the_limit(key, LIMIT_TUNED, threads=1, tuned=True),
            the_limit(key, LIMIT_TUNED_THREADS, threads=2, tuned=True),
            flower(key),
            flower(key, FLOWER_TUNED, cpus=1),
        ),
        needs=(
            Need(of=(BARE,), over=(OURS,), at_least=over_bare),
            Need(of=(PFL,), over=(OURS,), at_least=over_pfl),
            Need(of=(FLOWER,), over=(OURS,), at_least=over_flower),
            Need(of=(OURS,), over=(LIMIT, LIMIT_THREADS), at_most=over_limit),
            Need(of=(OURS,), over=(LIMIT_TUNED, LIMIT_TUNED_THREADS), at_most=over_limit),
        ),
        same_model=True,
    )


def _private(key: str, title: str, *, over_opacus: float) -> Row:
    """Return a model with record-level privacy, ours with its ledger, against loops of Opacus."""
    return Row(
        key=f"{key}_dp",
        title=title,
        workload=WORKLOADS[key],
        contenders=(
            ours(key, *PRIVATE),
            ours_one_by_one(key, *PRIVATE),
            opacus(key),
            opacus(key, OPACUS_THREADS, threads=2),
        ),
        needs=(Need(of=(OPACUS, OPACUS_THREADS), over=(OURS,), at_least=over_opacus),),
    )


def _ragged(key: str, title: str) -> Row:
    """Return clients of all sizes against clients of one size, ours both."""
    equal, ragged = f"ours, {MEAN_RAGGED} records each", "ours, 5 to 500 records"
    return Row(
        key=f"{key}_ragged",
        title=title,
        workload=WORKLOADS[key],
        contenders=(ours(f"{key}_equal", name=equal), ours(f"{key}_ragged", name=ragged)),
        needs=(Need(of=(ragged,), over=(equal,), at_most=1.4),),
        reference=equal,
        per_record=True,
    )


def _population() -> Row:
    """Return a million clients against a thousand, ours both."""
    thousand, million = "ours, 1,000 clients", "ours, 1,000,000 clients"
    return Row(
        key="population",
        title="MLP, 100 of 1,000,000 clients against 100 of 1,000",
        workload=WORKLOADS["mlp"],
        contenders=(ours("mlp", name=thousand), ours("mlp_million", name=million)),
        needs=(Need(of=(million,), over=(thousand,), at_most=1.1),),
        reference=thousand,
        distinct_clients=10_000,
    )


def _vgg() -> Row:
    """Return a model that is all arithmetic, against loops that use the same two cores."""
    return Row(
        key="vgg",
        title="CNN of 5 M parameters on 3x32x32, 10 of 100 clients, 2 batches of 32 each",
        workload=WORKLOADS["vgg"],
        contenders=(
            ours("vgg", training=""),
            bare("vgg", BARE_THREADS, threads=2),
            bare("vgg", BARE_PROCESSES, processes=2),
        ),
        needs=(
            Need(of=(BARE_THREADS,), over=(OURS,), at_least=0.95),
            Need(of=(BARE_PROCESSES,), over=(OURS,), at_least=0.95),
        ),
        same_model=True,
    )


ROWS = (
    _plain("mlp", "MLP 784-10-10", needed=(20, 25, 250, 2)),
    _plain("cnn", "LeNet, 44k parameters", needed=(2.5, 2.7, 12, 1.3)),
    _private("mlp", "MLP 784-10-10, DP-SGD in the clients", over_opacus=25),
    _private("cnn", "LeNet, DP-SGD in the clients", over_opacus=4),
    _ragged("mlp", "MLP 784-10-10, clients of all sizes"),
    _ragged("cnn", "LeNet, clients of all sizes"),
    _population(),
    _vgg(),
)
