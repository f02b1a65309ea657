"""The server's account of client-level privacy, kept in a ledger of the run's folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fl_app.privacy.ledger import LEDGER_NAME, Ledger
from fl_app.privacy.ledger_format import Account, Charge
from fl_app.privacy.spending import Payment
from fl_app.types import PrivacyUnit

EVERYBODY = "*"
"""The client of an entry that all clients pay: who was asked is secret."""

_DATA_SET = "clients"


class LedgerPayments:
    """`fl_app.privacy.spending.Payments` on disk: each is synced before its noise is drawn.

    Args:
        run_dir: The run's folder.
        run: The run's name, the same after a resume.
    """

    def __init__(self, run_dir: Path, *, run: str) -> None:
        self._run = run
        self._ledger = Ledger(run_dir / LEDGER_NAME)

    def pay(self, payment: Payment) -> None:
        """Append a payment: one entry for each who pays, in one synced write."""
        self._ledger.charge(
            [
                Charge(
                    account=Account(client=client, data_set=_DATA_SET),
                    unit=PrivacyUnit.CLIENT,
                    run=self._run,
                    round=payment.round,
                    event=payment.event,
                )
                for client in (payment.clients if payment.clients is not None else (EVERYBODY,))
            ]
        )

    def paid(self) -> Iterator[Payment]:
        """Yield all payments so far, those before a resume included, payer by payer."""
        for entry in self._ledger:
            client = entry.charge.account.client
            yield Payment(
                round=entry.charge.round,
                event=entry.charge.event,
                clients=None if client == EVERYBODY else (client,),
            )
