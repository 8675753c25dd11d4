"""`plan` says which compiler answered, and when it is not the one that a pod would have."""

import importlib.metadata

import pytest

from jaxllm.plan import compiler


@pytest.mark.parametrize(
    ("requirements", "pinned"),
    [
        (["jaxlib", "libtpu==0.0.50.*; extra == 'tpu'"], "0.0.50.*"),
        (["libtpu == 0.0.52 ; extra == 'tpu'"], "0.0.52"),
        (["libtpu>=0.0.50; extra == 'tpu'", "libtpu-nightly==1"], ""),
        (None, ""),
    ],
)
def test_the_pinned_version_is_read_from_jax(monkeypatch, requirements, pinned):
    monkeypatch.setattr(importlib.metadata, "version", {"libtpu": "0.0.51"}.__getitem__)
    monkeypatch.setattr(importlib.metadata, "requires", {"jax": requirements}.__getitem__)
    assert compiler.libtpu() == ("0.0.51", pinned)


@pytest.mark.parametrize(
    ("installed", "pinned", "same"),
    [
        ("0.0.50.1", "0.0.50.*", True),
        ("0.0.52", "0.0.52", True),
        ("0.0.52", "", True),
        ("0.0.52", "0.0.50.*", False),
        ("0.0.501", "0.0.50.*", False),
    ],
)
def test_another_compiler_than_the_pods_is_a_note(installed, pinned, same):
    line = compiler.note(installed, pinned)
    assert (not line) == same
    assert same or (installed in line and f"'libtpu=={pinned}'" in line)
