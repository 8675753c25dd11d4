"""Programs kept on disk: found by the next process, replaced if damaged, bounded, safe beside other processes."""

import os
import subprocess
import sys
import threading

import pytest

from jaxllm.runtime import compile_cache
from jaxllm.runtime.compile_cache import ProgramCache
from jaxllm.runtime.hardware import cpu_kind
from jaxllm.runtime.store.objects import Store
from jaxllm.runtime.store.programs import RemotePrograms
from jaxllm.runtime.store.retry import Unavailable
from tests.emulators import SERVERS, in_environment

# Compiles three programs with the cache on, and prints what they compute and what the cache did.
RUN = """
import jax, jax.numpy as jnp, sys
from jaxllm.runtime import compile_cache
cache = compile_cache.enable()
values = [float(jax.jit(lambda x, n=n: jnp.sin(x * n) @ x)(jnp.arange(9.0))) for n in (1, 2, 3)]
print(values, cache and cache.found, cache and cache.compiled)
"""


def run(folder, warnings="error"):
    environ = {**os.environ, "JAXLLM_CACHE": str(folder), "JAX_PLATFORMS": "cpu"}
    environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-W", warnings, "-c", RUN]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(done.stdout.rsplit(maxsplit=2))  # values, found, compiled


def entries(folder):
    return sorted((folder / "programs").glob("*.program"))


def test_the_next_process_compiles_nothing(tmp_path):
    text, found, compiled = run(tmp_path)
    assert (found, int(compiled)) == ("0", len(entries(tmp_path))) and int(compiled) >= 3
    assert run(tmp_path) == (text, compiled, "0")
    assert not [*(tmp_path / "programs").glob(".*")]
    assert (tmp_path / "programs").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("damage", ["cut", "empty", "a byte", "of another program"])
def test_a_damaged_entry_is_compiled_again_and_replaced(tmp_path, damage):
    text, _, compiled = run(tmp_path)
    whole = {path: path.read_bytes() for path in entries(tmp_path)}
    for path, content in whole.items():
        middle = len(content) // 2
        path.write_bytes(
            {
                "cut": content[:middle],
                "empty": b"",
                "a byte": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
                # A whole entry that JAX cannot read.
                "of another program": compile_cache.hashlib.sha256(b"x").digest() + b"x",
            }[damage]
        )
    # JAX warns of an entry that is whole and that it cannot read, and counts it as found.
    warnings = "ignore" if damage == "of another program" else "error"
    again = run(tmp_path, warnings)
    assert (again[0], again[2]) == (text, compiled)
    assert {*entries(tmp_path)} == {*whole}
    assert run(tmp_path) == (text, compiled, "0")


def test_many_writers_and_readers_see_whole_entries(tmp_path):
    values = {str(n): bytes([n]) * (1 << 16) for n in range(8)}
    caches = [ProgramCache(tmp_path) for _ in range(4)]
    wrong = []

    def work(cache):
        for _ in range(20):
            for key, value in values.items():
                cache.put(key, value)
                if cache.get(key) not in (None, value):
                    wrong.append(key)

    threads = [threading.Thread(target=work, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len([*tmp_path.glob("*.program")]) == 8


def test_the_least_recently_used_go_when_there_are_too_many(tmp_path):
    cache = ProgramCache(tmp_path)
    for n in range(5):
        cache.put(str(n), b"x" * 1000)
        os.utime(tmp_path / f"{n}.program", (n, n))
    (tmp_path / ".killed.1").write_bytes(b"x" * 1000)
    os.utime(tmp_path / ".killed.1", (0, 0))
    assert cache.get("0")  # used now
    ProgramCache(tmp_path, limit=2500)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.program", "4.program"]


def test_a_disk_that_refuses_is_said_once(tmp_path, capsys):
    folder = tmp_path / "gone"
    folder.mkdir()
    cache = ProgramCache(folder)
    folder.rmdir()
    cache.put("a", b"x")
    cache.put("b", b"x")
    assert cache.get("a") is None
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("compiled programs are not kept") == 1


def test_nothing_is_kept_where_none_is_wanted_or_others_could_write(tmp_path):
    assert compile_cache.folder("programs", {"JAXLLM_CACHE": ""}) is None
    folder = compile_cache.folder("programs", {"JAXLLM_CACHE": str(tmp_path)})
    assert folder == tmp_path / "programs"
    folder.chmod(0o777)
    assert compile_cache.folder("programs", {"JAXLLM_CACHE": str(tmp_path)}) is None
    (tmp_path / "file").write_text("")
    assert compile_cache.folder("programs", {"JAXLLM_CACHE": str(tmp_path / "file")}) is None
    home = compile_cache.folder("programs", {"XDG_CACHE_HOME": str(tmp_path / "home")})
    assert home == tmp_path / "home" / "jaxllm" / "programs"
    text, found, compiled = run("")
    assert text and (found, compiled) == ("None", "None")


def test_cpus_that_know_other_instructions_have_other_names(tmp_path):
    about = tmp_path / "cpuinfo"
    names = set()
    for flags in ("sse avx", "sse avx amx_tile"):
        about.write_text(f"processor: 0\nmodel name: X\nMHz: 1\nflags: {flags}\n\nprocessor: 1\n")
        names.add(cpu_kind(about))
        about.write_text(f"processor: 0\nmodel name: X\nMHz: 2\nflags: {flags}\n\n")
        names.add(cpu_kind(about))
    assert len(names) == 2
    assert cpu_kind(tmp_path / "missing") == cpu_kind(tmp_path / "missing")


# --- In a store.


@pytest.fixture(scope="module", params=SERVERS)
def server(request, tmp_path_factory):
    with SERVERS[request.param](tmp_path_factory.mktemp("server")) as emulator:
        yield emulator


def run_on_another_machine(home, url, environment):
    """`run` with the store behind a folder that is new, or was left by the last one there."""
    environ = {**os.environ, **environment, "JAXLLM_CACHE": url, "XDG_CACHE_HOME": str(home)}
    environ |= {"JAX_PLATFORMS": "cpu"}
    environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return *done.stdout.splitlines()[-1].rsplit(maxsplit=2), done.stdout + done.stderr


def test_another_machine_finds_in_the_store_what_was_compiled(server, tmp_path):
    url = f"{server.url}/found"
    text, found, compiled, _ = run_on_another_machine(tmp_path / "one", url, server.environment)
    assert found == "0" and int(compiled) >= 3
    again = run_on_another_machine(tmp_path / "two", url, server.environment)
    assert again[:3] == (text, compiled, "0")
    # And keeps them: the third start asks the store for nothing but its list.
    assert len(entries(tmp_path / "two/jaxllm")) == int(compiled)


@pytest.mark.life
def test_a_damaged_entry_in_the_store_is_replaced(server, tmp_path):
    url = f"{server.url}/damaged"
    text, _, compiled, _ = run_on_another_machine(tmp_path / "one", url, server.environment)
    with in_environment(server):
        store = Store(f"{url}/programs/{cpu_kind()}")
        whole = {name: store.read(name) for name in store.list()}
        for number, (name, content) in enumerate(whole.items()):
            store.write(name, content[: len(content) // 2] if number % 2 else b"")
        again = run_on_another_machine(tmp_path / "two", url, server.environment)
        assert (again[0], again[2]) == (text, compiled)
        for name, content in whole.items():
            assert compile_cache._checked(store.read(name)) is not None, name
            assert len(store.read(name)) == pytest.approx(len(content), rel=0.05)
    assert run_on_another_machine(tmp_path / "three", url, server.environment)[2] == "0"


def test_a_store_that_fails_is_said_once_and_stops_nothing(tmp_path):
    environment = {"STORAGE_EMULATOR_HOST": "http://127.0.0.1:9", "GOOGLE_CLOUD_PROJECT": "p"}
    environment |= {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}

    class Fails(RemotePrograms):
        def __init__(self):
            self.asked = 0
            super().__init__("gs://b/p")

        @property
        def _names(self):
            self.asked += 1
            raise Unavailable("list gs://b/p: failed 4 times")

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        remote = Fails()
    cache = ProgramCache(tmp_path, remote=remote)
    assert cache.get("a") is None and cache.get("b") is None
    cache.put("a", b"x")
    assert remote.asked == 1 and cache.get("a") == b"x"
    remote.flush(1.0)
