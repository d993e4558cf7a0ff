"""Every point at which recording, compaction, packing, resumption or repair can be cut off; kill and power loss."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ntkdyn.errors import MissingRecording, NtkdynError
from ntkdyn.probe import Bands, Field
from ntkdyn.store import bands, compact, files, repair, verify
from ntkdyn.store.pack import pack
from ntkdyn.store.reader import RunReader
from ntkdyn.store.writer import RunWriter

SEED = 20261125
BRANCH_OFFSET = 1000
# Without --long every 29th point is taken.
_STRIDE = 29


def kernel(step: int, branch: int) -> np.ndarray[Any, Any]:
    features = np.random.default_rng(step + BRANCH_OFFSET * branch).standard_normal((6, 3))
    return (features @ features.T).astype("f4")


class Story:
    """What is done to a run, and which snapshots had been committed before which operation."""

    def __init__(self, root: Path, disk: ModuleType) -> None:
        self.disk = disk.Disk(root)
        self.lay_out = disk.lay_out
        self.run = root / "run"
        self.in_bands = False
        # (number of operations before, step -> branch whose numbers are there)
        self.marks: list[tuple[int, dict[int, int]]] = [(0, {})]

    def committed(self, point: int) -> Mapping[int, int]:
        return next(steps for before, steps in reversed(self.marks) if before <= point)

    def possible(self, point: int) -> list[Mapping[int, int]]:
        """What may be visible at a point: as committed, or as after the operation that is under way."""
        later = next((steps for before, steps in self.marks if before > point), self.marks[-1][1])
        return [self.committed(point), later]

    def begin(self) -> RunWriter:
        writer = RunWriter(self.run, {"config": {"width": 3}})
        self.declare(writer)
        return writer

    @staticmethod
    def declare(writer: RunWriter) -> None:
        writer.declare(
            "ntk", [Field(name="kernel", dims=("sample", "sample_2"), shape=(6, 6)), Field(name="size", static=True)]
        )

    def record(self, writer: RunWriter, steps: range, branch: int = 0) -> None:
        for step in steps:
            whole = kernel(step, branch)
            values = Bands(lambda whole=whole: (whole[:4], whole[4:])) if self.in_bands else whole
            assert writer.commit(step, None, {"ntk": {"kernel": values, "size": 6}})
            self.marks.append((len(self.disk.journal), {**self.marks[-1][1], step: branch}))

    def resume(self, step: int) -> RunWriter:
        before = len(self.disk.journal)
        writer = RunWriter(self.run, {"config": {"width": 3}}, after=step)
        left = {one: branch for one, branch in self.marks[-1][1].items() if one <= step}
        # From somewhere in between on, later steps are superseded: both are right until resume returns.
        self.marks += [(before, left), (len(self.disk.journal), left)]
        self.declare(writer)
        return writer


def recording(story: Story) -> None:
    """Recording with compaction in two levels, and packing at the end."""
    writer = story.begin()
    story.record(writer, range(11))
    writer.close(results={"accuracy": 0.5})


def resumption(story: Story) -> None:
    """A run that is continued twice, packed, and continued again."""
    writer = story.begin()
    story.record(writer, range(5))
    writer.close(pack=False)
    writer = story.resume(2)
    story.record(writer, range(3, 7), 1)
    writer.close()
    writer = story.resume(4)
    story.record(writer, range(5, 7), 2)
    writer.close()


def repairing(story: Story) -> None:
    """Repair of a run with leftovers of every kind, then packing by command."""
    writer = story.begin()
    real = files.unlink
    files.unlink = lambda path: None
    try:
        story.record(writer, range(5))
    finally:
        files.unlink = real
    writer.close(pack=False, status="running")
    for place in (story.run, story.run / "segments"):
        with files.open_temporary(place / "x") as (_, descriptor):
            files.write(descriptor, b"half", 0)
    repair.repair(story.run)
    pack(story.run)


def large(story: Story) -> None:
    """Snapshots that are written in bands, merged, continued and packed in bands."""
    story.in_bands = True
    writer = story.begin()
    story.record(writer, range(4))
    writer.close(pack=False)
    writer = story.resume(2)
    story.record(writer, range(3, 5), 1)
    writer.close()


def examined_here(paths: Any, *, max_bytes: int = 2**31, max_ratio: float = 200.0) -> dict[Path, NtkdynError | None]:
    """As ``verify.examine``, without a process of its own for each of thousands of states."""
    found: dict[Path, NtkdynError | None] = {}
    for path in paths:
        try:
            verify._sound[verify.check_file(path, max_bytes=max_bytes, max_ratio=max_ratio)] = (0.0, 0.0)
            found[path] = None
        except NtkdynError as error:
            found[path] = error
    return found


def visible(run: Path) -> dict[int, int]:
    """Step -> branch whose numbers are there; every array is read, and its numbers compared."""
    reader = RunReader.open(run, trusted=True)
    if "ntk" not in reader.groups():
        return {}
    steps = reader.steps("ntk").tolist()
    found = {}
    for step, values in zip(steps, reader.read("ntk/kernel"), strict=True):
        (found[step],) = [branch for branch in range(3) if np.array_equal(values, kernel(step, branch))]
    if found:
        assert reader.read("ntk/size") == 6
    return found


def check(story: Story, point: int, state: dict[str, bytes | None], folder: Path, *, go_on: bool) -> None:
    story.lay_out(state, folder)
    run = folder / "run"
    committed, possible = story.committed(point), story.possible(point)
    if not (run / "run.json").exists():
        assert not committed
        return
    found = visible(run)
    assert (
        all(found.get(step) == branch for step, branch in possible[0].items())
        or found == possible[1]
        or all(found.get(step) == branch for step, branch in possible[1].items())
    ), (found, possible)
    try:
        repair.repair(run)
    except MissingRecording:
        assert not committed
        return
    assert visible(run) == found
    assert repair.repair(run) == ()
    assert not repair.temporaries(run)
    assert repair.verify(run) == []
    assert not (run / "quarantine").exists(), "a published file was not readable"
    if go_on:
        last = max(found, default=-1)
        writer = RunWriter(run, {"config": {"width": 3}}, after=last)
        story.declare(writer)
        assert writer.commit(last + 1, None, {"ntk": {"kernel": kernel(last + 1, 0), "size": 6}})
        writer.close()
        assert visible(run) == {**found, last + 1: 0}


@pytest.mark.parametrize("tell", [recording, resumption, repairing, large])
def test_nothing_committed_is_lost_at_any_point(
    tell: Callable[[Story], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str], module_of: Callable[[str], ModuleType],
) -> None:  # fmt: skip
    monkeypatch.setattr(compact, "FAN", 3)
    monkeypatch.setattr(bands, "BAND_BYTES", 64)
    for module in (repair, verify):
        monkeypatch.setattr(module, "examine", examined_here)
    story = Story(tmp_path, module_of("crash/disk"))
    with monkeypatch.context() as patch:
        story.disk.record(patch)
        tell(story)
    total = len(story.disk.journal)
    everything = request.config.getoption("--long")
    points = range(total + 1) if everything else range(SEED % _STRIDE, total + 1, _STRIDE)
    # In memory where the system has such a folder: nothing here is about speed of the disk.
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    states = 0
    for point in points:
        for number, (name, state) in enumerate(story.disk.states(point, SEED, random_ones=8 if everything else 1)):
            states += 1
            folder = Path(tempfile.mkdtemp(dir=memory))
            try:
                check(story, point, state, folder, go_on=(point + number) % 5 == 0)
            except BaseException as error:
                error.add_note(f"point {point} of {total}, before {story.disk.journal[point : point + 1]}, {name}")
                raise
            finally:
                shutil.rmtree(folder)
    with capsys.disabled():
        print(f"\ncrash points of {tell.__name__}: {len(points)} of {total + 1}, {states} states, 0 snapshots lost")
