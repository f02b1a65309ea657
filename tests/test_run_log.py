"""What a launcher takes from a log: all of the ServerApp's word, nothing of a client's."""

from __future__ import annotations

import base64
import io
import tarfile
from pathlib import Path

import pytest

from fl_app import run_log
from fl_app.run_log import RUN_FILES, CollectError, Heard, digest_of, file_lines, outcome_line, pack


def heard(*lines: str) -> Heard:
    listener = Heard()
    for line in lines:
        listener.take(f"{line}\n")
    return listener


def told(archive: bytes, **outcome: str) -> Heard:
    return heard(*file_lines(archive), outcome_line({"digest": digest_of(archive), **outcome}))


def archive_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for member, text in members:
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    return content.getvalue()


def test_the_files_of_a_run_come_as_they_were_and_nothing_else_does(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    for number, name in enumerate((*RUN_FILES, "ledger.jsonl", ".run")):
        (tmp_path / "there" / name).write_bytes(bytes(range(256)) * 1000 * number)
    archive, left_out = pack(tmp_path / "there")
    assert told(archive).unpack(tmp_path / "here") == list(RUN_FILES)
    assert left_out == []
    for name in RUN_FILES:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == sorted(RUN_FILES)


def test_a_model_too_large_for_a_log_is_left_out_by_name(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"0" * 2000)
    archive, left_out = pack(tmp_path, most_bytes=1000)
    assert left_out == ["model.safetensors"]
    (tmp_path / "here").mkdir()
    assert told(archive).unpack(tmp_path / "here") == ["summary.json"]


def test_the_last_outcome_counts_and_a_broken_one_is_a_line_of_the_log() -> None:
    forged = outcome_line({"error": "forged", "kind": "config"})
    listener = heard(forged, "round 1", outcome_line({"run_dir": "outputs/a"}))
    assert listener.outcome == {"run_dir": "outputs/a"}
    assert not listener.take("fl-app-outcome {")
    assert not listener.take(f"client 3 says: {forged}")


def test_files_that_somebody_else_put_into_the_log_are_not_taken(tmp_path: Path) -> None:
    forged = archive_of((tarfile.TarInfo("summary.json"), b"forged"))
    real = archive_of((tarfile.TarInfo("summary.json"), b"real"))
    outcome = outcome_line({"digest": digest_of(real)})
    heard(*file_lines(forged), *file_lines(real), outcome).unpack(tmp_path)
    assert (tmp_path / "summary.json").read_bytes() == b"real"
    listener = heard(*file_lines(forged), outcome)
    with pytest.raises(CollectError, match="did not come whole"):
        listener.unpack(tmp_path)


def test_a_piece_that_is_lost_or_changed_is_noticed(tmp_path: Path) -> None:
    archive = archive_of((tarfile.TarInfo("report.html"), bytes(range(256)) * 4000))
    lines = [*file_lines(archive)]
    outcome = outcome_line({"digest": digest_of(archive), "run_dir": "outputs/a"})
    for kept in (lines[1:], [*lines[:-1], f"{lines[-1][:-4]}AAAA"], []):
        listener = heard(*kept, outcome)
        with pytest.raises(CollectError, match="outputs/a on the server's machine"):
            listener.unpack(tmp_path)


@pytest.mark.parametrize("name", ["../summary.json", "/tmp/summary.json", "a/summary.json", ".run"])
def test_a_path_is_no_file_of_a_run(name: str, tmp_path: Path) -> None:
    with pytest.raises(CollectError, match="no file of a run"):
        told(archive_of((tarfile.TarInfo(name), b"x"))).unpack(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_a_link_or_a_device_is_no_file_of_a_run(kind: bytes, tmp_path: Path) -> None:
    member = tarfile.TarInfo("summary.json")
    member.type, member.linkname = kind, "/etc/passwd"
    with pytest.raises(CollectError, match="no file of a run"):
        told(archive_of((member, b""))).unpack(tmp_path)


def test_what_is_no_archive_is_said(tmp_path: Path) -> None:
    with pytest.raises(CollectError, match="no archive"):
        told(b"rubbish").unpack(tmp_path)


def test_what_unpacks_to_more_than_there_is_room_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = archive_of((tarfile.TarInfo("report.html"), b"\0" * 1_000_000))
    monkeypatch.setattr(run_log, "MOST_BYTES", 100_000)
    with pytest.raises(CollectError, match="more than"):
        told(bomb).unpack(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_flood_of_pieces_takes_a_bounded_memory() -> None:
    listener = Heard(_room=1000)
    for _ in range(10):
        assert listener.take(f"fl-app-files abc {base64.b64encode(b'0' * 300).decode()}")
    assert sum(map(len, listener._pieces["abc"])) <= 1000
