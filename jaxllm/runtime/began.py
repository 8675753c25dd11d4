"""When this process began. It imports nothing heavy: the command line notes the time before anything else."""

import os
import time
from pathlib import Path

# "process id, seconds since 1970": a process that is started by this one inherits the variable, and must not read it.
_NOTE = "JAXLLM_BEGAN"


def note() -> None:
    """Notes the time in the environment, unless this process has done so before it restarted itself."""
    if _noted() is None:
        os.environ[_NOTE] = f"{os.getpid()} {time.time()}"


def process_began() -> float | None:
    """`time.time()` when this process began, None if unknown: imports are part of the wall time.

    The time that was noted, or else that of the operating system, for which a script that ends in `exec` and the program
    that it becomes are one process.
    """
    noted = _noted()
    if noted is not None:
        return noted
    try:
        # Field 22 of proc(5)'s stat, the start in clock ticks since boot. Field 2, the command in parentheses, may
        # hold spaces.
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return None
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


def _noted() -> float | None:
    process, _, seconds = os.environ.get(_NOTE, "").partition(" ")
    return float(seconds) if process == str(os.getpid()) else None
