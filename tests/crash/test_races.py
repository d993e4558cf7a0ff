"""Several processes want one folder: one gets it, the others are told at once who has it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from ntkdyn.errors import LockedRecording, RecordingExists
from ntkdyn.probe import Field
from ntkdyn.store.reader import RunReader
from ntkdyn.store.repair import verify
from ntkdyn.store.writer import RunWriter, refuse_occupied


def together(count: int, path: Path, *, resume: bool) -> list[dict[str, Any]]:
    """What each of some processes met that began at the same moment; the winner keeps the folder until all are done."""
    start, ready = os.pipe()
    results, answers = os.pipe()
    processes = []
    for _ in range(count):
        process = os.fork()
        if process == 0:
            os.close(ready)
            os.read(start, 1)
            answer: dict[str, Any] = {"pid": os.getpid()}
            begin = time.monotonic()
            try:
                writer = RunWriter(path, {}, after=0) if resume else RunWriter(path, {"seed": os.getpid()})
                answer |= {"won": True}
            except LockedRecording as error:
                answer |= {"won": False, "message": str(error)}
            except BaseException as error:
                answer |= {"won": None, "message": f"{type(error).__name__}: {error}"}
            answer["seconds"] = time.monotonic() - begin
            os.write(answers, json.dumps(answer).encode() + b"\n")
            if answer["won"]:
                time.sleep(1.5)
                if not resume:
                    writer.declare("p", [Field(name="x")])
                    writer.commit(0, None, {"p": {"x": 1.0}})
                writer.close(pack=False)
            os._exit(0)
        processes.append(process)
    os.close(start)
    os.close(answers)
    os.close(ready)
    for process in processes:
        os.waitpid(process, 0)
    data = b""
    while part := os.read(results, 65536):
        data += part
    os.close(results)
    return [json.loads(line) for line in data.splitlines()]


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("resume", [False, True])
def test_one_writer_wins_and_the_others_name_it(tmp_path: Path, count: int, resume: bool) -> None:
    if resume:
        first = RunWriter(tmp_path / "run", {})
        first.declare("p", [Field(name="x")])
        first.commit(0, None, {"p": {"x": 1.0}})
        first.close(pack=False)
    answers = together(count, tmp_path / "run", resume=resume)
    assert len(answers) == count
    assert [answer["won"] for answer in answers].count(True) == 1, answers
    (winner,) = [answer for answer in answers if answer["won"]]
    for answer in answers:
        if not answer["won"]:
            assert f"process {winner['pid']} on host" in answer["message"], answers
            assert answer["seconds"] < 1
    assert verify(tmp_path / "run") == []
    assert RunReader.open(tmp_path / "run", trusted=True).steps("p").tolist() == [0]


def test_a_folder_that_another_process_makes_just_now_is_not_occupied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight writers met this once: none there, then there, and its lock not yet."""
    path, is_dir = tmp_path / "run", Path.is_dir

    def asked(self: Path) -> bool:
        answer = is_dir(self)
        if self == path:
            path.mkdir(exist_ok=True)
        return answer

    monkeypatch.setattr(Path, "is_dir", asked)
    refuse_occupied(path)
    writer = RunWriter(path, {})
    monkeypatch.undo()
    with pytest.raises(LockedRecording):
        refuse_occupied(path)
    writer.close(pack=False)
    with pytest.raises(RecordingExists, match=r"holds '(run\.json|segments)' already"):
        refuse_occupied(path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(RecordingExists, match=f"holds '{name}' already"):
            refuse_occupied(tmp_path / name)
