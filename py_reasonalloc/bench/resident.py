"""Resident memory of this process."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def _status(name: str) -> int | None:
    """Return a field of /proc/self/status in bytes; None where there is none."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, flags=re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


def current_bytes() -> int | None:
    """Return the resident memory now; None where the system does not tell (not Linux)."""
    return _status("VmRSS")


def peak_bytes() -> int | None:
    """Return the largest resident memory since the start or the last `reset_peak`."""
    peak = _status("VmHWM")
    if peak is not None or sys.platform == "win32":
        return peak
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak() -> bool:
    """Start the peak anew; False where the system cannot (not Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
