"""No process of a benchmark outlives it: ``python -m py_reasonalloc.bench.guard COMMAND...``.

A benchmark that is killed outright cannot end the processes that it started, which would go on
decoding for minutes and disturb whoever measures next. On Linux, the kernel ends them (prctl(2),
PR_SET_PDEATHSIG, which survives exec). On other systems they end when they have nothing to do.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Let this process be killed when its parent, process `parent`, ends."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), signal.SIGKILL)


def guarded(command: Sequence[str]) -> list[str]:
    """Return the command line that runs a foreign program so that it ends with this process."""
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-m", __name__, str(os.getpid()), *command]


def main() -> None:
    """Become the command in the arguments; they start with the parent's process number."""
    end_with(int(sys.argv[1]))
    try:
        os.execv(sys.argv[2], sys.argv[2:])
    except OSError as error:
        sys.exit(f"{sys.argv[2]}: cannot be run: {error.strerror}")


if __name__ == "__main__":
    main()
