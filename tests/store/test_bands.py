"""Arrays larger than memory: written, merged, packed, checked and read in bands, and what happens when one fails."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from ntkdyn.errors import DamagedRecording, ProbeError, UntrustedFile
from ntkdyn.probe import Bands, Field
from ntkdyn.results import Run
from ntkdyn.store import bands, compact, files, outbox
from ntkdyn.store import verify as verify_module
from ntkdyn.store.pack import pack
from ntkdyn.store.reader import RunReader
from ntkdyn.store.repair import repair, verify
from ntkdyn.store.writer import RunWriter

SIZE = 40
KERNEL = Field(name="kernel", dims=("sample", "sample_2"), shape=(SIZE, SIZE), dtype="f4")


def kernel(step: int) -> np.ndarray[Any, Any]:
    features = np.random.default_rng(step).standard_normal((SIZE, 3))
    return (features @ features.T).astype("f4")


def in_bands(whole: np.ndarray[Any, Any], height: int = 7) -> Bands:
    return Bands(lambda: (whole[start : start + height] for start in range(0, len(whole), height)))


@pytest.fixture(autouse=True)
def _small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "BAND_BYTES", 1000)


def test_bands_are_read_back_bit_for_bit_in_every_state_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact, "FAN", 4)
    writer = RunWriter(tmp_path / "run", {})
    writer.declare("ntk", [KERNEL, Field(name="size", static=True)])
    writer.declare("loss", [Field(name="loss", dims=("n",), shape=(3,))])
    for step in range(11):
        whole = kernel(step)
        # Some at once, so that files hold rows of both kinds side by side; the former as upper triangles.
        value = whole if step in (2, 3) else in_bands(whole)
        assert writer.commit(step, None, {"ntk": {"kernel": value, "size": 5}, "loss": {"loss": np.ones(3)}})
    expected = np.stack([kernel(step) for step in range(11)])

    def check(path: Path) -> None:
        run = Run.open(path)
        assert run["ntk/kernel"].tobytes() == expected.tobytes()
        lazy = run.lazy("ntk/kernel")
        for index in (0, 3, -1):
            assert np.array_equal(lazy[index], expected[index])
            for part in ((5,), (-1, 2), (slice(3, 29, 5),), (slice(None), 4), (slice(30, 2, -3), slice(1, 3)),
                         (slice(4, 4), 1), (slice(4, 4),)):  # fmt: skip
                assert np.array_equal(lazy[(index, *part)], expected[(index, *part)]), part
        assert lazy[0, np.int64(3), np.intp(2)] == expected[0, 3, 2]
        for wrong, error in ((SIZE, IndexError), (slice(None, None, 0), ValueError), (slice("a", None), TypeError)):
            with pytest.raises(error):
                lazy[0, wrong]

    check(tmp_path / "run")
    writer.close(pack=False)
    assert verify(tmp_path / "run") == []
    pack(tmp_path / "run")
    assert verify(tmp_path / "run") == []
    check(tmp_path / "run")


def test_a_flipped_byte_in_a_band_is_noticed(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {})
    writer.declare("ntk", [KERNEL])
    writer.commit(0, None, {"ntk": {"kernel": in_bands(kernel(0))}})
    writer.close(pack=False)
    (segment,) = (tmp_path / "run" / "segments").glob("*.h5")
    content = bytearray(segment.read_bytes())
    content[content.index(kernel(0).tobytes()) + 4 * SIZE * 33] ^= 1
    segment.write_bytes(content)
    reader = RunReader.open(tmp_path / "run", trusted=True)
    with pytest.raises(DamagedRecording, match="damaged at 'ntk/kernel' at step 0: found CRC"):
        reader.read_part("ntk/kernel", 0, 3)
    with pytest.raises(DamagedRecording):
        compact.merge(reader.sources, tmp_path / "merged.h5", level=1)
    assert not (tmp_path / "merged.h5").exists()
    assert [str(one) for one in verify(tmp_path / "run")]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([np.ones((SIZE, SIZE - 1), "f4")], r"a band of shape \[40, 39\] from row 0, expected rows of \[40\] and 40"),
        ([np.ones((SIZE - 1, SIZE), "f4")], "found 39 rows in all bands, expected 40"),
        ([np.ones((SIZE, SIZE), "f4"), np.ones((1, SIZE), "f4")], r"\[1, 40\] from row 40"),
        ([np.ones((SIZE, SIZE), "c8")], "found dtype complex64, expected <f4 as declared"),
    ],
)  # fmt: skip
def test_wrong_bands_leave_nothing_behind(made: list[Any], message: str, tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {})
    writer.declare("ntk", [KERNEL])
    with pytest.raises(ProbeError, match=message):
        writer.commit(0, None, {"ntk": {"kernel": Bands(lambda: made)}})
    # The step is free, and nothing waits.
    assert writer.commit(0, None, {"ntk": {"kernel": in_bands(kernel(0))}})
    writer.close(pack=False)
    assert len(list((tmp_path / "run" / "segments").iterdir())) == 1


def test_a_refusing_disk_costs_the_snapshot_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RunWriter(tmp_path / "run", {})
    writer.declare("ntk", [KERNEL, Field(name="size", static=True)])
    made = []

    def make(step: int) -> Iterator[np.ndarray[Any, Any]]:
        for start in range(0, SIZE, 10):
            made.append((step, start))
            yield kernel(step)[start : start + 10]

    real = files.write
    taken = 0

    def full(descriptor: int, data: Any, offset: int) -> int:
        nonlocal taken
        if taken + len(data) > 2000:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = real(descriptor, data, offset)
        taken += done
        return done

    monkeypatch.setattr(files, "write", full)
    with pytest.warns(RuntimeWarning, match="No space left on device; nothing committed before is lost; free disk"):
        assert not writer.commit(0, None, {"ntk": {"kernel": Bands(lambda: make(0)), "size": 1}})
    # Nothing was made once the disk had refused, and nothing waits in memory.
    assert made == [(0, 0), (0, 10)]
    assert writer._outbox.waiting == []
    monkeypatch.setattr(files, "write", real)
    assert writer.commit(1, None, {"ntk": {"kernel": Bands(lambda: make(1)), "size": 1}})
    with pytest.warns(RuntimeWarning, match="step 0 could not be written; all that was committed before is kept"):
        writer.close()
    reader = RunReader.open(tmp_path / "run")
    assert reader.steps("ntk").tolist() == [1]
    assert np.array_equal(reader.read("ntk/kernel")[0], kernel(1))
    assert not list((tmp_path / "run").rglob(".tmp-*"))


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("behind", ["publish_segment", "merge"])
def test_an_interruption_behind_the_rename_leaves_one_snapshot(
    large: bool, behind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact, "FAN", 2)
    writer = RunWriter(tmp_path / "run", {})
    writer.declare("ntk", [KERNEL])

    def value(step: int) -> Any:
        return in_bands(kernel(step)) if large else kernel(step)

    assert writer.commit(0, None, {"ntk": {"kernel": value(0)}})
    module, name = (outbox, "publish_segment") if behind == "publish_segment" else (compact, "merge")
    real = getattr(module, name)

    def interrupted(*given: Any, **named: Any) -> None:
        if behind == "publish_segment":
            real(*given, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.commit(1, None, {"ntk": {"kernel": value(1)}})
    with pytest.raises(ProbeError, match="step 1 recorded already"):
        writer.commit(1, None, {"ntk": {"kernel": value(5)}})
    assert writer.commit(2, None, {"ntk": {"kernel": value(2)}})
    writer.close(pack=False)
    reader = RunReader.open(tmp_path / "run")
    assert reader.steps("ntk").tolist() == [0, 1, 2]
    assert np.array_equal(reader.read("ntk/kernel"), np.stack([kernel(step) for step in range(3)]))


def test_an_interruption_before_the_rename_leaves_the_step_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = RunWriter(tmp_path / "run", {})
    writer.declare("ntk", [KERNEL])
    whole = kernel(1)
    real, count = files.write, 0

    def interrupted(*given: Any) -> int:
        nonlocal count
        count += 1
        if count == at:
            raise KeyboardInterrupt
        return real(*given)

    for at in range(1, 31):
        count = 0
        with monkeypatch.context() as patch:
            patch.setattr(files, "write", interrupted)
            try:
                writer.commit(at, None, {"ntk": {"kernel": in_bands(whole)}})
            except KeyboardInterrupt:
                assert writer.commit(at, None, {"ntk": {"kernel": in_bands(whole)}})
    assert count < at, "every write was interrupted once"
    writer.close(pack=False)
    reader = RunReader.open(tmp_path / "run")
    assert reader.steps("ntk").tolist() == list(range(1, 31))
    assert (reader.read("ntk/kernel") == whole).all()
    assert not list((tmp_path / "run").rglob(".tmp-*"))


def test_what_waits_after_an_interruption_keeps_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RunWriter(tmp_path / "run", {})
    writer.declare("ntk", [KERNEL])
    whole = kernel(0)

    def interrupted(*given: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(outbox, "publish_segment", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.commit(0, None, {"ntk": {"kernel": whole}})
    whole[:] = 7
    writer.close()
    assert np.array_equal(RunReader.open(tmp_path / "run").read("ntk/kernel")[0], kernel(0))


def test_large_runs_are_kept_in_order_without_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--long"):
        pytest.skip("reads 2.3 GB several times; by --long")
    monkeypatch.undo()
    size = 24_000
    writer = RunWriter(tmp_path / "run", {})
    writer.declare("ntk", [Field(name="kernel", dims=("a", "b"), shape=(size, size))])
    band = np.zeros((1000, size), "f4")
    real = files.write

    def sparse(descriptor: int, data: Any, offset: int) -> int:
        if len(data) < 2**16:
            return real(descriptor, data, offset)
        os.ftruncate(descriptor, max(os.fstat(descriptor).st_size, offset + len(data)))
        return len(data)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", sparse)
        writer.commit(0, None, {"ntk": {"kernel": Bands(lambda: (band for _ in range(size // 1000)))}})
    writer.close(pack=False)
    verify_module._sound.clear()
    with pytest.raises(UntrustedFile, match="declared size"):
        RunReader.open(tmp_path / "run")
    assert verify(tmp_path / "run") == []
    assert repair(tmp_path / "run") == ()
    verify_module._sound.clear()
    writer = RunWriter(tmp_path / "run", {}, after=0)
    assert writer.repaired == ()
    writer.close(pack=False)
    assert (tmp_path / "run" / "segments").exists()
    assert not (tmp_path / "run" / "quarantine").exists()


# Run in a process of its own, whose memory nothing else has raised.
SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from ntkdyn.probe import Bands, Field
from ntkdyn.results import Run
from ntkdyn.store import bands, compact
from ntkdyn.store.pack import pack
from ntkdyn.store.writer import RunWriter

bands.BAND_BYTES, compact.FAN = 4 * 2**20, 2
path, size = Path(sys.argv[1]), 5000

def band(step, start):
    return np.add.outer(np.arange(start, start + 200, dtype="f4"), np.arange(size, dtype="f4")) + step

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

writer = RunWriter(path, {})
writer.declare("ntk", [Field(name="kernel", dims=("sample", "sample_2"), shape=(size, size))])
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
for step in range(2):
    made = Bands(lambda: (band(step, start) for start in range(0, size, 200)))
    assert writer.commit(step, None, {"ntk": {"kernel": made}})
writer.close(pack=False)
assert len(list((path / "segments").iterdir())) == 1
pack(path)
part = Run.open(path).lazy("ntk/kernel")[1, 4000:4003, 7]
assert part.tolist() == [4008.0, 4009.0, 4010.0]
print(status("VmHWM") - before)
"""


def test_memory_stays_that_of_a_few_bands(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", SCRIPT, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # A kernel has 95 MiB, a band 4; compaction, packing, both readings again and a part of one are in it.
    assert int(done.stdout) < 48 * 2**20, f"{int(done.stdout) / 2**20:.0f} MiB"
    with h5py.File(tmp_path / "run" / "run.h5", "r") as file:
        assert file["ntk/kernel"].shape == (2, 5000, 5000)


def test_an_error_of_the_bands_is_none_of_the_disk(tmp_path: Path) -> None:
    def make() -> Iterator[np.ndarray[Any, Any]]:
        yield kernel(0)[:10]
        raise ConnectionError("gone")

    writer = RunWriter(tmp_path / "run", {})
    writer.declare("ntk", [KERNEL])
    with pytest.raises(ProbeError, match="field 'ntk/kernel': ConnectionError: gone"):
        writer.commit(0, None, {"ntk": {"kernel": Bands(make)}})
    writer.close()
