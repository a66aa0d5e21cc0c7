"""Start a program that ends with whoever started it: `python -m common.tether PARENT-PID PROGRAM ARGUMENTS`.

A supervisor that is killed cannot stop what it has started; left alone, a second set would be started beside
it. On Linux the kernel sends TERM to this process when its parent dies (prctl(2), PR_SET_PDEATHSIG), and
keeps doing so after it has become the program. Elsewhere the program is just started.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            sys.exit(0)  # it died before we could ask
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
