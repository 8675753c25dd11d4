"""Bits flipped in the objects of a checkpoint in a store: each must be found when the checkpoint is fetched.

    python -m tests.faults.bits [--store gs s3] [--processes 1 2] [--flips 100] [--seed N]

A run of so many processes makes the checkpoint. Then, again and again, one bit of one of its objects is flipped, a machine
that has nothing fetches it, and the bit is flipped back.
"""

import argparse
import contextlib
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

from etils import epath

from jaxllm.runtime import checkpoint
from jaxllm.runtime.seal import Damaged, read_seal
from jaxllm.runtime.store import working
from tests import emulators
from tests.faults import stores


def made(where: stores.Place, base: Path, processes: int) -> stores.Store:
    """A run with checkpoints."""
    job = stores.life_in(where, f"of{processes}", base, processes)
    job.stages, job.more = ("tokenizer", "pretrain"), ("--pretrain.num-steps", "8")
    job.devices = 2 // processes
    job.start()
    if not job.wait(600.0) or any(job.clear()):
        raise RuntimeError(job.log()[-3000:])
    return stores.Store(job.url)


def is_found(url: str, step: str, folder: Path) -> bool:
    """Whether a machine that has nothing finds that the checkpoint is damaged."""
    with working.working_copy(url, 6.0, str(folder)) as run:
        step_dir = epath.Path(run) / step
        try:
            checkpoint.check(step_dir, read_seal(step_dir))
        except Damaged:
            return True
        return False


def flip_all(store: stores.Store, base: Path, flips: int, rng: random.Random) -> int:
    """Flips so many bits, one at a time; returns how many were found."""
    sealed = [name for name in store.list() if name.endswith("/seal.json")]
    step = max(sealed, key=lambda name: int(name.split("/")[2])).removesuffix("/seal.json")
    # What a host said of its part is read while the checkpoint is made, and not any more.
    objects = [
        name for name in store.list(step) if not name.removeprefix(step).startswith("/seal.")
    ]
    objects += [f"{step}/seal.json"]
    found = 0
    for _ in range(flips):
        name = rng.choice(sorted(objects))
        whole = store.read(name) or b""
        if not whole:
            continue
        damaged = bytearray(whole)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        store.write(name, bytes(damaged))
        folder = base / "scratch-of-a-new-machine"
        if is_found(store.url, step, folder):
            found += 1
        else:
            print(f"not found: {name}", flush=True)
        store.write(name, whole)
        shutil.rmtree(folder)
    assert not is_found(store.url, step, base / "last")
    shutil.rmtree(base / "last")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--store", nargs="+", choices=[*emulators.SERVERS], default=[*emulators.SERVERS]
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--flips", type=int, default=100, help="for each store and topology")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    rng = random.Random(args.seed)
    missed = 0
    for kind in args.store:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            base = Path(folder)
            where = stack.enter_context(stores.place(kind, base / "server", args.seed))
            stack.enter_context(emulators.in_environment(where.emulator))
            for processes in args.processes:
                store = made(where, base, processes)
                found = flip_all(store, base, args.flips, rng)
                missed += args.flips - found
                print(
                    f"{kind}, {processes} processes: {found} of {args.flips} flipped bits found",
                    flush=True,
                )
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
