"""The report: one page that needs no network, everything escaped, the same bytes twice."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ntkdyn import report
from ntkdyn.errors import ConfigurationError, UnknownName


@pytest.fixture(scope="module")
def written(synthetic: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> report.Report:
    return report.analyze([synthetic.sweep(seeds=2)], tmp_path_factory.mktemp("report"))


class Page(HTMLParser):
    """Tags, links and sources of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "srcset", "action", "data")]


def test_the_page_stands_alone(written: report.Report) -> None:
    text = written.path.read_text(encoding="utf-8")
    page = Page(text)
    folder = written.path.parent
    for link in page.links:
        assert link.startswith("data:image/png;base64,") or (folder / link).is_file(), link[:80]
    assert "script" not in page.tags
    assert "link" not in page.tags
    style = re.findall(r"<style>(.*?)</style>", text, re.S)
    assert "url(" not in style[0]
    assert "@import" not in style[0]


def test_every_study_appears_with_figure_numbers_and_reading(written: report.Report, synthetic: ModuleType) -> None:
    text = written.path.read_text(encoding="utf-8")
    # The studies that belong to another experiment.
    assert {label.split(",")[0] for label in written.unavailable} == {"width-scaling", *synthetic.PROTOCOLS}
    for stem in ("advantage", "controls", "drift-gap", "reference-levels", "kernel-distance-sum10", "cka-first"):
        assert f'id="{stem}"' in text
        for suffix in ("png", "svg", "csv", "json"):
            assert (written.path.parent / f"{stem}.{suffix}").stat().st_size > 50
    assert text.index("late linearization ends higher") < text.index("What was recorded")
    assert "seed" in text
    assert set(written.files) == set(written.path.parent.iterdir())


def test_twice_the_same_bytes(synthetic: ModuleType, tmp_path: Path) -> None:
    only = ["advantage", "kernel-distance", "gates", "drift-gap"]
    first = report.analyze([synthetic.sweep(seeds=2)], tmp_path / "a", only=only)
    again = report.analyze([synthetic.sweep(seeds=2)], tmp_path / "b", only=only)
    assert len(first.files) == 25
    for file in first.files:
        assert file.read_bytes() == (again.path.parent / file.name).read_bytes(), file.name


def test_hostile_names_are_escaped(synthetic: ModuleType, tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    run = synthetic.run(hostile, config={"task": '"><img src=x onerror=alert(1)>', "model": hostile})
    run.manifest["command"] = run.manifest["experiment"] = hostile
    other = synthetic.run("{{ 7 * 7 }}", config={"task": "b", "model": hostile})
    found = report.analyze([run, other], tmp_path, only=["units", "learning-curve"])
    text = found.path.read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert page.tags.count("img") == 2
    assert "&lt;script&gt;" in text
    assert "{{ 7 * 7 }}" in text


def test_a_hostile_task_stays_in_the_folder(synthetic: ModuleType, tmp_path: Path) -> None:
    sweep = synthetic.sweep(seeds=2, gaps={"../../up/<b>": 3.0}, controls=False)
    found = report.analyze([sweep], tmp_path / "in", only=["units"])
    assert {file.parent for file in found.files} == {tmp_path / "in"}
    assert list(tmp_path.iterdir()) == [tmp_path / "in"]


def test_a_study_that_is_not_possible_stops_no_other(synthetic: ModuleType, tmp_path: Path) -> None:
    run = synthetic.run("run")
    for name in [name for name in run.arrays if name.startswith("units")]:
        del run.arrays[name]
    run.arrays["ntk/test/kernel"][2] = 0
    found = report.analyze([run], tmp_path, only=["units", "kernel-distance", "learning-curve"])
    assert "probe units" in found.unavailable["units"]
    assert "zero" in found.unavailable["kernel-distance"]
    assert (tmp_path / "learning-curve.png").exists()
    text = found.path.read_text(encoding="utf-8")
    assert "Not computed" in text
    assert found.unavailable["units"] in text


def test_runs_without_seed_or_configuration(synthetic: ModuleType, tmp_path: Path) -> None:
    first, second = synthetic.run("same"), synthetic.run("same", seed=1)
    for run in (first, second):
        run.seed, run.manifest = None, {}
    found = report.analyze([first, second], tmp_path, only=["units"])
    assert any("same (2)" in sentence for sentence in (tmp_path / "units.csv").read_text().splitlines())
    assert found.sentences


def test_seeds_of_one_setting_share_a_curve_and_settings_do_not(synthetic: ModuleType) -> None:
    runs = {f"{start}-{seed}": synthetic.run(config={"start_epoch": start}) for start in (0, 8) for seed in (0, 1)}
    series: dict[str, Any] = report._series(runs)
    assert sorted(set(series.values())) == ["start_epoch = 0", "start_epoch = 8"]
    alone = {"a": runs["0-0"], "b": runs["0-1"]}
    assert set(report._series(alone).values()) == {""}


def test_wrong_use(synthetic: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="kernel-distance"):
        report.analyze([synthetic.run()], tmp_path / "a", only=["kernel-distanc"])
    with pytest.raises(ConfigurationError, match="1 sweeps and 1 runs"):
        report.analyze([synthetic.run(), synthetic.sweep(seeds=2)], tmp_path / "a")
    with pytest.raises(ConfigurationError, match="0 sweeps and 0 runs"):
        report.analyze([], tmp_path / "a")
    assert not (tmp_path / "a").exists()
