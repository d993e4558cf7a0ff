"""The coverage-guided fuzzer without atheris, which would call the same function: it must not rot."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("kind", ["recordings", "manifests"])
def test_its_function_takes_what_is_sound_or_refused(
    guided: Any, harness: Any, memory: Path, tmp_path: Path, kind: str
) -> None:
    assert kind in guided.KINDS
    target = guided.target_of(harness, kind, tmp_path / "originals", memory)
    examine = guided.one_input(harness, target, memory)
    for data in target.originals.values():
        examine(data)
    chance, sources = random.Random(harness.SEED), list(target.originals.values())
    batch = [harness.mutated(chance.choice(sources), sources, chance, text=kind == "manifests") for _ in range(100)]

    def judge(index: int) -> str:
        try:
            examine(batch[index])
        except AssertionError as error:
            return str(error)
        return "taken"

    verdicts = harness.in_child(len(batch), judge)
    assert verdicts.count("taken") >= 95
    assert {*verdicts} <= {"taken", "crash", "hang"}


def test_it_complains_of_other_values(guided: Any, harness: Any, memory: Path, tmp_path: Path) -> None:
    target = guided.target_of(harness, "manifests", tmp_path / "originals", memory)
    (content,) = target.originals.values()
    (tmp_path / "file").write_bytes(content)
    assert guided.tried_again("manifests", tmp_path / "originals", memory, tmp_path / "file") == "refused"
    (tmp_path / "file").write_bytes(harness.encode_manifest({"format": "ntkdyn recording 1", "seed": 5}))
    with pytest.raises(AssertionError, match="different"):
        guided.one_input(harness, target, memory)((tmp_path / "file").read_bytes())
    assert guided.tried_again("manifests", tmp_path / "originals", memory, tmp_path / "file") == "different"
