"""Files are written whole or not at all; what is no JSON to read is told."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from costmodel.files import read_json, write_whole


def test_a_file_is_replaced_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_whole(path, "one")
    path.chmod(0o640)
    write_whole(path, "two")
    assert path.read_text() == "two"
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["plan.json"]


def test_what_was_there_stays_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    write_whole(path, "kept")
    whole = Path.write_text

    def full(self: Path, text: str, encoding: str | None = None) -> int:
        whole(self, text[:1], encoding)
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_whole(path, "lost")
    assert caught.value.filename == str(path)
    assert path.read_text() == "kept"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_link_stays_and_a_pipe_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_whole(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "text"
    read, write = os.pipe()
    write_whole(f"/proc/self/fd/{write}", "through")
    assert os.read(read, 20) == b"through"
    os.close(read)
    os.close(write)


@pytest.mark.parametrize(
    ("text", "told"),
    [("{", "Expecting"), ("[" * 10**5, "nested too deep"), ("9" * 400, "of 400 digits"), (b"\xff\xfe{", "utf-16")],
)
def test_what_is_no_json_is_a_value_error(text: str | bytes, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read_json(text)
    assert read_json('{"a": [1, -2.5, 1e3]}') == {"a": [1, -2.5, 1000.0]}
