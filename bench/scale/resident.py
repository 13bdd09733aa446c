"""The memory of this process, in MiB, as Linux tells it."""

from __future__ import annotations

import os
import re
from pathlib import Path

MIB = 2**20
_PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE / MIB


def peak_mib() -> float:
    """Return the most that was ever resident.

    Not `getrusage`: what that tells begins with the memory of whoever started this process.
    """
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / MIB
