"""Hosts that share a run directory in a store and no disk. Each is a thread here; processes are in tests/faults."""

import hashlib
import json
import random
import shutil
import threading

import pytest

from jaxllm.config import Ending
from jaxllm.runtime import processes
from jaxllm.runtime.seal import parse_seal, seal_text
from jaxllm.runtime.store import hosts, mirror, retry
from jaxllm.runtime.store.hosts import Host, SharedMirror
from jaxllm.runtime.store.lease import Lease
from jaxllm.runtime.store.objects import Store
from tests.runtime.test_store import content_of, killed, stored, write

STEP = "pretrain/checkpoints/{}"

pytestmark = pytest.mark.usefixtures("short_pauses")


class Died(BaseException):
    """Ends a host between two requests, and with it the job."""


class Team:
    """The hosts of a job; `run` calls a function on all of them at once."""

    def __init__(self, count, monkeypatch):
        self.count = count
        self.here = threading.local()
        self.barrier = threading.Barrier(count)
        self.values = [None] * count
        for module in (processes, hosts):
            monkeypatch.setattr(module, "gather_json", self.gather)

    def gather(self, value):
        self.values[self.here.index] = json.dumps(value)
        self.barrier.wait(30)
        values = [json.loads(each) for each in self.values]
        self.barrier.wait(30)
        return values

    def run(self, function):
        """The results by host, or the exceptions."""
        results = [None] * self.count

        def work(index):
            self.here.index = index
            try:
                results[index] = function(index)
            except BaseException as error:
                results[index] = error
                if isinstance(error, Died):
                    self.barrier.abort()  # as the others of a job notice

        threads = [threading.Thread(target=work, args=(index,)) for index in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def open(self, url, folders, seconds=60.0, quiet=False):
        """A mirror for each host. quiet: nothing is brought but by `push` and `share`."""

        def one(index):
            folder = folders[index]
            folder.mkdir(parents=True, exist_ok=True)
            store = Store(url)
            lease = Lease(store, seconds, str(folder))
            each = SharedMirror(store, folder, lease, Host(index, self.count))
            each.open()
            if quiet:
                each._ended = True
                each.wake()
                each._thread.join()
            return each

        return self.run(one)


@pytest.fixture
def url(server, request):
    return f"{server.url}/tests/{hashlib.sha1(request.node.name.encode()).hexdigest()}"


@pytest.fixture
def folders(tmp_path):
    return [tmp_path / str(index) for index in range(4)]


def save(folder, step, seed, host, count):
    """What Orbax writes on one host, and the seal of that host."""
    directory = folder / STEP.format(step)
    shutil.rmtree(directory, ignore_errors=True)
    chance = random.Random(f"{seed} {host}")
    files = {"_METADATA": f"written by {host}".encode(), f"w/{host}.0": chance.randbytes(500)}
    files[f"array_metadatas/process_{host}"] = b"{}"
    if host == 0:
        files["w/.zarray"] = b'{"chunks": [1, 1]}'
    for name, content in files.items():
        write(directory, name, content)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    seal = {"record": {}, "digests": {"w": [seed]}, "files": hashes, "host": [host, count]}
    write(directory, "seal.json", seal_text(seal).encode())


def check_whole(store):
    """Every seal in the store speaks of files that are there, with these bytes; returns the steps."""
    found = stored(store)
    steps = []
    for name, content in found.items():
        if not name.endswith("/seal.json"):
            continue
        files = parse_seal(content)["files"]
        for file, wanted in files.items():
            assert hashlib.sha256(found[name.replace("seal.json", file)]).hexdigest() == wanted
        steps.append(int(name.split("/")[2]))
    return sorted(steps)


def everything(files):
    return files


@pytest.mark.parametrize("count", [2, 4])
def test_a_checkpoint_of_several_hosts_is_read_by_any_number(url, folders, monkeypatch, count):
    team = Team(count, monkeypatch)
    mirrors = team.open(url, folders)

    def work(index):
        save(folders[index], 4, seed=7, host=index, count=count)
        mirrors[index].share()
        mirrors[index].close()

    assert team.run(work) == [None] * count
    store = Store(url)
    assert check_whole(store) == [4]
    files = parse_seal(store.read(f"{STEP.format(4)}/seal.json"))["files"]
    assert {f"w/{host}.0" for host in range(count)} <= set(files)
    assert store.read(f"{STEP.format(4)}/_METADATA") == b"written by 0"
    # On three other machines: each fetches what it needs.
    team = Team(3, monkeypatch)
    others = [folders[0].parent / f"other{index}" for index in range(3)]
    mirrors = team.open(url, others)

    def read(index):
        needed = [f"w/{index % count}.0"]
        fault = mirrors[index].complete(others[index] / STEP.format(4), lambda files: needed)
        mirrors[index].close()
        return fault

    assert team.run(read) == [""] * 3
    for index, other in enumerate(others):
        chunks = {name for name in content_of(other) if "/w/" in name}
        assert chunks == {f"{STEP.format(4)}/w/{index % count}.0"}


def test_a_host_that_comes_back_fetches_what_others_hold_and_no_more(url, folders, monkeypatch):
    team = Team(2, monkeypatch)
    mirrors = team.open(url, folders)

    def begin(index):
        save(folders[index], 4, seed=7, host=index, count=2)
        mirrors[index].share()
        mirrors[index].close()

    team.run(begin)
    fetched = {}
    download = Store.download

    def noted(self, name, *more):
        fetched.setdefault(team.here.index, []).append(name.rpartition("/4/")[2])
        download(self, name, *more)

    monkeypatch.setattr(hosts, "in_parallel", lambda run, items: [*map(run, items)])
    monkeypatch.setattr(mirror, "in_parallel", lambda run, items: [*map(run, items)])
    monkeypatch.setattr(Store, "download", noted)
    again = team.open(url, folders)

    def go_on(index):
        fault = again[index].complete(folders[index] / STEP.format(4), everything)
        again[index].close()
        return fault

    assert team.run(go_on) == ["", ""]
    # Host 0 said that its seal speaks of itself only, and host 1 wrote its own copy of what all write.
    assert set(fetched[0]) <= {"seal.json", "w/1.0", "array_metadatas/process_1"}
    assert set(fetched[1]) == {
        *("seal.json", "w/0.0", "w/.zarray", "_METADATA", "array_metadatas/process_0")
    }


def test_what_host_0_writes_is_there_for_all_and_what_it_removes_is_not(url, folders, monkeypatch):
    team = Team(3, monkeypatch)
    mirrors = team.open(url, folders)

    def work(index):
        if index == 0:
            write(folders[0], "sft/config.json", b"{}")
            write(folders[0], "sft/metrics.jsonl", b'{"step": 1}\n{"st')
        if index == 1:  # any host may have made tokenized data; the rest is host 0's
            write(folders[1], "cache/unit-1/tokens", b"tokens")
            write(folders[1], "cache/files/record.json", b"of this machine")
            write(folders[1], "sft/of_host_1.json", b"{}")
        mirrors[index].share()
        first = content_of(folders[index])
        if index == 0:
            (folders[0] / "sft/config.json").unlink()
            write(folders[0], "sft/metrics.jsonl", b'{"step": 1}\n{"step": 2}\n')
        mirrors[index].share()
        mirrors[index].close()
        return first

    first = team.run(work)
    for index, found in enumerate(first):
        assert found["sft/config.json"] == b"{}" and found["cache/unit-1/tokens"] == b"tokens"
        second = content_of(folders[index])
        assert "sft/config.json" not in second
        assert second["sft/metrics.jsonl"] == b'{"step": 1}\n{"step": 2}\n'
        assert second.keys() >= {"cache/unit-1/tokens"}
    assert first[2]["sft/metrics.jsonl"] == b'{"step": 1}\n'
    kept = {"sft/metrics.jsonl", "cache/unit-1/tokens"}
    assert set(stored(Store(url))) == kept


def test_a_checkpoint_that_is_removed_takes_the_files_of_all_hosts_with_it(
    url, folders, monkeypatch
):
    team = Team(2, monkeypatch)
    mirrors = team.open(url, folders)

    def work(index):
        for step in (4, 8):
            save(folders[index], step, seed=step, host=index, count=2)
            mirrors[index].share()
        shutil.rmtree(folders[index] / STEP.format(4))
        mirrors[index].share()
        mirrors[index].close()

    assert team.run(work) == [None, None]
    assert check_whole(Store(url)) == [8]
    assert not Store(url).list(STEP.format(4))


def test_a_checkpoint_that_is_removed_before_it_was_whole_leaves_nothing(url, folders, monkeypatch):
    """As where saves follow each other faster than one host can bring them."""
    team = Team(3, monkeypatch)
    mirrors = team.open(url, folders[:3], quiet=True)

    def bring(index):
        save(folders[index], 4, seed=4, host=index, count=3)
        # Host 2 is slow: it has brought nothing of this one when all remove it.
        if index < 2:
            mirrors[index].push()

    def go_on(index):
        shutil.rmtree(folders[index] / STEP.format(4))
        save(folders[index], 8, seed=8, host=index, count=3)
        mirrors[index].share()
        mirrors[index].close()

    assert team.run(bring) == [None] * 3
    assert Store(url).list(STEP.format(4)) and check_whole(Store(url)) == []
    assert team.run(go_on) == [None] * 3
    assert check_whole(Store(url)) == [8]
    assert not Store(url).list(STEP.format(4))


def test_one_run_at_a_time_also_of_several_hosts(url, folders, monkeypatch):
    team = Team(2, monkeypatch)
    mirrors = team.open(url, folders[:2], seconds=2.0)
    others = [folder.parent / f"other{folder.name}" for folder in folders[:2]]
    refused = Team(2, monkeypatch).open(url, others, seconds=2.0)
    for error in refused:
        assert isinstance(error, Ending) and "another run works in it" in str(error)
    for module in (processes, hosts):
        monkeypatch.setattr(module, "gather_json", team.gather)
    team.run(lambda index: mirrors[index].close())


def test_a_failure_on_one_host_ends_all_with_its_reason(url, folders, monkeypatch):
    team = Team(3, monkeypatch)
    mirrors = team.open(url, folders, quiet=True)
    monkeypatch.setattr(retry, "ATTEMPTS", 1)

    def work(index):
        save(folders[index], 4, seed=4, host=index, count=3)
        if index == 2:

            def unavailable(*_):
                raise retry.Unavailable("write: failed 1 times, at last with HttpError: 503")

            mirrors[2].store.upload = unavailable
        mirrors[index].share()

    for error in team.run(work):
        assert isinstance(error, Ending) and "503" in str(error)
    assert check_whole(Store(url)) == []


def test_at_every_moment_the_store_has_whole_checkpoints_of_all_hosts(url, folders, monkeypatch):
    """A host dies at a random one of its requests, and the job with it; the next one has other hosts."""
    chance = random.Random(0)
    limits = {}
    here = threading.local()

    def counted(method):
        real = getattr(Store, method)

        def run(self, *args):
            index = getattr(here, "index", None)
            if index in limits:
                limits[index] -= 1
                if limits[index] < 0:
                    raise Died
            return real(self, *args)

        monkeypatch.setattr(Store, method, run)

    for method in ("write", "upload", "create", "delete"):
        counted(method)
    for module in (mirror, hosts):
        monkeypatch.setattr(module, "in_parallel", lambda run, items: [*map(run, items)])
    store = Store(url)
    newest = 0
    for attempt in range(12):
        count = chance.choice([2, 3])
        team = Team(count, monkeypatch)
        mirrors = team.open(url, folders, quiet=True)
        limits = {chance.randrange(count): chance.randrange(30)}

        def work(index, attempt=attempt, count=count, mirrors=mirrors, begin=newest):
            here.index = index
            for step in range(begin + 1, begin + 4):
                # Also one that is made again, with other bits, as after a rewind.
                for each in (step, step - 1):
                    save(folders[index], each, seed=100 * attempt + step, host=index, count=count)
                for old in (folders[index] / STEP.format(0)).parent.glob("*"):
                    if int(old.name) < step - 1:
                        shutil.rmtree(old)
                mirrors[index].share()

        team.run(work)
        limits = {}
        for each in mirrors:
            each._lease._ended.set()
        killed(mirrors[0]._lease)
        steps = check_whole(store)
        newest = max(steps, default=newest)
        if chance.random() < 0.5:
            lost = chance.choice(folders)
            shutil.rmtree(lost, ignore_errors=True)
    assert newest > 5
