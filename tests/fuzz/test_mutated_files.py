"""Mutated files of every kind: refused in one line, or read with the very values; never wrong ones, never a crash.

A server forks a limited child for each batch of files, so that a file that crashes or hangs HDF5 costs one child. The
check that strangers' files get runs in such a child in real life too: there an end of the child is a refusal. After a
file has passed it, a crash, a hang or another value is a failure.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

KINDS = {"recordings": 1000, "manifests": 500, "locks": 200, "checkpoints": 300, "tensors": 100}


def target_of(harness: Any, kind: str, folder: Path) -> Any:
    match kind:
        case "recordings":
            return harness.recordings(folder)
        case "manifests":
            return harness.manifests()
        case "locks":
            return harness.locks(folder)
        case _:
            return harness.checkpoints(folder)[kind == "tensors"]


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_are_refused_or_right(
    harness: Any, memory: Path, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:  # fmt: skip
    files = KINDS[kind] * (100 if request.config.getoption("--long") else 1)
    target = target_of(harness, kind, tmp_path / "origin")
    target.learn(memory)
    sources = list(target.originals.values())
    text = kind not in ("recordings", "tensors")
    chance = random.Random(harness.SEED)
    counts: dict[str, Counter[str]] = {"checked": Counter(), "read": Counter(), "sealed": Counter()}

    def judge(step: str, function: Any, batch: list[bytes]) -> list[str]:
        verdicts: list[str] = harness.in_child(len(batch), lambda index: function(target, memory, batch[index]))
        counts[step].update(verdict.split(":")[0] for verdict in verdicts)
        allowed = {"checked": ("crash", "hang"), "read": (), "sealed": ("different",)}[step]
        for data, verdict in zip(batch, verdicts, strict=True):
            if verdict not in ("sound", "refused", "same", "unsealed", *allowed):
                wrong.append(f"{step}: {verdict}")
                (tmp_path / f"wrong-{len(wrong)}").write_bytes(data)
        return verdicts

    wrong: list[str] = []
    begin = time.perf_counter()
    for first in range(0, files, harness.BATCH):
        count = min(harness.BATCH, files - first)
        batch = [harness.mutated(chance.choice(sources), sources, chance, text=text) for _ in range(count)]
        verdicts = judge("checked", harness.checked, batch)
        sound = [data for data, verdict in zip(batch, verdicts, strict=True) if verdict == "sound"]
        judge("read", harness.verdict, sound)
        # As somebody would give them who can compute checksums: other values are his right, faults are not.
        judge("sealed", harness.verdict, [sealed for data in sound if (sealed := target.seal(data)) != data])
    checked, read, sealed = counts.values()
    with capsys.disabled():
        print(f"\n{kind}: {files} mutated files in {time.perf_counter() - begin:.0f} s, seed {harness.SEED}:", end=" ")
        print(f"{checked['refused']} refused by their check, {checked['crash'] + checked['hang']} ended it;", end=" ")
        print(f"of {checked['sound']} others {read['refused']} refused, {read['same']} the same,", end=" ")
        print(f"{read['unsealed']} without a checksum; {sealed.total()} sealed again; {len(wrong)} wrong")
    assert wrong == [], tmp_path
    assert checked.total() == files
    assert checked["refused"] + read["refused"] > files / 4 or kind == "locks"
    # Elsewhere every byte counts.
    assert read["same"] > 0 or kind not in ("recordings", "manifests")
