"""What a run directory in a store costs: how long a save stops training, restoring, requests.

    python tests/benchmarks/stores.py [--store gs s3] [--millions 110] [--latency 0.05] [--rounds 3]

A state as of so many million parameters with Adam is saved on a disk and in a store in turns, then restored from the
scratch, and from the store on a machine that has nothing. The store is an emulator behind a proxy that lets every request
wait; both take some of this machine's cores.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import jax

from jaxllm.run import set_cpu_devices
from jaxllm.runtime import digest
from jaxllm.runtime.checkpoint import CheckpointConfig, Checkpoints
from jaxllm.runtime.store import scratch
from jaxllm.runtime.store.working import make_durable, working_copy
from tests import emulators
from tests.faults import stores

CONFIG = CheckpointConfig(keep_last=2)


def state_of(millions: float) -> dict[str, dict[str, jax.Array]]:
    """Parameters and two moments, in leaves of a transformer's sizes."""
    count = max(1, round(millions * 1e6 / 2**20))
    keys = iter(jax.random.split(jax.random.key(0), 3 * count))
    # Random, since Orbax compresses what it writes.
    return {
        part: {str(n): jax.random.normal(next(keys), (1024, 1024)) for n in range(count)}
        for part in ("params", "mu", "nu")
    }


def blocked(saves: Checkpoints, step: int, state: object) -> float:
    began = time.perf_counter()
    saves.save(step, state, {})
    return time.perf_counter() - began


def measure(kind: str, base: Path, millions: float, latency: float, rounds: int) -> None:
    state = state_of(millions)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    digest.digests(state)  # compiled
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    local = Checkpoints(base / "local", CONFIG)
    stops: dict[str, list[float]] = {"local": [], kind: []}
    with contextlib.ExitStack() as stack:
        where = stack.enter_context(stores.place(kind, base / "server", seed=0))
        stack.enter_context(emulators.in_environment(where.emulator))
        where.weather.latency = latency
        url = f"{where.emulator.url}/run"
        folder = base / "scratch"
        with working_copy(url, 60.0, str(folder)) as run:
            saves = Checkpoints(run / "pretrain" / "checkpoints", CONFIG)
            for step in range(1, rounds + 1):
                stops["local"].append(blocked(local, step, state))
                local.wait()
                # While what was saved before is on its way.
                stops[kind].append(blocked(saves, step, state))
                saves.wait()
            make_durable(run)
            before = where.weather.requests.total()
            began = time.perf_counter()
            saves.save_surely(rounds + 1, state, {})
            durable = time.perf_counter() - began
            requests = where.weather.requests.total() - before
            saves.close()
        local.close()
        restored = {}
        for name in ("the scratch", "the store"):
            # What was just written must not be waited for when it is read.
            os.sync()
            began = time.perf_counter()
            with working_copy(url, 60.0, str(folder)) as run:
                saves = Checkpoints(run / "pretrain" / "checkpoints", CONFIG)
                saves.restore_or_init(abstract, dict)
                restored[name] = time.perf_counter() - began
                saves.close()
            shutil.rmtree(scratch.folder_of(url, folder))
    middle = {name: statistics.median(values) for name, values in stops.items()}
    print(
        f"{kind}://, {size / 1e9:.2f} GB of state, {1000 * latency:.0f} ms a request: a save stops training for "
        f"{middle[kind]:.2f} s, on a disk for {middle['local']:.2f} s: {middle[kind] / middle['local']:.2f} times as long"
    )
    print(f"  saved and whole in the store after {durable:.1f} s, {requests} requests")
    ratio = restored["the store"] / restored["the scratch"]
    print(
        f"  restored from the scratch in {restored['the scratch']:.1f} s, from the store in "
        f"{restored['the store']:.1f} s: {ratio:.1f} times as long",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--store", nargs="+", choices=[*emulators.SERVERS], default=[*emulators.SERVERS]
    )
    parser.add_argument("--millions", type=float, default=110)
    parser.add_argument("--latency", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    set_cpu_devices(1)
    for kind in args.store:
        with tempfile.TemporaryDirectory() as base:
            measure(kind, Path(base), args.millions, args.latency, args.rounds)


if __name__ == "__main__":
    main()
