"""Run directories in a store: emulators of both stores, the real clients, and whatever may happen between two requests."""

import hashlib
import json
import os
import random
import shutil
import threading
import time
from pathlib import Path

import pytest

from jaxllm.config import InputError
from jaxllm.runtime.seal import seal_text
from jaxllm.runtime.store import retry, scratch, working
from jaxllm.runtime.store.lease import Lease, LeaseLost
from jaxllm.runtime.store.mirror import Mirror, NotStored
from jaxllm.runtime.store.objects import Store

pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.fixture
def store(server, request):
    """A run directory that no other test uses."""
    return Store(f"{server.url}/tests/{hashlib.sha1(request.node.name.encode()).hexdigest()}")


# --- Objects.


def test_an_object_is_what_was_written(store, tmp_path):
    assert store.look("a/b") is None and store.read("a/b") is None and store.list() == {}
    written = store.write("a/b", b"one")
    assert store.read("a/b") == b"one" and store.look("a/b") == written and written.size == 3
    assert store.write("a/b", b"two!").version != written.version
    file = tmp_path / "file"
    file.write_bytes(os.urandom(20 << 20))  # several parts
    assert store.upload(file, "large file").size == 20 << 20
    store.download("large file", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == file.read_bytes()
    assert set(store.list()) == {"a/b", "large file"} and set(store.list("a")) == {"a/b"}
    store.delete(["large file", "never was"])
    assert set(store.list()) == {"a/b"}


def test_of_many_that_create_an_object_one_succeeds(store):
    won = []
    stores = [Store(store.url) for _ in range(8)]
    contents = [str(number).encode() for number in range(8)]

    def create(number):
        if stores[number].create("seal", contents[number]):
            won.append(contents[number])

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [store.read("seal")]
    # Its own attempt whose answer was lost is a success.
    assert store.create("seal", won[0]) and not store.create("seal", b"another")


@pytest.mark.parametrize("url", ["gs://", "gs://bucket", "gs://bucket/", "http://bucket/path"])
def test_a_url_without_a_path_is_refused(url):
    with pytest.raises(InputError, match="must be gs://BUCKET/PATH"):
        Store(url)


def test_a_bucket_that_does_not_exist_is_one_line(server):
    store = Store(f"{server.url.partition('://')[0]}://no-such-bucket/run")
    assert store.read("a") is None
    for ask in (store.list, lambda: store.create("a", b"x"), lambda: store.write("a", b"x")):
        with pytest.raises(InputError, match="there is no bucket no-such-bucket"):
            ask()


# --- Which errors pass.


class HttpError(Exception):
    def __init__(self, code, text=""):
        super().__init__(text)
        self.code = code


@pytest.mark.parametrize(
    "error",
    [HttpError(503), HttpError(429), ConnectionResetError(), TimeoutError(), OSError("cut body")],
    ids=repr,
)
def test_what_passes_is_tried_again(error):
    calls = []

    def run():
        calls.append(1)
        if len(calls) < 4:
            raise error
        return "done"

    assert retry.repeated("write gs://b/x", run) == "done" and len(calls) == 4


def test_what_does_not_pass_ends_in_one_line():
    calls = []

    def fail(error):
        calls.append(1)
        raise error

    with pytest.raises(retry.Unavailable, match="write gs://b/x: failed 3 times"):
        retry.repeated("write gs://b/x", lambda: fail(HttpError(500)), attempts=3)
    assert len(calls) == 3
    expired = OSError("the token is too old")
    expired.response = {
        "Error": {"Code": "ExpiredToken"},
        "ResponseMetadata": {"HTTPStatusCode": 400},
    }
    denied = PermissionError("AccessDenied for key AKIA1")
    for error in (HttpError(401), HttpError(403), denied, expired):
        calls.clear()
        with pytest.raises(retry.Refused, match="check this machine's credentials") as refusal:
            retry.repeated("write gs://b/x", lambda error=error: fail(error))
        assert len(calls) == 1 and "AKIA1" not in str(refusal.value)
    with pytest.raises(ZeroDivisionError):
        retry.repeated("write gs://b/x", lambda: fail(ZeroDivisionError()))


# --- The lease.


def lease(store, seconds=1.0, scratch=""):
    return Lease(store, seconds, scratch)


def test_two_runs_do_not_work_at_once(store):
    first = lease(store)
    first.take()
    with pytest.raises(InputError, match="another run works in it"):
        lease(store).take()
    first.check()
    first.give_back()
    began = time.monotonic()
    second = lease(store, seconds=60)
    second.take()  # at once
    assert time.monotonic() - began < 5 and second.number == 2
    second.give_back()


def killed(held):
    """A holder that renews nothing any more, as if its machine were gone."""
    held._ended.set()
    held._thread.join()


def test_the_lease_of_a_killed_run_runs_out(store):
    first = lease(store)
    first.take()
    killed(first)
    began = time.monotonic()
    second = lease(store)
    second.take()
    assert time.monotonic() - began > 0.9
    # The one that was thought dead comes back.
    with pytest.raises(LeaseLost, match="another run has taken over"):
        time.sleep(0.6)
        first.check()
    second.check()
    second.give_back()


def test_a_run_that_comes_back_to_its_scratch_does_not_wait(store):
    first = lease(store, 60, scratch="mine")
    first.take()
    killed(first)
    began = time.monotonic()
    second = lease(store, 60, scratch="mine")
    second.take()
    assert time.monotonic() - began < 5
    second.give_back()


def test_of_several_that_wait_one_gets_the_lease(store):
    first = lease(store)
    first.take()
    killed(first)
    taken = []

    def take():
        mine = lease(Store(store.url))
        try:
            mine.take()
            taken.append(mine)
        except InputError:
            pass

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = taken
    winner.check()
    winner.give_back()


# --- The mirror.


def write(folder, name, content):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def save(folder, step, seed, stage="pretrain"):
    """A sealed checkpoint of two files, of which one is in a folder."""
    directory = folder / stage / "checkpoints" / str(step)
    random.seed(seed)
    files = {"_METADATA": b"{}", "d/array": random.randbytes(1000)}
    for name, content in files.items():
        write(directory, name, content)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    write(directory, "seal.json", seal_text({"files": hashes, "seed": seed}).encode())
    return directory


def everything(files):
    """What a process needs that reads all of a checkpoint."""
    return files


def opened(store, folder, seconds=5.0):
    folder.mkdir(parents=True, exist_ok=True)
    mirror = Mirror(store, folder, Lease(store, seconds, str(folder)))
    mirror.open()
    return mirror


def content_of(folder):
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and not file.name.startswith(".")
    }


def stored(store):
    return {name: store.read(name) for name in store.list() if not name.startswith("lease/")}


def test_what_a_run_leaves_is_found_on_another_machine(store, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    mirror = opened(store, here)
    write(here, "pretrain/config.json", b"{}")
    write(here, "pretrain/metrics.jsonl", b'{"step": 1}\n{"st')  # cut while it is written
    write(here, "cache/unit-1/tokens", b"tokens")
    directory = save(here, 4, seed=1)
    write(here, "pretrain/checkpoints/8/d/array", b"not sealed")
    write(here, "pretrain/.result.json.partial", b"half")
    mirror.close()
    want = content_of(here)
    want["pretrain/metrics.jsonl"] = b'{"step": 1}\n'
    del want["pretrain/checkpoints/8/d/array"]
    assert stored(store) == want

    mirror = opened(store, there)
    small = {name for name in want if "/d/" not in name and not name.startswith("cache/")}
    assert set(content_of(there)) == small - {"pretrain/checkpoints/4/_METADATA"}
    mirror.bring("cache/")
    target = there / directory.relative_to(here)
    assert mirror.complete(target, everything) == ""
    assert content_of(there) == want
    mirror.close()
    assert stored(store) == want


def test_what_is_removed_is_removed_in_the_store(store, tmp_path):
    mirror = opened(store, tmp_path)
    save(tmp_path, 4, seed=1)
    write(tmp_path, "pretrain/result.json", b"{}")
    mirror.push()
    # Never fetched here, and yet removed with its checkpoint.
    mirror.close()
    other = tmp_path / "other"
    mirror = opened(store, other)
    save(other, 8, seed=2)
    for file in ("checkpoints/4/seal.json", "result.json"):
        (other / "pretrain" / file).unlink()
    mirror.close()
    assert set(stored(store)) == {
        f"pretrain/checkpoints/8/{file}" for file in ("_METADATA", "d/array", "seal.json")
    }


def test_a_checkpoint_is_removed_only_when_newer_ones_are_there(store, tmp_path, monkeypatch):
    """A machine that is lost meanwhile has something to go on from."""
    mirror = opened(store, tmp_path)
    old = save(tmp_path, 4, seed=1)
    mirror.push()
    save(tmp_path, 8, seed=2)
    for file in ("seal.json", "d/array", "_METADATA"):
        (old / file).unlink()

    def killed(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Store, "upload", killed)
        with pytest.raises(Killed):
            mirror.push()
    assert "pretrain/checkpoints/4/seal.json" in store.list()
    mirror.close()
    assert {name.split("/")[2] for name in stored(store)} == {"8"}


def test_a_scratch_that_is_behind_takes_what_the_store_has(store, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    mirror = opened(store, first)
    write(first, "sft/rankings.jsonl", b"1\n")
    write(first, "sft/old.json", b"{}")
    mirror.close()
    # Written after the last look at it, as before a kill: lost, since another machine has gone on without.
    write(first, "sft/rankings.jsonl", b"1\n2 of the first\n")
    mirror = opened(store, second)
    write(second, "sft/rankings.jsonl", b"1\n2\n3\n")
    (second / "sft/old.json").unlink()
    mirror.close()
    mirror = opened(store, first)
    assert content_of(first) == {"sft/rankings.jsonl": b"1\n2\n3\n"}
    mirror.close()


def test_a_scratch_that_is_ahead_is_brought_to_the_store(store, tmp_path):
    mirror = opened(store, tmp_path)
    write(tmp_path, "sft/rankings.jsonl", b"1\n")
    mirror.push()
    write(tmp_path, "sft/rankings.jsonl", b"1\n2\n")
    mirror._ended = True  # killed
    mirror._thread.join(0.1)
    killed(mirror._lease)
    mirror = opened(store, tmp_path)
    mirror.close()
    assert stored(store) == {"sft/rankings.jsonl": b"1\n2\n"}


class Killed(BaseException):
    """Ends a process between two requests."""


def test_at_every_moment_the_store_has_whole_checkpoints_only(store, tmp_path, monkeypatch):
    """The process is killed at each of its requests in turn; what is sealed in the store is then complete."""
    chance = random.Random(0)
    requests = []
    limit = [10**9]

    def counted(method):
        real = getattr(Store, method)

        def run(self, *args):
            requests.append(method)
            if len(requests) > limit[0]:
                raise Killed
            return real(self, *args)

        monkeypatch.setattr(Store, method, run)

    for method in ("write", "upload", "create", "delete"):
        counted(method)
    monkeypatch.setattr(
        "jaxllm.runtime.store.mirror.in_parallel", lambda run, items: [*map(run, items)]
    )
    folder = tmp_path / "scratch"
    last = 0
    had_one = False
    for attempt in range(25):
        requests.clear()
        limit[0] = 10**9
        mirror = opened(store, folder)
        mirror._ended = True  # nothing but what this test asks for
        mirror.wake()
        mirror._thread.join()
        limit[0] = len(requests) + chance.randrange(40)
        try:
            for step in (last + 1, last + 2):
                directory = save(folder, step, seed=100 * attempt + step)
                # Also one that is made again, with other bits.
                if chance.random() < 0.5 and last:
                    save(folder, last, seed=-step)
                for old in sorted(directory.parent.iterdir(), key=lambda path: int(path.name))[:-2]:
                    (old / "seal.json").unlink(missing_ok=True)
                mirror.push()
                last = step
        except Killed:
            last = max(last, step)
        limit[0] = 10**9
        killed(mirror._lease)
        for name, content in stored(store).items():
            if name.endswith("seal.json"):
                for file, wanted in json.loads(content)["files"].items():
                    array = store.read(name.replace("seal.json", file))
                    assert array and hashlib.sha256(array).hexdigest() == wanted, name
        sealed = [name for name in store.list() if name.endswith("seal.json")]
        # A machine that has nothing can go on, whenever the kill came.
        assert sealed or not had_one
        had_one = had_one or bool(sealed)
        if chance.random() < 0.5:
            for file in [*folder.rglob("*")][::-1]:
                file.rmdir() if file.is_dir() else file.unlink()
            (folder).rmdir()
            steps = [int(name.split("/")[2]) for name in store.list() if name.endswith("seal.json")]
            last = max(steps, default=0)
    assert last > 5


def test_arrays_that_are_damaged_here_are_fetched_again(store, tmp_path):
    mirror = opened(store, tmp_path)
    directory = save(tmp_path, 4, seed=1)
    mirror.push()
    whole = (directory / "d/array").read_bytes()
    (directory / "d/array").write_bytes(whole[:-1] + b"!")
    assert mirror.complete(directory, everything) == ""
    assert (directory / "d/array").read_bytes() == whole
    mirror.close()


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_arrays_that_are_damaged_in_the_store_are_named(store, tmp_path, damage):
    mirror = opened(store, tmp_path / "one")
    directory = save(tmp_path / "one", 4, seed=1)
    mirror.close()
    name = "pretrain/checkpoints/4/d/array"
    if damage == "flip":
        store.write(name, b"!" + (directory / "d/array").read_bytes()[1:])
    else:
        store.delete([name])
    mirror = opened(store, tmp_path / "two")
    found = mirror.complete(tmp_path / "two" / "pretrain/checkpoints/4", everything)
    assert (
        found
        == {
            "flip": "array is not what was sealed",
            "remove": "array is missing, also in the store",
        }[damage]
    )
    mirror.close()


def test_a_file_that_is_removed_while_it_is_brought_is_left_out(store, tmp_path, monkeypatch):
    """As a checkpoint that is no longer kept."""
    mirror = opened(store, tmp_path)
    write(tmp_path, "sft/gone.npy", b"1")
    write(tmp_path, "sft/stays.npy", b"2")
    upload = Store.upload

    def removed(self, file, name):
        if name.endswith("gone.npy"):
            file.unlink()
        return upload(self, file, name)

    monkeypatch.setattr(Store, "upload", removed)
    mirror.close()
    assert set(stored(store)) == {"sft/stays.npy"}


def test_a_checkpoint_whose_removal_has_begun_is_left_out(store, tmp_path, monkeypatch):
    """Its seal goes first, while its arrays are still there."""
    mirror = opened(store, tmp_path)
    directory = save(tmp_path, 4, seed=1)
    save(tmp_path, 8, seed=2)
    is_sealed = Mirror._is_sealed

    def removing(self, array):
        if "/4/" in array:
            (directory / "seal.json").unlink(missing_ok=True)
        return is_sealed(self, array)

    monkeypatch.setattr(Mirror, "_is_sealed", removing)
    mirror.push()
    shutil.rmtree(directory)
    mirror.close()
    found = stored(store)
    assert "pretrain/checkpoints/8/seal.json" in found
    assert not [name for name in found if "/4/" in name]


def test_whatever_ends_the_thread_ends_the_run(store, tmp_path, monkeypatch):
    mirror = opened(store, tmp_path)

    def fail(*_):
        raise ZeroDivisionError("unheard of")

    with monkeypatch.context() as broken:
        broken.setattr(Store, "upload", fail)
        write(tmp_path, "sft/file", b"1")
        mirror.wake()
        mirror._thread.join(20)
    assert not mirror._thread.is_alive()
    # As the next save does.
    with pytest.raises(ZeroDivisionError, match="unheard of"):
        mirror.check()
    mirror.close()


def test_damage_is_not_brought_to_the_store(store, tmp_path, capsys):
    mirror = opened(store, tmp_path)
    directory = save(tmp_path, 4, seed=1)
    mirror.push()
    before = stored(store)
    # After it was brought, and before.
    (directory / "d/array").write_bytes(b"damaged")
    mirror.push()
    assert stored(store) == before
    damaged = save(tmp_path, 8, seed=2)
    (damaged / "d/array").write_bytes(b"damaged")
    mirror.push()
    assert "pretrain/checkpoints/8/seal.json" not in stored(store)
    assert "is not what was sealed" in capsys.readouterr().err
    # Saved again, it is brought.
    save(tmp_path, 8, seed=2)
    mirror.push()
    assert "pretrain/checkpoints/8/seal.json" in stored(store)
    mirror.close()


def test_a_store_that_is_away_ends_a_push_in_one_line(store, tmp_path, monkeypatch):
    mirror = opened(store, tmp_path)
    write(tmp_path, "sft/result.json", b"{}")

    def away(*_):
        raise retry.Unavailable("create: failed 7 times")

    with monkeypatch.context() as broken:
        broken.setattr(Store, "create", away)
        with pytest.raises(NotStored, match="safe in"):
            mirror.push()
    mirror.push()
    assert "sft/result.json" in stored(store)
    mirror.close()


def test_a_run_that_has_lost_its_lease_writes_nothing(store, tmp_path):
    mirror = opened(store, tmp_path / "first", seconds=0.5)
    killed(mirror._lease)
    other = opened(store, tmp_path / "second", seconds=0.5)
    time.sleep(0.3)
    write(tmp_path / "first", "sft/result.json", b"{}")
    with pytest.raises(LeaseLost):
        mirror.push()
    with pytest.raises(LeaseLost):
        mirror.check() or mirror.push()
    assert "sft/result.json" not in stored(store)
    other.close()


# --- The scratch.


def test_a_run_finds_its_scratch_again_and_old_ones_are_removed(tmp_path):
    one, other = (scratch.folder_of(f"gs://b/{name}", tmp_path) for name in ("a/b", "a-b"))
    assert one != other and one == scratch.folder_of("gs://b/a/b", tmp_path)
    for folder in (one, other):
        with scratch.locked(folder):
            (folder / "file").touch()
            with pytest.raises(InputError, match="another process"), scratch.locked(folder):
                pass
    (tmp_path / "of somebody").mkdir()
    os.utime(other / ".mirror.lock", (0, 0))
    scratch.clean(tmp_path, used=one)
    assert {path.name for path in tmp_path.iterdir()} == {one.name, "of somebody"}


def test_a_local_run_directory_is_its_own_copy(tmp_path):
    with working.working_copy(tmp_path, 60) as folder:
        assert Path(folder) == tmp_path and working.mirror_of(folder) is None
        assert working.shown(folder) == str(tmp_path)


def test_a_path_is_shown_as_its_url(store, tmp_path):
    with working.working_copy(store.url, 60, str(tmp_path)) as folder:
        assert Path(folder).is_relative_to(tmp_path)
        assert working.shown(folder) == store.url
        assert working.shown(folder / "sft" / "result.json") == f"{store.url}/sft/result.json"


def test_a_reader_has_what_is_in_the_store_now(store, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLLM_SCRATCH", str(tmp_path / "laptop"))
    here = tmp_path / "here"
    mirror = opened(store, here)
    write(here, "sft/model.json", b"1")
    write(here, "ppo/model.json", b"of ppo")
    save(here, 4, seed=1, stage="sft")
    mirror.push()
    url = f"{store.url}/sft"
    folder = Path(working.local_folder(url))
    assert (folder / "model.json").read_bytes() == b"1" and not (folder.parent / "ppo").exists()
    write(here, "sft/model.json", b"22")
    mirror.push()
    assert (Path(working.local_folder(url)) / "model.json").read_bytes() == b"22"
    # A sibling that the model refers to, by its path beside it.
    assert (Path(working.local_folder(folder.parent / "ppo")) / "model.json").exists()
    directory = folder / "checkpoints" / "4"
    assert not (directory / "d" / "array").exists()
    reader = working.mirror_of(directory)
    assert reader.complete(directory, everything) == ""
    assert (directory / "d" / "array").exists()
    mirror.close()
    assert set(stored(store)) == set(content_of(here))  # a reader writes nothing


def test_an_error_names_a_file_by_its_url(store, tmp_path):
    with (
        pytest.raises(InputError) as error,
        working.working_copy(store.url, 5.0, str(tmp_path)) as run,
    ):
        raise InputError(f"{run}/sft/config.json: not valid JSON")
    assert str(error.value) == f"{store.url}/sft/config.json: not valid JSON"
