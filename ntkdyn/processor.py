"""The name of this machine's processor, for recordings and pages."""

from __future__ import annotations

import platform
from pathlib import Path

_INFORMATION = Path("/proc/cpuinfo")  # on Linux alone


def processor_name() -> str:
    """Return the model name of the processor where the system tells, else its architecture."""
    if _INFORMATION.is_file():
        with _INFORMATION.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
