"""Faults, and whether a life survives them: real processes, real signals, real disks; the verdict is bitwise.

One life is `jaxllm run tests/faults/life.yaml`, in one process or in several, started again after every fault until it
is finished. It must then have the same parameters, optimizer states, metrics, samples, rankings and results as a life
that nothing happened to. The table of a long run is in tests/RESULTS.md:

    bash tests/faults/soak.sh --minutes 60
"""

import argparse
import collections
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
CONFIG = "tests/faults/life.yaml"
STAGES = ("tokenizer", "pretrain", "sft", "sample", "rank", "reward", "ppo", "evaluate")
TRAINED = ("pretrain", "sft", "reward", "ppo")
FAKETIME = next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)
PATIENCE = 90.0  # seconds until processes that should end have ended: many times the heartbeat


@dataclasses.dataclass
class Life:
    """A run directory and the processes that work in it."""

    directory: Path
    processes: int = 1
    devices: int = 2
    cache: str = ""  # folder for compiled programs; empty: the environment's
    stages: tuple[str, ...] = STAGES
    command: tuple[str, ...] = ("jaxllm", "run", CONFIG)  # a module and its arguments
    more: tuple[str, ...] = ()  # further arguments
    url: str = ""  # of the run directory, if `directory` is only the folder that stands for it
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    alive: list[subprocess.Popen] = dataclasses.field(default_factory=list)
    clock: str = ""  # libfaketime's offset for the next start

    def start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        many = ["--distributed"] if self.processes > 1 else []
        command = [
            sys.executable,
            "-m",
            *self.command,
            "--run-dir",
            self.url or str(self.directory),
        ]
        command += ["--stages", *self.stages, *self.more]
        for number in range(self.processes):
            env = {**os.environ, "JAX_PLATFORMS": "cpu", **self.environment}
            if self.cache:
                env |= {"JAXLLM_CACHE": self.cache}
            if many:
                env |= {
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                    "JAX_NUM_PROCESSES": str(self.processes),
                }
                env |= {"JAX_PROCESS_ID": str(number)}
            if self.clock:
                env |= {
                    "LD_PRELOAD": str(FAKETIME),
                    "FAKETIME": self.clock,
                    "FAKETIME_DONT_FAKE_MONOTONIC": "1",
                }
            # Anew at each start: what a process that ended long ago wrote says nothing about this one.
            log = open(f"{self.directory}.{number}.log", "wb")  # noqa: SIM115 - the process keeps it
            arguments = [*command, *many, "--cpu-devices", str(self.devices)]
            # What the others make the world may not read: a file tells whether process 0 has written it.
            umask = 0o026 if number else 0o022
            self.alive.append(
                subprocess.Popen(arguments, env=env, cwd=ROOT, stdout=log, stderr=log, umask=umask)
            )
            log.close()

    def wait(self, seconds: float) -> bool:
        """Whether all processes ended by themselves within so many seconds."""
        end = time.monotonic() + seconds
        while any(p.poll() is None for p in self.alive) and time.monotonic() < end:
            time.sleep(0.02)
        return all(p.poll() is not None for p in self.alive)

    def clear(self) -> list[int]:
        """End what is left of the processes; their exit codes."""
        for process in self.alive:
            if process.poll() is None:
                process.kill()
        codes = [process.wait() for process in self.alive]
        self.alive = []
        return codes

    def finished(self) -> bool:
        last = self.stages[-1]
        reported = last != "evaluate" or (self.directory / "report.html").exists()
        return reported and (self.directory / last / "result.json").exists()

    def log(self) -> str:
        return "".join(
            p.read_text(errors="replace")
            for p in self.directory.parent.glob(f"{self.directory.name}.*.log")
        )


# --- what can happen. A fault gets the life, running, and randomness, and returns a complaint or nothing.

Fault = Callable[[Life, random.Random], str]


def kill_all(life: Life, rng: random.Random) -> str:
    del rng
    for process in life.alive:
        process.kill()
    return ""


def kill_one(life: Life, rng: random.Random) -> str:
    rng.choice(life.alive).kill()
    return "" if life.wait(PATIENCE) else "the others did not end"


def terminate(life: Life, rng: random.Random) -> str:
    """SIGTERM to one process: all of them stop with status 0, unless it came before they listened or too late."""
    process = rng.choice(life.alive)
    listening = "training" in life.log() or len(life.alive) == 1
    process.terminate()
    if not life.wait(PATIENCE):
        return "SIGTERM did not end it"
    codes = [p.returncode for p in life.alive]
    return (
        ""
        if not listening or set(codes) <= {0, -signal.SIGTERM}
        else f"exit codes {codes} after SIGTERM"
    )


def interrupt(life: Life, rng: random.Random) -> str:
    rng.choice(life.alive).send_signal(signal.SIGINT)
    return "" if life.wait(PATIENCE) else "SIGINT did not end it"


def freeze(life: Life, rng: random.Random) -> str:
    """SIGSTOP for a while: shorter than the heartbeat, or, of one process of several, longer."""
    process = rng.choice(life.alive)
    process.send_signal(signal.SIGSTOP)
    time.sleep(rng.choice([0.5, 3.0]))
    process.send_signal(signal.SIGCONT)
    return ""


def kill_in_save(life: Life, rng: random.Random) -> str:
    return _kill_when(
        life, rng, lambda: any(life.directory.glob("*/checkpoints/*.orbax-checkpoint-tmp*"))
    )


def kill_before_seal(life: Life, rng: random.Random) -> str:
    steps = lambda: (p for p in life.directory.glob("*/checkpoints/*") if p.name.isdigit())
    return _kill_when(life, rng, lambda: any(not (p / "seal.json").exists() for p in steps()))


def kill_in_preparation(life: Life, rng: random.Random) -> str:
    """While tokenized examples are being written; so that there is something to write, some of them are removed."""
    for folder in [*(life.directory / "cache").glob("*")][: rng.randint(0, 2)]:
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    before = {*life.directory.glob("cache/**/*")}
    return _kill_when(life, rng, lambda: {*life.directory.glob("cache/**/*")} != before)


def kill_in_rollout(life: Life, rng: random.Random) -> str:
    """Between two updates of PPO, or two batches of samples: most of that time is a rollout."""
    size = lambda: sum(p.stat().st_size for p in life.directory.glob("[ps]*/[rs]*.jsonl"))
    before = size()
    return _kill_when(life, rng, lambda: size() > before, after=rng.uniform(0, 0.2))


def _kill_when(life: Life, rng: random.Random, seen: Callable[[], bool], after: float = 0.0) -> str:
    end = time.monotonic() + rng.uniform(4.0, 12.0)
    while time.monotonic() < end and any(p.poll() is None for p in life.alive):
        try:
            if seen():
                break
        except FileNotFoundError:  # it moves while we look
            continue
        time.sleep(0.001)
    time.sleep(after)
    return kill_all(life, rng)


def fill_disk(life: Life, rng: random.Random) -> str:
    ballast = life.directory.parent / "ballast"
    if not os.path.ismount(ballast.parent):  # only a small disk of the harness's own
        return "not on a disk of its own"
    try:
        with ballast.open("wb") as file:
            while True:
                file.write(b"x" * (1 << 20))
                file.flush()
    except OSError:
        pass
    time.sleep(rng.uniform(0.2, 4.0))
    ballast.unlink()
    return ""


def read_only(life: Life, rng: random.Random) -> str:
    disk = life.directory.parent
    if not os.path.ismount(disk):
        return "not on a disk of its own"
    flags = lambda how: (
        subprocess.run(["mount", "-o", f"remount,{how}", disk], capture_output=True).returncode
    )
    deadline = time.monotonic() + 5.0
    while flags("ro") and time.monotonic() < deadline:  # busy while a file is open for writing
        time.sleep(0.05)
    time.sleep(rng.uniform(0.2, 3.0))
    flags("rw")
    return ""


def _spoil(life: Life, rng: random.Random, files: list[Path], how: str) -> str:
    kill_all(life, rng)
    life.clear()
    if files and (file := rng.choice(sorted(files))).exists():
        data = bytearray(file.read_bytes())
        if how == "delete":
            file.unlink()
        elif how == "truncate":
            file.write_bytes(data[: rng.randrange(len(data) + 1)])
        elif data:
            at = rng.randrange(8 * len(data))
            data[at // 8] ^= 1 << (at % 8)
            file.write_bytes(data)
    return ""


def _checkpoint_files(life: Life) -> list[Path]:
    """Of the stages that somebody still reads."""
    done = lambda stage: (life.directory / stage / "result.json").exists()
    stages = [s for s in TRAINED if not (s == "reward" and done("ppo"))]
    return [
        p for s in stages for p in (life.directory / s / "checkpoints").rglob("*") if p.is_file()
    ]


def flip_checkpoint(life: Life, rng: random.Random) -> str:
    return _spoil(life, rng, _checkpoint_files(life), "flip")


def truncate_checkpoint(life: Life, rng: random.Random) -> str:
    return _spoil(life, rng, _checkpoint_files(life), "truncate")


def delete_checkpoint_file(life: Life, rng: random.Random) -> str:
    return _spoil(life, rng, _checkpoint_files(life), "delete")


def flip_data_shard(life: Life, rng: random.Random) -> str:
    return _spoil(
        life, rng, [p for p in (life.directory / "cache").rglob("*") if p.is_file()], "flip"
    )


def jump_clock(life: Life, rng: random.Random) -> str:
    """The next start believes in another time, days away."""
    kill_all(life, rng)
    life.clock = f"{rng.choice('+-')}{rng.randint(1, 400)}d"
    return ""


FAULTS: dict[str, Fault] = {
    "SIGKILL": kill_all,
    "SIGKILL in a save": kill_in_save,
    "SIGKILL before the seal": kill_before_seal,
    "SIGKILL in data preparation": kill_in_preparation,
    "SIGKILL in a rollout": kill_in_rollout,
    "SIGTERM": terminate,
    "SIGINT": interrupt,
    "SIGSTOP": freeze,
    "disk full": fill_disk,
    "read-only directory": read_only,
    "bit flipped in a checkpoint": flip_checkpoint,
    "checkpoint file truncated": truncate_checkpoint,
    "checkpoint file deleted": delete_checkpoint_file,
    "bit flipped in a data shard": flip_data_shard,
    **({"clock jump": jump_clock} if FAKETIME else {}),
}
ONE_OF_SEVERAL: dict[str, Fault] = {"SIGKILL of one process": kill_one}


def live_through(
    life: Life, faults: Iterator[tuple[str, Fault]], rng: random.Random, quiet_after: int
):
    """Start the life again after each fault until it is finished; yields (kind, complaint) of each.

    quiet_after: so many starts, then nothing more happens to it.
    """
    for starts in range(quiet_after + 20):
        life.start()
        if starts >= quiet_after:
            ended = life.wait(600.0)
            codes = life.clear()
            if ended and not any(codes) and life.finished():
                return
            if starts > quiet_after + 3:
                raise RuntimeError(
                    f"the life does not end: exit codes {codes}\n{life.log()[-3000:]}"
                )
            continue
        if life.wait(rng.uniform(0.3, 14.0)) and life.finished():
            life.clear()
            return
        life.clock, (kind, fault) = "", next(faults)
        complaint = fault(life, rng)
        if life.alive and kind in ("SIGSTOP", "disk full", "read-only directory"):
            life.wait(rng.uniform(0.0, 6.0))  # it may go on by itself
        life.clear()
        yield kind, complaint
    raise RuntimeError(f"the life never ended\n{life.log()[-3000:]}")


# --- the verdict


def outcome(directory: Path, stages: Sequence[str] = STAGES) -> dict[str, object]:
    """Everything that must not depend on what happened: a value for each thing that is compared."""
    found: dict[str, object] = {}
    for stage in (s for s in TRAINED if s in stages):
        steps = sorted(
            int(p.name) for p in (directory / stage / "checkpoints").iterdir() if p.name.isdigit()
        )
        seal = json.loads(
            (directory / stage / "checkpoints" / str(steps[-1]) / "seal.json").read_text()
        )
        found |= {f"{stage} {name}": words for name, words in seal["digests"].items()}
        found[f"{stage} step"] = steps[-1]
        found[f"{stage} metrics"] = [
            _without_times(line) for line in _lines(directory / stage / "metrics.jsonl")
        ]
    for stage, file in (
        ("sample", "samples.jsonl"),
        ("rank", "rankings.jsonl"),
        ("ppo", "rollouts.jsonl"),
    ):
        if stage in stages:
            found[file] = [_without_times(line) for line in _lines(directory / stage / file)]
    for stage in stages:
        found[f"{stage} result"] = _without_times(
            json.loads((directory / stage / "result.json").read_text())
        )
    found["tokenizer"] = (directory / "tokenizer" / "tokenizer" / "tokenizer.model").read_bytes()
    return found


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _without_times(line: dict) -> dict:
    own = ("time", "source", "wall_seconds", "peak_memory_bytes", "tokens_per_second", "mfu")
    return {k: v for k, v in line.items() if k not in own and not k.startswith("throughput")}


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


# --- the soak


def kinds(processes: int, rng: random.Random) -> Iterator[tuple[str, Fault]]:
    """All kinds in a random order, again and again."""
    pool = {**FAULTS, **(ONE_OF_SEVERAL if processes > 1 else {})}
    while True:
        yield from rng.sample(sorted(pool.items()), len(pool))


def lost_steps(directory: Path) -> int:
    """Training steps done more than once, from the goodput ledger."""
    reached, lost = collections.Counter(), 0
    for line in _lines_whole(directory / "goodput.jsonl"):
        if "restored" in line:
            lost += max(0, reached[line["stage"]] - line["restored"])
            reached[line["stage"]] = line["restored"]
        reached[line["stage"]] = max(reached[line["stage"]], line["step"])
    return lost


def _lines_whole(path: Path) -> Iterator[dict]:
    for text in path.read_text().split("\n"):
        try:
            yield json.loads(text)
        except ValueError:
            continue


def soak(minutes: float, seed: int, topologies: list[int], most: int) -> int:
    """Lives under faults until the time is up; prints the table and returns the number of corrupted results."""
    rng, end = random.Random(seed), time.monotonic() + 60 * minutes
    injected, complaints = collections.Counter(), collections.Counter()
    lives = corrupted = lost = 0
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        whole = {n: outcome(_undisturbed(base, n)) for n in topologies}
        streams = {n: kinds(n, rng) for n in topologies}
        while time.monotonic() < end and injected.total() < most:
            processes = topologies[lives % len(topologies)]
            disk = base / f"disk{lives}"
            disk.mkdir()
            mounted = not subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", disk]
            ).returncode
            life = Life(disk / "life", processes, cache=str(base / "compiled"))
            try:
                for kind, complaint in live_through(life, streams[processes], rng, quiet_after=18):
                    injected[kind] += 1
                    if complaint:
                        print(life.log()[-3000:], flush=True)
                    complaints[kind] += bool(complaint)
                    print(
                        f"life {lives}, {processes} process(es): {kind}{f': {complaint}' * bool(complaint)}",
                        flush=True,
                    )
                wrong = differences(whole[processes], outcome(life.directory))
                lost += lost_steps(life.directory)
                print(
                    f"life {lives}: {f'CORRUPTED: {wrong[:5]}' if wrong else 'the same bits'}",
                    flush=True,
                )
                corrupted += bool(wrong)
            finally:
                life.clear()
                if mounted:
                    subprocess.run(["umount", "-l", disk])
            lives += 1
    print(
        f"\nseed {seed}, {lives} lives, {injected.total()} faults, {lost} steps done again, {corrupted} corrupted results\n"
    )
    print_table(injected, complaints)
    return corrupted + complaints.total()


def print_table(injected: collections.Counter, complaints: collections.Counter) -> None:
    """How often each fault was injected, and how often the life did what it should."""
    print("| fault | injected | survived |\n|---|---|---|")
    for kind, count in sorted(injected.items()):
        print(f"| {kind} | {count} | {count - complaints[kind]} |")


def _undisturbed(base: Path, processes: int) -> Path:
    life = Life(base / f"whole{processes}", processes, cache=str(base / "compiled"))
    life.start()
    if not life.wait(900.0) or any(life.clear()) or not life.finished():
        raise RuntimeError(f"the undisturbed life failed\n{life.log()[-3000:]}")
    return life.directory


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2], help="topologies, taken in turn"
    )
    parser.add_argument("--faults", type=int, default=10**9, help="stop after so many")
    args = parser.parse_args()
    sys.exit(1 if soak(args.minutes, args.seed, args.processes, args.faults) else 0)


if __name__ == "__main__":
    main()
