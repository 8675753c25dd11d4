"""One process of a job on many machines: `jaxllm` with a status that tells "stopped" from "finished".

    python launch/worker.py run CONFIG --distributed [any option of jaxllm run]

A scheduler that takes a machine away sends SIGTERM; jaxllm then saves everything and ends with status 0, as it does
when the run is finished. A scheduler would take that for the end. Here the status is then 75 ("try again later"), on
which slurm.sbatch, the JobSet and the SkyPilot task start the same command again.
"""

import sys

from jaxllm.__main__ import main

STOPPED = 75  # EX_TEMPFAIL of sysexits.h

if __name__ == "__main__":
    try:
        main()  # returns only when all stages are finished
    except SystemExit as stop:
        sys.exit(stop.code or STOPPED)
