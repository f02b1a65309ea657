"""``fl-app ledger``: what it prints for a ledger, a run's folder and a policy, and its codes."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from fl_app.cli import _main
from fl_app.privacy.accounting import GaussianEvent, PrvAccountant, RdpAccountant, adaptive_delta
from fl_app.privacy.ledger import Ledger
from fl_app.privacy.ledger_format import Account, Charge
from fl_app.types import PrivacyUnit

RDP = RdpAccountant()
EVENT = GaussianEvent(noise_multiplier=1.1, sample_rate=0.1, count=10)
OTHER = GaussianEvent(noise_multiplier=2.0, sample_rate=0.1, count=10)


def charge(client: str, run: str, round: int, event: GaussianEvent = EVENT) -> Charge:
    return Charge(
        account=Account(client=client, data_set="digits"),
        unit=PrivacyUnit.RECORD,
        run=run,
        round=round,
        event=event,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a ledger of two runs, and a policy."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for round in range(1, 4):
        ledger.charge([charge("0", "one", round), charge("1", "one", round)])
    ledger.charge([charge("0", "two", 1)])
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "version: 1\ndata_set: digits\nepsilon: 7\ndelta: 1e-6\nunit: record\n"
        "ledger: ledger.jsonl\n"
    )
    policy.chmod(0o600)
    return tmp_path


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    assert _main(["ledger", "show", "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def test_show_counts_each_account_and_all_runs_together(folder: Path, capsys) -> None:
    found = shown(capsys, folder)
    assert found["ledger"] == str(folder / "ledger.jsonl")
    assert (found["delta"], found["accountant"]) == (1e-5, "rdp")
    assert found["accounts"] == [
        {
            "client": client,
            "data_set": "digits",
            "unit": "record",
            "rounds": rounds,
            "runs": runs,
            "events": [{"noise_multiplier": 1.1, "sample_rate": 0.1, "count": 10 * rounds}],
            "epsilon": RDP.epsilon([EVENT.times(rounds)], delta=1e-5),
            "limit": None,
            "rounds_left": None,
        }
        for client, rounds, runs in (("0", 4, ["one", "two"]), ("1", 3, ["one"]))
    ]
    by_hand = RDP.epsilon([EVENT.times(3)], delta=1e-5) + RDP.epsilon([EVENT], delta=1e-5)
    assert found["bound_over_runs"] == {
        "client": "0",
        "data_set": "digits",
        "runs": 2,
        "epsilon": pytest.approx(by_hand, rel=1e-12),
        "delta": 2e-5,
    }
    assert shown(capsys, folder / "ledger.jsonl") == found
    assert shown(capsys, folder, "--delta", "1e-7")["accounts"][0]["epsilon"] == RDP.epsilon(
        [EVENT.times(4)], delta=1e-7
    )
    prv = shown(capsys, folder, "--accountant", "prv")["accounts"][0]["epsilon"]
    assert prv == PrvAccountant().epsilon([EVENT.times(4)], delta=1e-5)


def test_show_says_what_a_policy_leaves(folder: Path, capsys) -> None:
    found = shown(capsys, folder / "policy.yaml")
    assert found["delta"] == 1e-6
    first, second = found["accounts"]
    assert (first["limit"], second["limit"]) == (7.0, 7.0)
    assert first["rounds_left"] == second["rounds_left"] - 1 >= 1
    used = first["rounds"] + first["rounds_left"]
    assert RDP.epsilon([EVENT.times(used)], delta=1e-6) <= 7
    assert RDP.epsilon([EVENT.times(used + 1)], delta=1e-6) > 7
    # Another data set in the same ledger is not this policy's.
    Ledger(folder / "ledger.jsonl").charge(
        [
            Charge(
                account=Account(client="0", data_set="other"),
                unit=PrivacyUnit.CLIENT,
                run="three",
                round=1,
                event=EVENT,
            )
        ]
    )
    assert shown(capsys, folder / "policy.yaml")["accounts"][2]["limit"] is None


def test_the_table_has_the_same_figures(folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert _main(["ledger", "show", str(folder / "policy.yaml")]) == 0
    printed = capsys.readouterr().out
    epsilon = RDP.epsilon([EVENT.times(4)], delta=1e-6)
    assert f"{epsilon:.4g}" in printed
    assert "40 × z=1.1 q=0.1" in printed
    assert "by rdp at delta=1e-06" in printed
    assert "Over the 2 runs together" in printed


def test_verify_says_ok_or_the_fault(folder: Path, capsys) -> None:
    path = folder / "ledger.jsonl"
    assert _main(["ledger", "verify", str(folder)]) == 0
    assert capsys.readouterr().out == f"OK: {path} holds 7 entries.\n"
    content = path.read_bytes()
    path.write_bytes(content + b'{"seq":8')
    assert _main(["ledger", "verify", str(folder / "policy.yaml")]) == 0
    assert "8 bytes at the end are of a charge that was cut short" in capsys.readouterr().out
    path.write_bytes(content.replace(b'"count":10', b'"count":11', 1))
    for command in ("verify", "show", "export"):
        assert _main(["ledger", command, str(path)]) == 1
        printed = capsys.readouterr()
        assert f"{path}, line 2 is damaged" in printed.err
        assert printed.out == ""
    path.write_bytes(content[: content.rindex(b'{"seq":7')])
    assert _main(["ledger", "verify", str(path)]) == 1
    assert "missing at its end" in capsys.readouterr().err
    path.unlink()
    assert _main(["ledger", "verify", str(path)]) == 1
    assert "is gone" in capsys.readouterr().err


def test_export_gives_each_entry_and_what_was_spent_after_it(folder: Path, capsys) -> None:
    assert _main(["ledger", "export", str(folder)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["seq"] for row in rows] == list(range(1, 8))
    assert [row["epsilon"] for row in rows if row["client"] == "0"] == [
        RDP.epsilon([EVENT.times(rounds)], delta=1e-5) for rounds in (1, 2, 3, 4)
    ]
    assert _main(["ledger", "export", str(folder), "--format", "csv"]) == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [{k: str(v) for k, v in row.items()} for row in rows] == table


def test_a_figure_that_nothing_proves_is_not_given(folder: Path, capsys) -> None:
    Ledger(folder / "ledger.jsonl").charge([charge("1", "two", 1, OTHER)])
    found = shown(capsys, folder)["accounts"][1]["epsilon"]
    history = [EVENT.times(3), OTHER]
    expected = RDP.epsilon(history, delta=adaptive_delta(history, 1e-5))
    assert found == pytest.approx(expected, rel=1e-12)
    for command in ("show", "export"):
        assert _main(["ledger", command, str(folder), "--accountant", "prv"]) == 2
        assert "client 1 of digits has paid for 2 different ones" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["."], "ledger.jsonl does not exist"),
        (["nowhere.yaml"], "policy=nowhere.yaml cannot be read"),
    ],
)
def test_a_path_that_leads_to_no_ledger_ends_with_2(
    tmp_path: Path, monkeypatch, capsys, arguments, match
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("show", "verify", "export"):
        assert _main(["ledger", command, *arguments]) == 2
        assert match in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--delta", "0"], "--delta=0.0 must lie between 0 and 1"),
        (["--delta", "1"], "--delta=1.0 must lie"),
        (["--accountant", "moments"], "accountant=moments is not known"),
    ],
)
def test_an_option_that_cannot_be_ends_with_2(folder: Path, capsys, options, match) -> None:
    assert _main(["ledger", "show", str(folder), *options]) == 2
    assert match in capsys.readouterr().err
