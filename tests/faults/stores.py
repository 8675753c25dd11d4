"""Faults of lives whose run directory is in a store: what `harness` does to them, and what stores and networks do.

    python -m tests.faults.stores --store gs s3 --processes 1 2 --minutes 30 [--seed N] [--faults N]

Processes are killed, the folders they work in (one for each) are wiped or spoiled, requests fail in every way that `proxy` knows, a second
run tries to work in the same directory, and a run is stopped for longer than its lease while another one takes over. In
the end the store, fetched by nobody before, must hold the same bits as a life that nothing happened to.
"""

import argparse
import collections
import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jaxllm.runtime.store import scratch
from jaxllm.runtime.store.objects import Store, in_parallel
from tests import emulators
from tests.faults import harness
from tests.faults.harness import Fault, Life
from tests.faults.proxy import Weather, proxy

LEASE = 6  # seconds


class Place(NamedTuple):
    """A store with a proxy in front of it."""

    emulator: emulators.Emulator
    weather: Weather


@contextlib.contextmanager
def place(kind: str, folder: Path, seed: int) -> Iterator[Place]:
    weather = Weather(seed)
    port = emulators.free_port()
    folder.mkdir(parents=True, exist_ok=True)
    with (
        emulators.SERVERS[kind](folder, f"http://127.0.0.1:{port}") as emulator,
        proxy(emulator.address, weather, port),
    ):
        yield Place(emulator, weather)


def life_in(where: Place, name: str, base: Path, processes: int = 1) -> Life:
    """A life in a store, whose `directory` is the folder that (the first process of) it works in."""
    url = f"{where.emulator.url}/{name}"
    parent = base / f"scratch-{name}"
    parent.mkdir(exist_ok=True)
    return Life(
        scratch.folder_of(url, parent),
        processes,
        url=url,
        environment={**where.emulator.environment, "JAXLLM_SCRATCH": str(parent)},
        cache=str(base / "compiled"),
        more=("--process.lease-seconds", str(LEASE)),
    )


def content(where: Place, life: Life, folder: Path) -> Path:
    """A folder with everything that the store holds of a life."""
    with emulators.in_environment(where.emulator):
        store = Store(life.url)
        in_parallel(lambda name: store.download(name, folder / name), store.list())
    return folder


def has_saved(where: Place, life: Life, stage: str) -> bool:
    """Whether the store holds a checkpoint of a stage that counts."""
    with emulators.in_environment(where.emulator):
        names = Store(life.url).list()
    return any(re.fullmatch(rf"{stage}/checkpoints/\d+/seal.json", name) for name in names)


def faults_of(where: Place) -> dict[str, Fault]:
    """What can happen to a life in this store."""

    def wipe(life: Life, rng: random.Random) -> str:
        """The machine is gone with its disk, or one of several; the next start is on another one."""
        harness.kill_all(life, rng)
        life.clear()
        scratches = scratches_of(life)
        for folder in scratches if rng.random() < 0.5 else scratches[:1]:
            shutil.rmtree(folder)
        return ""

    def kill_in_upload(life: Life, rng: random.Random) -> str:
        """While the store has just been asked for something."""
        where.weather.kinds = ("slow",)
        where.weather.chance = 1.0
        before = where.weather.happened["slow"]
        result = harness._kill_when(
            life, rng, lambda: where.weather.happened["slow"] > before + rng.randrange(8)
        )
        where.weather.chance = 0.0
        return result

    def kill_in_upload_and_wipe(life: Life, rng: random.Random) -> str:
        return kill_in_upload(life, rng) or wipe(life, rng)

    def storm(life: Life, rng: random.Random) -> str:
        """Many requests fail, in every way, for some seconds."""
        where.weather.kinds = tuple(where.weather.happened)
        where.weather.chance = rng.uniform(0.1, 0.4)
        life.wait(rng.uniform(3.0, 8.0))
        where.weather.chance = 0.0
        return ""

    def away(life: Life, rng: random.Random) -> str:
        """The store cannot be reached for a while."""
        where.weather.kinds = ("reset before",)
        where.weather.chance = 1.0
        life.wait(rng.uniform(1.0, 4.0))
        where.weather.chance = 0.0
        return ""

    def flip_object(life: Life, rng: random.Random) -> str:
        """A bit of an array in the store, which the next start has to fetch."""
        harness.kill_all(life, rng)
        life.clear()
        for folder in scratches_of(life):
            shutil.rmtree(folder)
        with emulators.in_environment(where.emulator):
            store = Store(life.url)
            arrays = [
                name
                for name in store.list()
                if "/checkpoints/" in name and not name.endswith("seal.json")
            ]
            done = {name.split("/")[0] for name in store.list() if name.endswith("/result.json")}
            # As in `harness`: of stages that somebody still reads.
            arrays = [name for name in arrays if not (name.startswith("reward/") and "ppo" in done)]
            if arrays:
                name = rng.choice(sorted(arrays))
                data = bytearray(store.read(name) or b"")
                if data:
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                    store.write(name, bytes(data))
        return ""

    def second_run(life: Life, rng: random.Random) -> str:
        """Another machine starts the same run: it is refused, or finds that the first one has ended."""
        del rng
        if not is_running(life) or not life.directory.exists():
            return ""
        other = _elsewhere(life)
        other.start()
        ended = other.wait(60.0)
        refused = "another run works in it" in other.log()
        codes = other.clear()
        both = is_running(life)
        return (
            ""
            if not both or (ended and refused and any(codes))
            else f"the second run was not refused: {other.log()[-500:]}"
        )

    def takeover(life: Life, rng: random.Random) -> str:
        """A run is stopped for longer than its lease; another one works meanwhile; the first one must end by itself."""
        if not is_running(life):
            return ""
        for process in life.alive:
            process.send_signal(signal.SIGSTOP)
        other = _elsewhere(life)
        other.start()
        other.wait(LEASE + rng.uniform(4.0, 15.0))
        took_over = "waiting up to" in other.log() and is_running(other)
        for process in life.alive:
            process.send_signal(signal.SIGCONT)
        ended = life.wait(60.0) if took_over else True
        other.clear()
        shutil.rmtree(other.directory.parent, ignore_errors=True)
        return "" if ended else "the run that lost its lease went on"

    mine = {
        "SIGKILL, disk lost": wipe,
        "SIGKILL in an upload": kill_in_upload,
        "SIGKILL in an upload, disk lost": kill_in_upload_and_wipe,
        "requests fail": storm,
        "store away": away,
        "bit flipped in the store, disk lost": flip_object,
        "second run": second_run,
        "lease lost to another machine": takeover,
    }
    theirs = (
        "SIGKILL",
        "SIGKILL in a save",
        "SIGTERM",
        "SIGSTOP",
        "bit flipped in a checkpoint",
        "checkpoint file deleted",
    )
    return mine | {name: harness.FAULTS[name] for name in theirs}


def scratches_of(life: Life) -> list[Path]:
    """The folders that the processes of a life work in, in an order that depends on nothing but their names."""
    found = life.directory.parent.glob(f"{life.directory.name}*")
    return sorted(path for path in found if path.is_dir())


def is_running(life: Life) -> bool:
    return all(process.poll() is None for process in life.alive)


def _elsewhere(life: Life) -> Life:
    """The same run on another machine."""
    parent = Path(f"{life.directory.parent}-elsewhere")
    parent.mkdir(exist_ok=True)
    return Life(
        scratch.folder_of(life.url, parent),
        life.processes,
        url=life.url,
        environment={**life.environment, "JAXLLM_SCRATCH": str(parent)},
        cache=life.cache,
        more=life.more,
    )


def soak(kinds: list[str], topologies: list[int], minutes: float, seed: int, most: int) -> int:
    """Lives under faults until the time is up; prints the table and returns the number of corrupted results."""
    rng, end = random.Random(seed), time.monotonic() + 60 * minutes
    injected, complaints = collections.Counter(), collections.Counter()
    lives = corrupted = 0
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        base = Path(folder)
        whole = {n: harness.outcome(harness._undisturbed(base, n)) for n in topologies}
        places = [stack.enter_context(place(kind, base / kind, seed)) for kind in kinds]
        pools = [faults_of(where) for where in places]

        def stream(pool: dict[str, Fault]) -> Iterator[tuple[str, Fault]]:
            while True:
                yield from rng.sample(sorted(pool.items()), len(pool))

        streams = {}
        for (number, pool), count in itertools.product(enumerate(pools), topologies):
            streams[number, count] = stream(pool | (harness.ONE_OF_SEVERAL if count > 1 else {}))
        turns = itertools.cycle(streams)
        while time.monotonic() < end and injected.total() < most:
            number, processes = next(turns)
            where = places[number]
            life = life_in(where, f"life{lives}", base, processes)
            try:
                for kind, complaint in harness.live_through(
                    life, streams[number, processes], rng, quiet_after=18
                ):
                    injected[kind] += 1
                    complaints[kind] += bool(complaint)
                    print(
                        f"life {lives}, {kinds[number]} x {processes}: {kind}{f': {complaint}' * bool(complaint)}",
                        flush=True,
                    )
                wrong = harness.differences(
                    whole[processes], harness.outcome(content(where, life, base / f"end{lives}"))
                )
                print(
                    f"life {lives}: {f'CORRUPTED: {wrong[:5]}' if wrong else 'the same bits'}",
                    flush=True,
                )
                corrupted += bool(wrong)
            finally:
                life.clear()
            lives += 1
        weather = collections.Counter()
        for where in places:
            weather.update(where.weather.happened)
    print(
        f"\nseed {seed}, {lives} lives, {injected.total()} faults, {corrupted} corrupted results; requests: {dict(weather)}\n"
    )
    harness.print_table(injected, complaints)
    return corrupted + complaints.total()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--store", nargs="+", choices=[*emulators.SERVERS], default=[*emulators.SERVERS]
    )
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2], help="topologies, taken in turn"
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=10**9, help="stop after so many")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(1 if soak(args.store, args.processes, args.minutes, args.seed, args.faults) else 0)


if __name__ == "__main__":
    main()
