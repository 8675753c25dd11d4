"""Compiled programs are kept between sessions: complete ones only, for this machine and these versions only."""

import os
import time

import pytest

from tests import compile_cache

# One megabyte that does not compress: a cut file has lost some of it.
PROGRAM = os.urandom(1 << 20)


@pytest.fixture
def store(tmp_path):
    return compile_cache.store({"JAXLLM_TEST_CACHE": str(tmp_path / "root")})


def compress(program):
    from jax._src import compilation_cache

    return compilation_cache.compress_executable(program)


def entries(folder):
    return {path.name for path in folder.iterdir()}


def test_the_next_session_reads_what_this_one_compiled(store, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    compile_cache.borrow(store, first)
    (first / "jit_step-cache").write_bytes(compress(PROGRAM))
    compile_cache.give_back(store, first)
    compile_cache.borrow(store, second)
    assert (second / "jit_step-cache").read_bytes() == compress(PROGRAM)


def test_an_entry_that_a_killed_process_left_unfinished_is_not_kept(store, tmp_path):
    session = tmp_path / "session"
    compile_cache.borrow(store, session)
    whole = compress(PROGRAM)
    (session / "jit_cut-cache").write_bytes(whole[: len(whole) // 2])
    (session / "jit_empty-cache").write_bytes(b"")
    (session / "jit_step-cache").write_bytes(whole)
    compile_cache.give_back(store, session)
    assert entries(store) == {"jit_step-cache"}


def test_old_entries_of_any_key_are_removed(store, tmp_path):
    other = store.parent / "key of an earlier jaxlib"
    other.mkdir()
    month_ago = time.time() - 31 * 24 * 3600
    for folder in (store, other):
        (folder / "jit_old-cache").write_bytes(b"old")
        (folder / "jit_new-cache").write_bytes(b"new")
        os.utime(folder / "jit_old-cache", (month_ago, month_ago))
    compile_cache.borrow(store, tmp_path / "session")
    assert entries(store) == entries(other) == entries(tmp_path / "session") == {"jit_new-cache"}


def test_other_versions_and_other_cpus_have_other_keys(monkeypatch):
    key = compile_cache._key()
    assert key == compile_cache._key()
    with monkeypatch.context() as patch:
        patch.setattr(compile_cache, "_cpu_flags", lambda: "sse2")
        assert compile_cache._key() != key
    with monkeypatch.context() as patch:
        patch.setattr(compile_cache.importlib.metadata, "version", lambda name: f"{name} 0.0")
        assert compile_cache._key() != key


def test_without_a_writable_folder_nothing_is_kept(tmp_path):
    (tmp_path / "file").touch()
    assert compile_cache.store({"JAXLLM_TEST_CACHE": str(tmp_path / "file")}) is None
    assert compile_cache.store({"JAXLLM_TEST_CACHE": ""}) is None
