"""Many clients of `jaxllm serve` at once, for a while: patient ones, slow readers, cut connections, malformed bodies.

    python -m tests.faults.endpoint --clients 200 --minutes 10

Every response must be the one that the same request got before, whatever else was being answered; no request may fail by
the server's fault; and at the end nothing is left in the engines. The clients are in processes of their own: threads of
one process would wait for each other more than for the server.
"""

import argparse
import collections
import json
import subprocess
import sys
import time
from typing import Any

from jaxllm.runtime import compile_cache
from tests.serve.small_server import Running, running

_PROCESSES = 4


def soak(num_clients: int, minutes: float, seed: int) -> int:
    """Runs the clients; returns the exit code."""
    compile_cache.enable()
    with running(max_waiting=128, slots=32, seconds=600, prepare=True) as server:
        each = -(-num_clients // _PROCESSES)
        processes = []
        for number in range(_PROCESSES):
            options = ["--clients", str(each), "--minutes", str(minutes)]
            first = str(seed * 10_000 + number * each)
            module = [sys.executable, "-m", "tests.faults.endpoint_clients", server.address]
            processes.append(
                subprocess.Popen([*module, *options, "--first", first], stdout=subprocess.PIPE)
            )
        seen = [json.loads(process.communicate()[0]) for process in processes]
        idle_by = time.monotonic() + 30
        while left(server) and time.monotonic() < idle_by:
            time.sleep(0.1)
        counts, faults = added(seen)
        print(json.dumps({**counts, "left": left(server)}))
        print(*faults[:10], sep="\n")
        return 1 if faults or left(server) else 0


def added(seen: list[dict[str, Any]]) -> tuple[collections.Counter[str], list[str]]:
    """What all processes have seen, and where they disagree."""
    counts: collections.Counter[str] = collections.Counter()
    texts: dict[str, Any] = {}
    faults: list[str] = []
    for each in seen:
        counts.update(each["counts"])
        faults += each["faults"]
        for request, found in each["texts"].items():
            counts["another text"] += texts.setdefault(request, found) != found
    counts["different requests"] = len(texts)
    return counts, faults


def left(server: Running) -> int:
    """Requests and blocks in the engines, and responses that the driver counts."""
    engines = [served.engine for served in server.served]
    used = sum(engine.num_unfinished + engine.num_used_blocks for engine in engines)
    return used + server.endpoint.driver.num_open


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    raise SystemExit(soak(args.clients, args.minutes, args.seed))


if __name__ == "__main__":
    main()
