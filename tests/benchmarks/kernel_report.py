"""What the kernel's benchmark found, as Markdown and figures: numbers in, text out."""

from __future__ import annotations

import platform
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def processor() -> str:
    """Model name of the processor, where the system tells, with family and model, because clouds shorten the name."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    fields = dict(reversed([(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines)]))
    if "model name" not in fields:
        return platform.processor() or "unknown"
    wide = "AVX512" if "avx512f" in fields.get("flags", "") else "no AVX512"
    return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']}, {wide})"


def reason(text: str, memory_mb: float) -> str:
    """A tool's error in a few words."""
    asked = re.search(r"(?:allocate|allocating) (\d+) bytes", text)
    if asked or "MemoryError" in text or "bad_alloc" in text or "out of memory" in text.lower():
        size = f", asks for {int(asked[1]) / 1e9:.1f} GB at once" if asked else ""
        return f"> {memory_mb / 1000:.0f} GB{size}"
    return text if len(text) <= 160 else text[:157] + "..."


def errors(found: Path, reference: Path, kinks: Sequence[int]) -> tuple[float, float]:
    """Relative errors |K - R|_F / |R|_F and max|K - R| / max|R| without the samples at a kink, by blocks of rows."""
    kernel, exact = np.load(found, mmap_mode="r"), np.load(reference, mmap_mode="r")
    if kernel.shape != exact.shape:
        return float("nan"), float("nan")
    kept = np.setdiff1d(np.arange(len(exact)), kinks)
    square = norm = largest = size = 0.0
    for rows in np.array_split(kept, max(1, len(kept) // 32)):
        right = np.asarray(exact[rows], dtype=np.float64)[:, kept]
        difference = kernel[rows][:, kept] - right
        square += float((difference**2).sum())
        norm += float((right**2).sum())
        largest = max(largest, float(np.abs(difference).max()))
        size = max(size, float(np.abs(right).max()))
    return (square / norm) ** 0.5, largest / size


def _cpu(tool: dict[str, Any]) -> float:
    return statistics.median(tool["cpu_s"])


def _cell(tool: dict[str, Any]) -> str:
    if tool["failed"]:
        return tool["failed"]
    return f"{_cpu(tool):.3g} ({tool['peak_mb']:.0f})"


def exact(tool: dict[str, Any]) -> bool:
    """Whether a tool's kernel is that of the reference, in float32."""
    return tool["error_frobenius"] is None or tool["error_frobenius"] < 1e-3


def fastest(tools: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest peer that computes the right kernel."""
    peers = [tool for tool in tools if tool["tool"] != "ntkdyn" and not tool["failed"] and exact(tool)]
    return min(peers, key=_cpu, default=None)


def markdown(report: dict[str, Any]) -> str:
    """The table of goals, then every tool on every case."""
    versions: dict[str, str] = {}
    for case in report["cases"]:
        for tool in case["tools"]:
            versions |= tool["versions"]
    lines = [
        f"{report['date']}, {report['processor']}, {report['threads']} thread(s), {report['device']}, float32, "
        f"{report['activation']} networks, 10 outputs; median CPU seconds of {report['rounds']} interleaved rounds "
        f"(peak MB). {', '.join(f'{name} {version}' for name, version in sorted(versions.items()))}.",
        "",
        "| case | ntkdyn | fastest peer | ratio | goal | memory | GFLOP | peak, GFLOP/s | share of it | goal | error |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_goal_row(case) for case in report["cases"]]
    names = [tool["tool"] for tool in report["cases"][0]["tools"]] if report["cases"] else []
    lines += ["", f"| case | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for case in report["cases"]:
        lines.append(f"| {case['case']['title']} | {' | '.join(_cell(tool) for tool in case['tools'])} |")
    rates = list(dict.fromkeys(name for case in report["cases"] for name in case["rates"]))
    if rates:
        lines += ["", "Matrix products of 2048 x 2048, GFLOP/s in the same rounds:", ""]
        lines += [f"| case | {' | '.join(rates)} |", "|---" * (len(rates) + 1) + "|"]
        for case in report["cases"]:
            cells = (f"{case['rates'][name]:.0f}" if name in case["rates"] else "-" for name in rates)
            lines.append(f"| {case['case']['title']} | {' | '.join(cells)} |")
    lines += ["", "Errors against float64, Frobenius / largest entry:", ""]
    lines += [f"| case | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for case in report["cases"]:
        lines.append(f"| {case['case']['title']} | {' | '.join(_error(tool) for tool in case['tools'])} |")
    return "\n".join(lines) + "\n"


def _error(tool: dict[str, Any]) -> str:
    if tool["failed"] or tool["error_frobenius"] is None:
        return "-"
    return f"{tool['error_frobenius']:.0e} / {tool['error_maximum']:.0e}"


def _goal_row(entry: dict[str, Any]) -> str:
    case, tools = entry["case"], entry["tools"]
    ours = next((tool for tool in tools if tool["tool"] == "ntkdyn"), None)
    peer = fastest(tools)
    best = max(entry["rates"].values(), default=None)
    own = _cell(ours) if ours else "-"
    other = f"{peer['tool']} {_cell(peer)}" if peer else "-"
    ratio = memory = work = share = error = "-"
    if ours and not ours["failed"]:
        error = f"{ours['error_frobenius']:.0e}" if ours["error_frobenius"] is not None else "-"
        if not entry["reference"].get("right", True):
            error = f"reference off by {entry['reference']['difference']:.0e}"
        if ours["flops"]:
            work = f"{ours['flops'] / 1e9:.1f}"
            if best is not None:
                share = f"{ours['flops'] / 1e9 / _cpu(ours) / best:.0%}"
        if peer:
            ratio = f"{_cpu(peer) / _cpu(ours):.2f}x"
            memory = "less" if ours["peak_mb"] <= peer["peak_mb"] else "more"
    goal = f"{case['goal']:g}x" if case["goal"] else "-"
    wanted = f"{case['share']:.0%}" if case["share"] else "-"
    peak = "-" if best is None else f"{best:.0f}"
    cells = (case["title"], own, other, ratio, goal, memory, work, peak, share, wanted, error)
    return f"| {' | '.join(cells)} |"


def slope(values: Sequence[float], seconds: Sequence[float | None]) -> float | None:
    """Slope of log seconds against log values by least squares over the upper half of the values, where cost is."""
    points = [(value, second) for value, second in zip(values, seconds, strict=True) if second][-3:]
    if len(points) < 3:
        return None
    horizontal, vertical = np.log(np.array(points)).T
    return float(np.polyfit(horizontal, vertical, 1)[0])


def scaling_table(report: dict[str, Any]) -> str:
    """Markdown: CPU seconds for each value, and the slope over the last three."""
    lines = [f"{report['date']}, {report['processor']}, {report['threads']} thread(s), full kernel of an MLP, CPU s."]
    for axis, found in report["scaling"].items():
        values = " | ".join(str(value) for value in found["values"])
        lines += ["", f"| {axis} | {values} | log-log slope |", "|---" * (len(found["values"]) + 2) + "|"]
        for tool, seconds in found["cpu_s"].items():
            cells = " | ".join("-" if second is None else f"{second:.3g}" for second in seconds)
            steep = slope(found["values"], seconds)
            lines.append(f"| {tool} | {cells} | {'-' if steep is None else f'{steep:.2f}'} |")
    return "\n".join(lines) + "\n"


def draw_scaling(report: dict[str, Any], path: Path) -> None:
    """One panel for each axis, both scales logarithmic, slopes in the legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(report["scaling"]), 3.6), layout="constrained")
    panels = figure.subplots(1, len(report["scaling"]), sharey=True, squeeze=False)[0]
    for ax, (axis, found) in zip(panels, report["scaling"].items(), strict=True):
        for tool, seconds in found["cpu_s"].items():
            steep = slope(found["values"], seconds)
            label = tool if steep is None else f"{tool}, slope {steep:.2f}"
            ax.loglog(found["values"], [np.nan if second is None else second for second in seconds], "o-", label=label)
        ax.set_xticks(found["values"], [str(value) for value in found["values"]])
        ax.minorticks_off()
        ax.set_xlabel(axis)
        ax.legend(fontsize=7)
    panels[0].set_ylabel("CPU seconds, full kernel of an MLP")
    figure.savefig(path, dpi=150)
