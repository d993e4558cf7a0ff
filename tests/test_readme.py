"""The README's promises that can be read without running it; .ci/run runs its two commands themselves."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_begins_with_picture_snippet_and_two_commands() -> None:
    picture = README.index("![")
    snippet = README.index("```python")
    commands = README.index("## Install")
    assert picture < snippet < commands
    assert (ROOT / re.search(r"!\[[^]]*\]\(([^)]+)\)", README)[1]).is_file()
    first = README[snippet:].split("```")[1].removeprefix("python\n").strip()
    assert len(first.splitlines()) <= 8
    section = README.split("## Install", 1)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 2
    assert all(len(block.strip().splitlines()) == 1 for block in blocks)


def test_snippet_works(tmp_path: Path) -> None:
    import torch

    snippet = README.split("```python")[1].split("```")[0].replace("runs/a", str(tmp_path / "a"))
    torch.manual_seed(0)
    x, y = torch.randn(12, 5), torch.arange(12) % 3
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(201):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    names = {"torch": torch, "model": model, "x": x, "y": y, "train": train}
    exec(snippet, names)
    kernel = names["nd"].Run.open(tmp_path / "a")["ntk/test/kernel"]
    assert kernel.shape == (4, 12, 12)  # steps 0, 100, 200 and the last, 201


def test_relative_links_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_constraints_pin_torch_without_local_suffix() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert "torch==2.13.0" in lines
    assert all("+" not in line for line in lines)
