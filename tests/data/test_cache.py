"""A cache that is prepared by several processes, killed, damaged: it ends with the same bytes, in bounded memory."""

import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

from jaxllm.config import InputError
from jaxllm.data import cache, workers
from jaxllm.data.config import DataConfig, Source
from jaxllm.data.loader import load_rows
from tests.conftest import ROOT
from tests.data.test_store import write

PREPARE = """
import sys
from pathlib import Path
from jaxllm.data import readers, store, workers
from jaxllm.data.config import DataConfig, Source
from jaxllm.tokenizers.trained import Tokenizer
readers.PART_BYTES = 20_000
workers.IN_PROCESS = int(sys.argv[4])
data = DataConfig((Source(sys.argv[1]),), held_out_fraction=0.1)
share = (int(sys.argv[5]), 3)
found = store.open_store(data, "document", Tokenizer.load(sys.argv[2]), Path(sys.argv[3]), share)
assert workers.IN_PROCESS == 0 or "jax" not in sys.modules  # what a worker imports; the progress line needs it
print(found["train"][0].key)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tokenizer):
    """(a corpus of 40 units, a tokenizer's directory, a script that prepares)."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = (f"line number {i % 9000} of some text 文字 {i * i % 977}" for i in range(20_000))
    (folder / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    tokenizer.save(folder / "tokenizer")
    (folder / "prepare.py").write_text(PREPARE)
    return folder


def prepare(corpus, to, in_process=1 << 30, number=0):
    args = [
        sys.executable,
        corpus / "prepare.py",
        corpus / "a.txt",
        corpus / "tokenizer",
        to,
        in_process,
        number,
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*map(str, args)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(process):
    out, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    return out


def contents(folder):
    """Every file but the times; nothing else may be left.

    Except an empty folder that a builder was killed in right after making it: whether its builder is alive cannot be
    told for some minutes, so it is removed later.
    """
    files = []
    for path in sorted(folder.rglob("*")):
        just_made = path.name == ".lock" and path.parent.name.startswith(".new~")
        if (
            path.is_file()
            and path.name != ".times"
            and path.parent.name != "files"
            and not just_made
        ):
            files.append(path)
    assert not [p for p in files if ".partial" in str(p) or ".new" in p.name]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def whole(corpus):
    finished(prepare(corpus, corpus / "whole"))
    return contents(corpus / "whole")


@pytest.mark.parametrize("in_process", [1 << 30, 0], ids=["alone", "workers"])
def test_after_a_kill_it_resumes_and_ends_with_the_same_bytes(corpus, whole, tmp_path, in_process):
    process = prepare(corpus, tmp_path, in_process)
    units = lambda: {p: (p / "meta.json").stat().st_ino for p in tmp_path.glob("unit-*")}
    while len(units()) < 5:
        time.sleep(0.005)
        assert process.poll() is None, process.stderr.read()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 10  # workers end with their parent
    while (
        any(cache._is_alive(p) for p in tmp_path.glob(".partial~*")) and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    done = units()
    assert (
        5
        <= len(done)
        < sum(name.startswith("unit-") and name.endswith("meta.json") for name in whole)
    )
    finished(prepare(corpus, tmp_path, in_process))
    assert done.items() <= units().items()
    assert contents(tmp_path) == whole


def test_processes_that_prepare_the_same_cache_do_not_disturb_each_other(corpus, whole, tmp_path):
    processes = [
        prepare(corpus, tmp_path, size, number) for number, size in enumerate((1 << 30, 1 << 30, 0))
    ]
    assert len({finished(p) for p in processes}) == 1
    assert contents(tmp_path) == whole


def test_a_mistake_that_a_worker_finds_and_a_worker_that_dies_are_one_line(
    tmp_path, tokenizer, monkeypatch
):
    monkeypatch.setattr(workers, "IN_PROCESS", 0)
    chats = [{"prompt": "q", "response": "r"}, {"prompt": "q"}]
    data = DataConfig((Source(write(tmp_path / "c.jsonl", chats)),))
    with pytest.raises(InputError, match=r"c.jsonl:2: the conversation must end"):
        load_rows(data, "chat", "train", tokenizer, 32, tmp_path / "cache")
    monkeypatch.setattr(sys, "executable", "/bin/true")
    with pytest.raises(InputError, match="data: a process that tokenizes has ended"):
        load_rows(data, "chat", "train", tokenizer, 32, tmp_path / "cache")


KILLED = """
import itertools, os, signal, sys
from pathlib import Path
from jaxllm.data import cache

def make(partial):
    (partial / "tokens").write_text("x")
    return {"tokens": 1}

signal.alarm(40)  # whoever is taken for alive would be waited for for ten minutes
for count in itertools.count():
    folder = Path(sys.argv[1]) / str(count) / "unit"
    if (child := os.fork()) == 0:
        left = iter(range(count))
        def kill(frame, event, value):
            if event == "line" and next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return kill
        sys.settrace(lambda frame, *_: kill if frame.f_code is cache.build_once.__code__ else None)
        cache.build_once(folder, make)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    meta = cache.get_or_build(folder, make)
    assert meta["tokens"] == 1 and list(meta["files"]) == ["tokens"], meta
    cache.clean(folder.parent)
    assert not list(folder.parent.glob(".partial*"))
    if not status:
        break
print(count)
"""


def test_killed_at_any_line_it_is_not_waited_for(tmp_path):
    args = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(
        args, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done
    assert int(done.stdout) > 15  # lines


def test_what_dead_preparations_left_is_removed_and_what_others_write_is_not(tmp_path):
    """A lock that nobody holds tells on this machine; elsewhere ten minutes without a write do."""
    hosts = {"dead": cache._HOST, "elsewhere": "x", "silent": "x", "alive": cache._HOST}
    paths = {name: tmp_path / f".partial~unit-{name}~{host}~abc" for name, host in hosts.items()}
    for path in paths.values():
        path.mkdir()
        (path / "tokens").write_text("x")
        (path / ".lock").write_text("")
    for name in ("silent", "alive"):
        for path in (*paths[name].iterdir(), paths[name]):
            os.utime(path, (time.time() - 7200,) * 2)
    with open(paths["alive"] / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cache.clean(tmp_path)
        assert [name for name, path in paths.items() if path.exists()] == ["elsewhere", "alive"]
        assert not cache.build_once(
            tmp_path / "unit-alive", lambda to: pytest.fail("somebody else makes it")
        )
    cache.clean(tmp_path)
    assert [name for name, path in paths.items() if path.exists()] == ["elsewhere"]


@pytest.mark.parametrize(
    "where",
    ["unit-*/tokens", "unit-*/keys", "unit-*/meta.json", "document-*/train-0", "rows-*/begins"],
)
@pytest.mark.parametrize("how", ["flipped", "cut"])
def test_a_damaged_file_is_named_and_made_again(tmp_path, tokenizer, capsys, where, how):
    path = write(tmp_path / "a.txt", [f"line {i} of a text" for i in range(300)])
    data = DataConfig((Source(path),), held_out_fraction=0.1)
    rows = lambda: load_rows(data, "document", "train", tokenizer, 32, tmp_path / "cache")[0][0]
    first = [rows().row(i)["tokens"].tolist() for i in range(rows().num_rows)]
    before = contents(tmp_path / "cache")
    (damaged,) = (tmp_path / "cache").glob(where)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 4
    damaged.write_bytes(content if how == "flipped" else content[:-3])
    again = rows()
    assert [again.row(i)["tokens"].tolist() for i in range(again.num_rows)] == first
    assert contents(tmp_path / "cache") == before
    if damaged.name != "meta.json":  # a flipped bit in it may do no harm
        assert f"{damaged.parent.name}/{damaged.name} is damaged" in capsys.readouterr().err


def test_a_large_file_is_checked_again_only_when_its_times_change(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_ALWAYS_READ", 10)
    cache.get_or_build(tmp_path / "x", lambda to: {"n": (to / "big").write_bytes(b"0" * 100)})
    monkeypatch.setattr(cache, "sha256_of", lambda path: pytest.fail("read again"))
    assert cache.open_valid(tmp_path / "x") == {
        "n": 100,
        "files": cache.open_valid(tmp_path / "x")["files"],
    }
    monkeypatch.undo()
    (tmp_path / "x" / "big").write_bytes(b"0" * 50 + b"1" + b"0" * 49)
    assert cache.open_valid(tmp_path / "x") is None


MEMORY = """
import sys
from pathlib import Path
from jaxllm.data import readers, store, units
from jaxllm.data.config import DataConfig, Source
from jaxllm.tokenizers.trained import Tokenizer
readers.PART_BYTES = 200_000
units.RUN = 2048
data = DataConfig((Source(sys.argv[1]),))
found = store.open_store(data, "document", Tokenizer.load(sys.argv[2]), Path(sys.argv[3]))
assert sum(map(len, store.load_texts(data, "train", Path(sys.argv[3])))) > 1e6
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's peak memory")
def test_memory_does_not_grow_with_the_corpus(corpus, tmp_path):
    """Four times the lines (tests/benchmarks/data.py: 100 MB and 1 GB); a set of hashes alone would take 15 MB more."""
    peaks = []
    for count in (30_000, 120_000):
        path = tmp_path / f"{count}.txt"
        path.write_text(
            "\n".join(f"line number {i} of some text and its own {i * i}" for i in range(count))
        )
        args = [
            sys.executable,
            "-c",
            MEMORY,
            path,
            corpus / "tokenizer",
            tmp_path / f"cache-{count}",
        ]
        out = subprocess.run(
            list(map(str, args)), env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
        )
        assert out.returncode == 0, out.stderr.decode()
        peaks.append(int(out.stdout) / 1024)
    assert peaks[1] < peaks[0] + 5, peaks
