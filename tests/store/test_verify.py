"""Files of strangers: refused before anything in them is followed or unpacked."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from ntkdyn.errors import DamagedRecording, MissingRecording, NtkdynError, ReplacedFile, StorageError, UntrustedFile
from ntkdyn.store import verify
from ntkdyn.store.metadata import dump_json, load_json
from ntkdyn.store.reader import RunReader
from ntkdyn.store.repair import repair
from ntkdyn.store.writer import RunWriter

Forget = Callable[[], None]


def _external_link(file: h5py.File, path: Path) -> None:
    file["ntk/test/extra"] = h5py.ExternalLink("/etc/passwd", "/x")


def _soft_link(file: h5py.File, path: Path) -> None:
    file["ntk/test/extra"] = h5py.SoftLink("/ntk/test/kernel")


def _second_name(file: h5py.File, path: Path) -> None:
    file["ntk/test/extra"] = file["ntk/test/kernel"]


def _cycle(file: h5py.File, path: Path) -> None:
    file["ntk/test/extra"] = file["ntk"]


def _external_storage(file: h5py.File, path: Path) -> None:
    (path / "secret").write_bytes(b"x" * 48)
    file.create_dataset("ntk/test/extra", (6,), "f8", external=[(str(path / "secret"), 0, 48)])


def _virtual(file: h5py.File, path: Path) -> None:
    layout = h5py.VirtualLayout((3,), "f4")
    layout[:] = h5py.VirtualSource("/etc/other.h5", "x", (3,))
    file.create_virtual_dataset("ntk/test/extra", layout)


def _huge(file: h5py.File, path: Path) -> None:
    file.create_dataset("ntk/test/extra", (2**42,), "u1", chunks=(2**20,))


def _bomb(file: h5py.File, path: Path) -> None:
    file.create_dataset("ntk/test/extra", data=np.zeros(2**22, "u1"), compression="gzip", compression_opts=9)


def _filter(file: h5py.File, path: Path) -> None:
    file.create_dataset("ntk/test/extra", data=np.arange(2**10), scaleoffset=True)


def _type(file: h5py.File, path: Path) -> None:
    file.create_dataset("ntk/test/extra", data=np.zeros(3, [("a", "f4")]))


def _undeclared(file: h5py.File, path: Path) -> None:
    file["ntk/test/extra"] = np.arange(3)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_external_link, "a link of type ExternalLink, expected hard links only"),
        (_soft_link, "a link of type SoftLink"),
        (_second_name, "a second name of another object"),
        (_cycle, "a second name of another object"),
        (_external_storage, "storage in another file"),
        (_virtual, "a virtual dataset"),
        (_huge, "declared size of 4398046511104 bytes, expected at most 2147483648; open with max_bytes=4398046511104"),
        (_bomb, r"declared bytes for each stored one, expected at most 200; open with max_ratio=\d+"),
        (_filter, "the filter number 6, expected only fletcher32, gzip, lzf, shuffle"),
        (_type, "elements of type"),
        (_undeclared, "an object that the recording does not declare"),
    ],
)
def test_hostile_file_is_refused(
    packed: Path, tmp_path: Path, as_stranger: Forget, spoil: Callable[[h5py.File, Path], None], message: str
) -> None:
    with h5py.File(packed / "run.h5", "r+") as file:
        spoil(file, tmp_path)
    as_stranger()
    with pytest.raises(UntrustedFile, match=message) as caught:
        RunReader.open(packed)
    # Which of two names of one object is met first depends on the file; all others name the new one.
    assert "'ntk/test" in str(caught.value) or "second name" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert RunReader.open(packed, trusted=True).read("ntk/test/kernel").shape == (3, 6, 6)


def test_hostile_segment_is_refused(live: RunWriter, as_stranger: Forget) -> None:
    name = "seg-0-000000000008-000000000008.h5"
    with h5py.File(live.path / "segments" / name, "r+") as file:
        _external_link(file, live.path)
    as_stranger()
    with pytest.raises(UntrustedFile, match=name):
        RunReader.open(live.path)


@pytest.mark.parametrize(
    "entries",
    [
        {"branch": ["Infinity"]},
        {"branch": "x"},
        {"costs": {"g": ["Infinity", 1, 1]}},
        {"costs": {"g": [1, 2]}},
        {"elapsed": 10**400},
        {"manifest": [1, 2]},
        {"manifest": "x"},
    ],
)
def test_a_strange_description_is_damage(live: RunWriter, as_stranger: Forget, entries: dict[str, Any]) -> None:
    segment = live.path / "segments" / "seg-0-000000000008-000000000008.h5"
    with h5py.File(segment, "r+") as file:
        text = dump_json({**load_json(file.attrs["recording"]), **entries})
        file.attrs["recording"], file.attrs["crc32"] = text, np.uint32(zlib.crc32(text.encode()))
    as_stranger()
    with pytest.raises(DamagedRecording, match=segment.name):
        RunReader.open(live.path)
    with pytest.raises(DamagedRecording, match=segment.name):
        RunReader.open(live.path, trusted=True)
    live._release()
    assert any(segment.name in line and "moved to quarantine" in line for line in repair(live.path))
    assert RunReader.open(live.path).steps("ntk/test").tolist() == [0, 4]


def test_limits_may_be_raised(packed: Path, as_stranger: Forget) -> None:
    as_stranger()
    with pytest.raises(UntrustedFile, match=r"'ntk/test/kernel'.*432 bytes"):
        RunReader.open(packed, max_bytes=431)
    assert RunReader.open(packed, max_bytes=432).steps("ntk/test").tolist() == [0, 4, 8]


def test_each_file_is_checked_once(packed: Path, as_stranger: Forget, monkeypatch: pytest.MonkeyPatch) -> None:
    as_stranger()
    children = []
    real = verify._in_child

    def counted(paths: Any, *limits: Any) -> Any:
        children.append(list(paths))
        return real(paths, *limits)

    monkeypatch.setattr(verify, "_in_child", counted)
    RunReader.open(packed)
    RunReader.open(packed / "run.h5")
    assert len(children) == 1
    # Tighter limits and another content ask for another check.
    with pytest.raises(UntrustedFile):
        RunReader.open(packed, max_bytes=100)
    os.utime(packed / "run.h5", ns=(1, 1))
    RunReader.open(packed)
    assert len(children) == 3


def test_own_files_need_no_child(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_in_child", lambda *_: pytest.fail("a child was started"))
    assert RunReader.open(packed).groups() == ["gates/test", "ntk/test"]


def test_many_files_in_one_child(
    packed: Path, tmp_path: Path, as_stranger: Forget, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"copy{number}.h5" for number in range(20)]
    for path in paths:
        shutil.copy(packed / "run.h5", path)
    (tmp_path / "text.h5").write_text("x")
    os.mkfifo(tmp_path / "pipe.h5")
    as_stranger()
    found = verify.examine([*paths, tmp_path / "text.h5", tmp_path / "pipe.h5", tmp_path / "gone.h5"])
    assert all(found[path] is None for path in paths)
    assert isinstance(found[tmp_path / "text.h5"], DamagedRecording)
    assert isinstance(found[tmp_path / "pipe.h5"], UntrustedFile)
    assert isinstance(found[tmp_path / "gone.h5"], MissingRecording)


@pytest.mark.parametrize(
    ("body", "end"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("import time; time.sleep(60)", "no answer within"),
    ],
)
def test_file_that_ends_the_child_is_blamed(
    packed: Path, tmp_path: Path, as_stranger: Forget, monkeypatch: pytest.MonkeyPatch, body: str, end: str
) -> None:
    script = f"""
import sys; sys.path.append(sys.argv[1])
from ntkdyn.store import verify
real = verify.check_file
def check(path, **limits):
    if path.name == "bad.h5":
        {body}
    return real(path, **limits)
verify.check_file = check
verify.main()
"""
    paths = [tmp_path / name for name in ("a.h5", "bad.h5", "c.h5")]
    for path in paths:
        shutil.copy(packed / "run.h5", path)
    as_stranger()
    monkeypatch.setattr(verify, "_BOOT", script)
    monkeypatch.setattr(verify, "_SECONDS", 3.0)
    found = verify.examine(paths)
    assert found[paths[0]] is None
    assert found[paths[2]] is None
    assert isinstance(found[paths[1]], DamagedRecording)
    assert end in str(found[paths[1]])


def test_files_that_share_a_child_share_no_blame(
    packed: Path, tmp_path: Path, as_stranger: Forget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep of many files may take longer than one child is given; none of them has done anything."""
    script = """
import sys, time; sys.path.append(sys.argv[1])
from ntkdyn.store import verify
real, checked = verify.check_file, []
def check(path, **limits):
    if len(checked) == 2:
        time.sleep(60)
    checked.append(path)
    return real(path, **limits)
verify.check_file = check
verify.main()
"""
    paths = [tmp_path / f"copy{number}.h5" for number in range(5)]
    for path in paths:
        shutil.copy(packed / "run.h5", path)
    as_stranger()
    monkeypatch.setattr(verify, "_BOOT", script)
    monkeypatch.setattr(verify, "_SECONDS", 3.0)
    assert verify.examine(paths) == dict.fromkeys(paths)


def hostile_copy(file: Path, target: Path) -> Path:
    """A copy with an external link, of the same times."""
    shutil.copy(file, target)
    with h5py.File(target, "r+") as content:
        content["ntk/test/extra"] = h5py.ExternalLink("/etc/passwd", "/x")
    status = file.stat()
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    return target


@pytest.fixture
def as_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Inodes of the files that this process gave to HDF5."""
    inodes = []
    real = h5py.File

    def noted(content: Any, *arguments: Any, **settings: Any) -> Any:
        if not isinstance(content, Path):
            inodes.append(os.fstat(content.fileno()).st_ino)
        return real(content, *arguments, **settings)

    monkeypatch.setattr("ntkdyn.store.segment.h5py.File", noted)
    return inodes


@pytest.mark.parametrize("kind", ["hostile", "sound"])
def test_a_swap_between_check_and_opening(
    packed: Path, tmp_path: Path, as_stranger: Forget, monkeypatch: pytest.MonkeyPatch, as_read: list[int], kind: str
) -> None:
    target, other = packed / "run.h5", tmp_path / "other.h5"
    if kind == "hostile":
        hostile_copy(target, other)
    else:
        shutil.copy(target, other)
    inode = other.stat().st_ino
    as_stranger()
    as_read.clear()
    real = verify.validate

    def swapped(paths: Any, **limits: Any) -> None:
        real(paths, **limits)
        if other.exists():
            os.replace(other, target)

    monkeypatch.setattr("ntkdyn.store.reader.validate", swapped)
    # The other file is checked as the first was; before that nothing of it reaches HDF5 in this process.
    if kind == "hostile":
        with pytest.raises(UntrustedFile, match="ExternalLink"):
            RunReader.open(packed)
        assert as_read == []
    else:
        assert RunReader.open(packed).read("ntk/test/kernel").shape == (3, 6, 6)
        assert set(as_read) == {inode}


@pytest.mark.parametrize("how", ["replaced", "in place"])
def test_a_swap_between_opening_and_reading(
    packed: Path, tmp_path: Path, as_stranger: Forget, as_read: list[int], how: str
) -> None:
    target = packed / "run.h5"
    times = target.stat().st_atime_ns, target.stat().st_mtime_ns
    hostile = hostile_copy(target, tmp_path / "hostile.h5")
    as_stranger()
    reader, lazy = RunReader.open(packed), RunReader.open(packed)
    trusted = RunReader.open(packed, trusted=True)
    if how == "replaced":
        os.replace(hostile, target)
    else:
        # Of the same size and time; only the time of the inode tells.
        content = bytearray(hostile.read_bytes())
        size = target.stat().st_size
        target.write_bytes(content[:size].ljust(size, b"\0"))
        os.utime(target, ns=times)
    as_read.clear()
    for read in (lambda: reader.read("ntk/test/kernel"), lambda: lazy.read_row("ntk/test/kernel", 0)):
        with pytest.raises((UntrustedFile, DamagedRecording)) as caught:
            read()
        assert "\n" not in str(caught.value)
    assert as_read == []
    if how == "replaced":
        assert trusted.read("ntk/test/kernel").shape == (3, 6, 6)


def test_a_swap_while_the_child_reads(
    packed: Path, tmp_path: Path, as_stranger: Forget, monkeypatch: pytest.MonkeyPatch, as_read: list[int]
) -> None:
    script = f"""
import sys; sys.path.append(sys.argv[1])
import os, shutil
from pathlib import Path
from ntkdyn.store import verify
real = verify.check_file
def check(path, **limits):
    identity = real(path, **limits)
    shutil.copy2(path, {str(tmp_path / "next.h5")!r})
    os.replace({str(tmp_path / "next.h5")!r}, path)
    return identity
verify.check_file = check
verify.main()
"""
    as_stranger()
    monkeypatch.setattr(verify, "_BOOT", script)
    as_read.clear()
    # Whoever swaps each time gets no file past the check.
    with pytest.raises(ReplacedFile, match=r"run\.h5 was replaced or changed between its check and its") as caught:
        RunReader.open(packed)
    assert "\n" not in str(caught.value)
    assert as_read == []
    assert RunReader.open(packed, trusted=True).read("ntk/test/kernel").shape == (3, 6, 6)


def test_child_that_does_not_start(packed: Path, as_stranger: Forget, monkeypatch: pytest.MonkeyPatch) -> None:
    as_stranger()
    monkeypatch.setattr(verify, "_BOOT", "raise SystemExit('no interpreter today')")
    with pytest.raises(StorageError, match="did not start: no interpreter today"):
        RunReader.open(packed)


def test_child_loads_no_torch() -> None:
    heavy = {"torch", "xarray", "scipy", "matplotlib"}
    code = f"import sys; import ntkdyn.store.verify; print(sorted({heavy!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.strip() == b"[]"


@pytest.mark.parametrize("kind", ["segment", "packed"])
def test_flipped_byte_is_detected_or_harmless(live: RunWriter, tmp_path: Path, as_stranger: Forget, kind: str) -> None:
    if kind == "packed":
        live.close()
        original = live.path / "run.h5"
    else:
        original = live.path / "segments" / "seg-0-000000000004-000000000004.h5"
    alone = RunReader.open(original)
    expected = alone.read_many(alone.names())
    content = original.read_bytes()
    generator = random.Random(1)
    paths = []
    for number in range(100):
        spoiled = bytearray(content)
        spoiled[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        paths.append(tmp_path / f"spoiled{number}.h5")
        paths[-1].write_bytes(spoiled)
    as_stranger()
    detected = 0
    for path, problem in verify.examine(paths).items():
        if problem is not None:
            assert isinstance(problem, NtkdynError)
            assert str(path) in str(problem)
            detected += 1
            continue
        found = RunReader.open(path)
        assert found.declarations == alone.declarations
        for name, array in found.read_many(found.names()).items():
            assert np.array_equal(array, expected[name]), name
        assert set(found.names()) == set(expected)
        assert dict(found.manifest) == dict(alone.manifest)
    assert detected > 20
