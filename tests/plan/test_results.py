"""What compiling found out is kept: the same program is not compiled again, another one is, and damage does no harm."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxllm.plan import measure, results
from jaxllm.plan.results import Results
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.sharding import activation
from jaxllm.train import Program


@pytest.fixture
def compilations(monkeypatch):
    """The programs that were compiled."""
    compiled = []
    real = measure._compile

    def noted(lowered):
        compiled.append(lowered)
        return real(lowered)

    monkeypatch.setattr(measure, "_compile", noted)
    return compiled


def program(mesh, factor=2.0, shape=(8, 16), trips=0):
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=activation(mesh, "batch", None))
    run = jax.jit(lambda x: jnp.sin(factor * x) @ x.T)
    return Program("p", run, (x,), {}, flops=100.0, trips=trips)


MESH = MeshConfig(data=4, fsdp=2)


def test_the_same_program_is_compiled_once(tmp_path, compilations):
    mesh = make_mesh(MESH)
    first = measure.measure(program(mesh), mesh, Results(tmp_path))
    second = measure.measure(program(mesh), mesh, Results(tmp_path))
    assert len(compilations) == 1 and (first["known"], second["known"]) == (False, True)
    assert second | {"known": False} == first and first["fits"] and first["collectives"]


@pytest.mark.parametrize("change", ["constant", "shape", "trips", "mesh", "setting", "version"])
def test_whatever_decides_the_result_is_in_its_key(tmp_path, compilations, monkeypatch, change):
    mesh = make_mesh(MESH)
    measure.measure(program(mesh), mesh, Results(tmp_path))
    other = program(mesh)
    if change == "constant":
        other = program(mesh, factor=3.0)
    elif change == "shape":
        other = program(mesh, shape=(8, 24))
    elif change == "trips":
        other = program(mesh, trips=16)
    elif change == "mesh":
        mesh = make_mesh(dataclasses.replace(MESH, data=2, fsdp=4))
        other = program(mesh)
    elif change == "setting":
        monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_something=1")
    else:
        monkeypatch.setattr(results, "_version", lambda package: f"{package} of tomorrow")
    assert not measure.measure(other, mesh, Results(tmp_path))["known"]
    assert len(compilations) == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff"])
def test_a_damaged_result_is_found_out_again_and_replaced(tmp_path, compilations, content):
    mesh = make_mesh(MESH)
    first = measure.measure(program(mesh), mesh, Results(tmp_path))
    (path,) = tmp_path.glob("*.json")
    whole = path.read_bytes()
    path.write_bytes(content)
    again = measure.measure(program(mesh), mesh, Results(tmp_path))
    assert len(compilations) == 2 and again["collectives"] == first["collectives"]
    assert len(path.read_bytes()) > len(whole) // 2
    assert measure.measure(program(mesh), mesh, Results(tmp_path))["known"]


def test_without_a_folder_nothing_is_kept(compilations):
    mesh = make_mesh(MESH)
    for _ in range(2):
        assert not measure.measure(program(mesh), mesh, Results(None))["known"]
    assert len(compilations) == 2


def test_a_folder_that_cannot_be_written_is_reported(tmp_path, capsys, compilations):
    mesh = make_mesh(MESH)
    folder = tmp_path / "plans"
    folder.mkdir()
    kept = Results(folder)
    folder.rmdir()
    folder.write_text("not a folder")
    assert measure.measure(program(mesh), mesh, kept)["fits"]
    assert "not kept in" in capsys.readouterr().err
