"""The interface to the disk: all or nothing, whichever call fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ntkdyn.errors import ConfigurationError, StorageError, UntrustedFile
from ntkdyn.store import files


def test_publish_replaces_and_leaves_no_temporary(tmp_path: Path) -> None:
    target = tmp_path / "a"
    files.publish(target, b"one")
    files.publish(target, b"two")
    assert files.read(target) == b"two"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("function", ["create", "write", "fsync", "replace", "sync_folder"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_publish_fails_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, code: int) -> None:
    target = tmp_path / "a"
    files.publish(target, b"old")

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files, function, fail)
    with pytest.raises(StorageError, match=str(target)) as caught:
        files.publish(target, b"new")
    assert caught.value.errno == code
    assert os.listdir(tmp_path) == ["a"]
    # When only the fsync of the folder fails, the new content is visible already, though not certain to last.
    assert files.read(target) == (b"new" if function == "sync_folder" else b"old")


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "write", lambda descriptor, data, offset: os.pwrite(descriptor, data[:3], offset))
    files.publish(tmp_path / "a", b"0123456789")
    assert files.read(tmp_path / "a") == b"0123456789"


def test_claim_is_exclusive(tmp_path: Path) -> None:
    files.claim(tmp_path / "a", b"first")
    with pytest.raises(FileExistsError):
        files.claim(tmp_path / "a", b"second")
    assert files.read(tmp_path / "a") == b"first"
    assert os.listdir(tmp_path) == ["a"]


def test_claim_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no links here")

    monkeypatch.setattr(files, "link", refuse)
    files.claim(tmp_path / "a", b"first")
    with pytest.raises(FileExistsError):
        files.claim(tmp_path / "a", b"second")
    assert files.read(tmp_path / "a") == b"first"
    assert os.listdir(tmp_path) == ["a"]


def test_read_and_unlink_of_nothing(tmp_path: Path) -> None:
    files.unlink(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        files.read(tmp_path / "nothing")
    with pytest.raises(StorageError, match="cannot read"):
        files.read(tmp_path)


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "a b", "ü", "x" * 101, "a\n"])
def test_names_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="expected 1 to 100"):
        files.check_name(name, "run")


@pytest.mark.parametrize("name", ["a", "A-b_c.9", "_x", "-", "x" * 100])
def test_names_accepted(name: str) -> None:
    assert files.check_name(name, "run") == name


def test_output_file_reads_back_what_a_full_disk_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bytearray()

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        if offset + len(data) > 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.pwrite(descriptor, data, offset)

    monkeypatch.setattr(files, "write", full)
    with files.OutputFile(tmp_path / "a") as file:
        for number, (offset, size) in enumerate([(0, 60), (40, 50), (80, 50), (10, 20), (120, 30), (100, 5)], start=1):
            file.seek(offset)
            assert file.write(bytes([number]) * size) == size
            model.extend(b"\0" * (offset + size - len(model)))
            model[offset : offset + size] = bytes([number]) * size
        for offset, size in [(0, 150), (75, 30), (130, 20)]:
            file.seek(offset)
            assert file.read(size) == model[offset : offset + size]
        assert file.seek(0, os.SEEK_END) == 150
        with pytest.raises(OSError, match="No space left"):
            file.sync()


def test_only_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("fifo", "device"):
        with pytest.raises(UntrustedFile, match=f"{name}: found no regular file"):
            files.read(tmp_path / name)
    with pytest.raises(StorageError, match="directory"):
        files.read(tmp_path)
    (tmp_path / "file").write_bytes(b"content")
    assert files.read(tmp_path / "file", most_bytes=3) == b"con"
