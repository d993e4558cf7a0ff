"""Runs and sweeps in notebooks: what is shown, escaped, and how long it takes."""

from __future__ import annotations

import json
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ntkdyn.probe import Field
from ntkdyn.results import Run, Sweep
from ntkdyn.store.writer import RunWriter

SAMPLES = 6


class Tags(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def record(path: Path, *, steps: int = 4, probe_set: str = "test", manifest: dict[str, Any] | None = None) -> RunWriter:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = RunWriter(path, manifest or {})
    writer.declare(f"ntk/{probe_set}", [Field(name="kernel", dims=("sample", "sample_2"), shape=(SAMPLES, SAMPLES))])
    writer.declare(f"outputs/{probe_set}", [Field(name="accuracy")])
    generator = np.random.default_rng(0)
    for step in range(steps):
        features = generator.standard_normal((SAMPLES, 9))
        kernel = {"kernel": features @ features.T}
        writer.commit(step, None, {f"ntk/{probe_set}": kernel, f"outputs/{probe_set}": {"accuracy": 0.5}})
    return writer


def test_run(tmp_path: Path) -> None:
    record(tmp_path / "dense", manifest={"seed": 3})
    page = Tags(Run.open(tmp_path / "dense")._repr_html_())
    assert "Run dense: status running, seed 3" in page.text
    for text in ("ntk/test", "outputs/test", "0 to 3", "kernel [6 × 6]", "accuracy"):
        assert text in page.text
    (image,) = [facts for tag, facts in page.tags if tag == "img"]
    assert image["alt"] == "kernel drift"
    assert (image["src"] or "").startswith("data:image/png;base64,iVBOR")


def test_everything_is_escaped_and_nothing_is_fetched(tmp_path: Path) -> None:
    evil = '<img src="http://x/y" onerror=alert(1)>&$\\x$'
    probe_set = evil.replace("/", ":")
    writer = record(tmp_path / "run", probe_set=probe_set, manifest={"experiment": evil, "status": "<script>"})
    folder = tmp_path / "sweep" / "trunks" / "0123456789ab"
    for seed in (0, 1):
        record(folder / str(seed), manifest={"config": {evil: evil, "x": seed}, "seed": seed}).close()
    plan = [{"run": f"trunks/0123456789ab/{seed}"} for seed in (0, 1)]
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"experiment": evil, "plan": plan}))
    for shown in (Run.open(writer.path), Sweep.open(tmp_path / "sweep")):
        page = Tags(shown._repr_html_())
        assert {tag for tag, _ in page.tags} <= {"div", "p", "b", "img", "table", "thead", "tbody", "tr", "th", "td"}
        images = [facts for tag, facts in page.tags if tag == "img"]
        assert len(images) == isinstance(shown, Run)
        assert all(set(facts) == {"alt", "width", "src"} for facts in images)
        assert all((facts["src"] or "").startswith("data:image/png;base64,") for facts in images)
        assert not any(facts for tag, facts in page.tags if tag != "img")
        assert evil in page.text


def test_runs_without_curves_and_with_a_damaged_one(tmp_path: Path) -> None:
    empty = Run.open(RunWriter(tmp_path / "empty", {}).path)
    assert "<img" not in empty._repr_html_()
    writer = record(tmp_path / "damaged")
    run = Run.open(writer.path)
    for segment in (writer.path / "segments").iterdir():
        data = bytearray(segment.read_bytes())
        place = len(data) // 2
        data[place:] = bytes(len(data) - place)
        segment.write_bytes(data)
    page = Tags(run._repr_html_())
    assert "no picture: " in page.text
    assert "ntk/test" in page.text


def test_a_long_run_is_shown_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path / "long", steps=100)
    run = Run.open(tmp_path / "long")
    read: list[int] = []
    rows = run._reader.read_rows
    monkeypatch.setattr(run._reader, "read_rows", lambda name, wanted: read.extend(wanted) or rows(name, wanted))
    run._repr_html_()
    assert len(set(read)) == 40
    begin = time.perf_counter()
    run._repr_html_()
    assert time.perf_counter() - begin < 5  # 0.3 s by itself


def test_sweep(tmp_path: Path) -> None:
    names = [f"arms/{settings:012x}/{seed}" for settings in range(5) for seed in range(5)]
    for number, name in enumerate(names):
        folder = tmp_path / "starts" / name
        folder.mkdir(parents=True)
        config = {"width": 8, "start": number // 5}
        entry = {"status": "finished", "config": config, "seed": number % 5, "results": {"accuracy": number / 25}}
        (folder / "run.json").write_text(json.dumps(entry))
    plan = [{"run": name} for name in [*names, "arms/ffffffffffff/0"]]
    (tmp_path / "starts" / "sweep.json").write_text(json.dumps({"plan": plan}))
    sweep = Sweep.open(tmp_path / "starts")
    page = Tags(sweep._repr_html_())
    assert "Sweep starts: 25 of 26 runs finished" in page.text
    assert "in all: kind = arm, width = 8" in page.text
    assert "and 5 more runs; all are in .table" in page.text
    assert [tag for tag, _ in page.tags].count("tr") == 21
    assert [tag for tag, _ in page.tags].count("th") == 4
    assert repr(sweep) == "<Sweep starts: 25 of 26 runs finished>"
    (tmp_path / "starts" / "sweep.json").write_text('{"plan": []}')
    assert "0 of 0 runs finished" in Sweep.open(tmp_path / "starts")._repr_html_()
