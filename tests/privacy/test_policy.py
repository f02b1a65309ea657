"""A policy file is what its owner wrote, or it is refused with the way to mend it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY

from fl_app.privacy import policy as module
from fl_app.privacy.accounting import PrvAccountant, RdpAccountant
from fl_app.privacy.policy import Policy, Terms, fingerprint
from fl_app.privacy.policy_file import read_policy
from fl_app.privacy.release import PublicField
from fl_app.types import ConfigError, Examples, PrivacyUnit

LEAST = {
    "version": "1",
    "data_set": "ward-7",
    "epsilon": "3.0",
    "delta": "1e-5",
    "unit": "record",
    "ledger": "ledger.jsonl",
}


def policy_file(folder: Path, *, leave_out: str = "", **entries: str) -> Path:
    path = folder / "policy.yaml"
    lines = [f"{k}: {v}" for k, v in {**LEAST, **entries}.items() if k != leave_out]
    path.write_text("\n".join(lines))
    path.chmod(0o600)
    return path


def test_the_documented_example_is_a_policy(tmp_path: Path) -> None:
    assert module.__doc__ is not None
    path = tmp_path / "policy.yaml"
    path.write_text(module.__doc__.split("```yaml")[1].split("```")[0])
    path.chmod(0o600)
    assert read_policy(path, data_set="ward-7-ecg", task="ecg") == Policy(
        version=1,
        data_set="ward-7-ecg",
        epsilon=3.0,
        delta=1e-5,
        unit=PrivacyUnit.RECORD,
        ledger=tmp_path / "ledger.jsonl",
        tasks=("ecg",),
        data=tmp_path / "records.csv",
        records=4000,
    )


def test_the_example_in_the_documentation_is_the_one_in_the_code() -> None:
    assert module.__doc__ is not None
    example = module.__doc__.split("```yaml")[1].split("```")[0]
    assert f"```yaml{example}```" in (REPOSITORY / "PRIVACY.md").read_text()


def test_what_is_left_out_has_the_documented_defaults(tmp_path: Path) -> None:
    least = read_policy(policy_file(tmp_path))
    assert (least.accountant, least.tasks, least.least_noise_multiplier) == ("rdp", (), 0.0)
    assert (least.share_budget, least.public, least.records) == (False, frozenset(), None)
    assert least.clock_tolerance_s == 300
    assert least.make_accountant() == RdpAccountant()
    assert least.terms == Terms(
        data_set="ward-7",
        delta=1e-5,
        epsilon=3.0,
        unit=PrivacyUnit.RECORD,
        share_budget=False,
    )


def test_every_entry_is_taken_as_it_is_written(tmp_path: Path) -> None:
    path = policy_file(
        tmp_path,
        epsilon="2",
        delta="2.5e-6",
        unit="client",
        ledger=str(tmp_path / "elsewhere" / "spent.jsonl"),
        accountant="prv",
        least_noise_multiplier="1",
        share_budget="yes",
        public="[num_examples, metrics]",
        records="sha256:" + "0a" * 32,
        clock_tolerance_s="1e3",
    )
    policy = read_policy(path)
    assert (policy.epsilon, policy.delta, policy.unit) == (2.0, 2.5e-6, PrivacyUnit.CLIENT)
    assert policy.ledger == tmp_path / "elsewhere" / "spent.jsonl"
    assert policy.make_accountant() == PrvAccountant()
    assert policy.least_noise_multiplier == 1.0
    assert policy.public == {PublicField.NUM_EXAMPLES, PublicField.METRICS}
    assert policy.share_budget
    assert policy.clock_tolerance_s == 1000


def test_the_ledger_lies_beside_the_policy_wherever_the_command_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy_file(tmp_path)
    (tmp_path / "below").mkdir(mode=0o755)
    monkeypatch.chdir(tmp_path / "below")
    assert read_policy(Path("../policy.yaml")).ledger.resolve() == tmp_path / "ledger.jsonl"


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"version": "2"}, "version=2 is not known here"),
        ({"version": "2", "later": "1"}, "version=2 is not known here"),
        ({"epsilon": "0"}, r"epsilon=0.0 must be > 0 and finite"),
        ({"epsilon": "-1"}, "epsilon=-1.0 must be > 0"),
        ({"epsilon": ".inf"}, "epsilon=inf must be > 0 and finite"),
        ({"epsilon": ".nan"}, "epsilon=nan must be > 0 and finite"),
        ({"epsilon": "null"}, "epsilon=None must be a number"),
        ({"epsilon": "true"}, "epsilon=True must be a number"),
        ({"epsilon": '"3"'}, "epsilon=3 must be a number"),
        ({"epsilon": "[3]"}, r"epsilon=\[3\] must be a number"),
        ({"delta": "0"}, "delta=0.0 must lie between 0 and 1"),
        ({"delta": "1.0"}, "delta=1.0 must lie"),
        ({"delta": ".nan"}, "delta=nan must lie"),
        ({"unit": "none"}, "epsilon=3.0 has no meaning with unit=none"),
        ({"hours": "8-18"}, 'hours=8-18 must be two different times, such as "20:00-06:00"'),
        ({"hours": "08:00-08:00"}, "hours=08:00-08:00 must be two different times"),
        ({"hours": "08:00-24:30"}, "hours=08:00-24:30 must be two different times"),
        ({"consent": "1"}, "consent=1 must be true or false"),
        ({"code": "os"}, "code=os must be a list of names"),
        ({"data": "3"}, "data=3 must be text"),
        ({"unit": "recod"}, "unit=recod is not known; did you mean record.*client, any"),
        ({"accountant": "moments"}, "accountant=moments is not known"),
        ({"tasks": "ecg"}, r"tasks=ecg must be a list of names"),
        ({"tasks": "[1]"}, r"tasks=\[1\] must be a list of names"),
        ({"least_noise_multiplier": "-1"}, "least_noise_multiplier=-1.0 must be >= 0"),
        ({"share_budget": "1"}, "share_budget=1 must be true or false"),
        ({"public": "[loss]"}, "public=loss is not known.*num_examples, label_counts, metrics"),
        ({"public": "[metric]"}, "did you mean metrics"),
        ({"public": "num_examples"}, "must be a list"),
        ({"records": "0"}, "records=0 must be >= 1"),
        ({"records": "1.5"}, "records=1.5 must be a whole number"),
        ({"records": "true"}, "records=True must be a whole number"),
        ({"records": "sha256:abc"}, "records=sha256:abc must be a number, or sha256:"),
        ({"ledger": "5"}, "ledger=5 must be text"),
        ({"data_set": '""'}, "data_set= must be text"),
        ({"clock_tolerance_s": "-1"}, "clock_tolerance_s=-1.0 must be >= 0"),
        ({"epsilom": "9"}, "epsilom is not a key of a policy; did you mean epsilon"),
        ({"colour": "red"}, "colour is not a key of a policy: the keys are version"),
        ({"7": "red"}, "7 is not a key"),
    ],
)
def test_an_entry_that_cannot_be_is_named_with_the_rule(tmp_path: Path, entries, match) -> None:
    path = policy_file(tmp_path, **entries)
    with pytest.raises(ConfigError, match=rf"policy={path}: .*{match}"):
        read_policy(path)


@pytest.mark.parametrize("key", LEAST)
def test_what_must_be_said_is_asked_for(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is missing"):
        read_policy(policy_file(tmp_path, leave_out=key))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"a: [", "is not YAML"),
        (b"epsilon: 1\nepsilon: 100\n", "epsilon stands there more than once"),
        (b"", "holds no keys"),
        (b"[1, 2]", "holds no keys"),
        (b"\xff\xfe", "is not YAML"),
        (b"!!python/object/apply:os.system ['true']", "is not YAML"),
        (b"? [a]\n: 1\n", "is not YAML|is not a key"),
    ],
)
def test_what_is_no_policy_at_all_is_refused(tmp_path: Path, content: bytes, match: str) -> None:
    path = policy_file(tmp_path)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=match):
        read_policy(path)


def test_a_file_that_is_not_there_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read.*name a policy file"):
            read_policy(path)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_policy_that_others_can_write_is_refused_with_the_chmod(
    tmp_path: Path, mode: int
) -> None:
    path = policy_file(tmp_path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=rf"raise the budget: chmod go-w {path}$"):
        read_policy(path)
    path.chmod(0o644)
    read_policy(path)


@pytest.mark.parametrize("above", [0, 1])
def test_a_policy_in_a_folder_that_others_can_write_is_refused(tmp_path: Path, above: int) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    path = policy_file(folder)
    place = [folder, folder.parent][above]
    for mode in (0o775, 0o757):
        place.chmod(mode)
        with pytest.raises(ConfigError, match=rf"chmod go-w {place}$"):
            read_policy(path)
    place.chmod(0o1777)  # as /tmp: others cannot replace what is not theirs
    read_policy(path)


def test_a_link_from_a_folder_that_others_can_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "safe").mkdir(mode=0o755)
    (tmp_path / "open").mkdir()
    path = policy_file(tmp_path / "safe")
    link = tmp_path / "open" / "policy.yaml"
    link.symlink_to(path)
    read_policy(link)
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ConfigError, match="can be written by other users"):
        read_policy(link)


def test_a_policy_for_something_else_is_refused(tmp_path: Path) -> None:
    path = policy_file(tmp_path, tasks="[ecg, eeg]")
    assert read_policy(path, data_set="ward-7", task="eeg").tasks == ("ecg", "eeg")
    with pytest.raises(ConfigError, match="data_set=ward-7 is not ward-8"):
        read_policy(path, data_set="ward-8")
    with pytest.raises(ConfigError, match="tasks=ecg,eeg does not hold digits"):
        read_policy(path, task="digits")
    assert read_policy(policy_file(tmp_path), task="digits").tasks == ()


def test_a_policy_for_other_records_is_refused(tmp_path: Path) -> None:
    train = Examples(inputs=torch.arange(12.0).reshape(4, 3), targets=torch.tensor([0, 1, 0, 1]))
    one_value_off = Examples(inputs=train.inputs.clone(), targets=train.targets)
    one_value_off.inputs[3, 2] += 1e-3
    read_policy(policy_file(tmp_path)).check_records(train)
    by_number = read_policy(policy_file(tmp_path, records="4"))
    by_number.check_records(one_value_off)
    with pytest.raises(ConfigError, match="records=4 in the policy of ward-7.* has 3"):
        by_number.check_records(train.take(torch.tensor([0, 1, 2])))
    by_content = read_policy(policy_file(tmp_path, records=fingerprint(train)))
    by_content.check_records(train)
    for other in (
        one_value_off,
        train.take(torch.tensor([1, 0, 2, 3])),
        Examples(inputs=train.inputs, targets=1 - train.targets),
        Examples(inputs=train.inputs.reshape(4, 1, 3), targets=train.targets),
        Examples(inputs=train.inputs.double(), targets=train.targets),
    ):
        with pytest.raises(ConfigError, match="a budget belongs to its records"):
            by_content.check_records(other)
