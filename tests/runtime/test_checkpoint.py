"""What is saved is restored bit for bit on any mesh; the last N and the best are kept; each mistake is one clear line."""

import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jaxllm.config import InputError
from jaxllm.models import transformer
from jaxllm.models.config import ModelConfig
from jaxllm.optim import make_optimizer
from jaxllm.optim_config import OptimConfig
from jaxllm.runtime import checkpoint as c
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.runtime.seal import committed_steps
from jaxllm.train import state_layout

MODEL = ModelConfig(vocab_size=64, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64)


def placed_on(config, model=MODEL):
    mesh = make_mesh(config)
    tx = make_optimizer(OptimConfig(), 10, transformer.axes(model))
    return state_layout(mesh, transformer.abstract(model), transformer.axes(model), tx)


def fresh(placed, model=MODEL):
    return placed.init(
        jax.jit(
            lambda: transformer.init(model, jax.random.key(0)),
            out_shardings=placed.shardings.params,
        )()
    )


@pytest.fixture
def saved(tmp_path):
    """A stage directory with one checkpoint written on an 8-way data mesh, and its state."""
    state = fresh(placed_on(MeshConfig()))
    saves = c.Checkpoints(tmp_path / "checkpoints", c.CheckpointConfig())
    saves.save(3, state._replace(step=jnp.int32(3)), {})
    saves.close()
    return tmp_path, jax.tree.map(np.asarray, state._replace(step=jnp.int32(3)))


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(), MeshConfig(data=1, fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2)],
    ids=str,
)
def test_restored_on_another_mesh_it_is_the_same_state(saved, mesh):
    directory, state = saved
    placed = placed_on(mesh)
    saves = c.Checkpoints(directory / "checkpoints", c.CheckpointConfig())
    restored, _ = saves.restore_or_init(
        placed.abstract, lambda: pytest.fail("must not initialize again")
    )
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, restored), state)
    for leaf, sharding in zip(
        jax.tree.leaves(restored), jax.tree.leaves(placed.shardings), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    params = c.load_params(directory, placed.abstract.params)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, params), state.params)


def save_all(directory, config, values, lower_is_better=True):
    saves = c.Checkpoints(directory, config, "eval/loss", lower_is_better)
    for step, value in enumerate(values, start=1):
        saves.save(
            step,
            {"x": jnp.full(3, float(step))},
            {"metrics": {} if value is None else {"eval/loss": value}},
        )
    saves.close()
    return committed_steps(saves.directory)


def test_last_best_and_every_so_many_are_kept(tmp_path):
    values = [3.0, 1.0, 4.0, 2.0, 2.5, None, None]
    assert save_all(tmp_path / "a", c.CheckpointConfig(keep_last=2, keep_best=1), values) == [
        2,
        6,
        7,
    ]
    assert save_all(
        tmp_path / "b", c.CheckpointConfig(keep_last=2, keep_best=1), values, False
    ) == [3, 6, 7]
    assert save_all(tmp_path / "c", c.CheckpointConfig(keep_last=1, keep_best=2), values) == [
        2,
        4,
        7,
    ]
    assert save_all(
        tmp_path / "d", c.CheckpointConfig(keep_last=1, keep_best=0, keep_every=3), values
    ) == [3, 6, 7]


def test_an_empty_directory_initializes(tmp_path):
    saves = c.Checkpoints(tmp_path / "checkpoints", c.CheckpointConfig())
    assert saves.restore_or_init(None, lambda: "fresh") == ("fresh", {})


def test_another_models_checkpoint_lists_both_sides(saved):
    directory, _ = saved
    other = ModelConfig(
        vocab_size=64, num_layers=2, embed_dim=16, num_heads=4, mlp_dim=64, mlp="gelu"
    )
    with pytest.raises(InputError, match="the checkpoint is of another model") as error:
        c.load_params(directory, placed_on(MeshConfig(), other).abstract.params)
    text = str(error.value)
    assert (
        "differ: " in text
        and "only in the checkpoint: layers.mlp.gate" in text
        and "\n" not in text
    )


def test_what_a_killed_save_left_is_removed_and_the_last_complete_one_used(saved):
    directory, _ = saved
    (directory / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
    shutil.copytree(directory / "checkpoints" / "3", directory / "checkpoints" / "6")
    (directory / "checkpoints" / "6" / c.SEAL).unlink()  # killed before it was sealed
    saves = c.Checkpoints(directory / "checkpoints", c.CheckpointConfig())
    assert int(saves.restore_or_init(placed_on(MeshConfig()).abstract, dict)[0].step) == 3
    assert [p.name for p in (directory / "checkpoints").iterdir()] == ["3"]


def flip(file, where):
    """Flip one bit of a file; where: a number in 0..1, from its first bit to its last."""
    data = bytearray(file.read_bytes())
    at = int(where * 8 * len(data))
    data[at // 8] ^= 1 << (at % 8)
    file.write_bytes(data)


def test_any_flipped_bit_in_any_file_is_found(saved):
    """200 of them; also a missing file, a file too many, and a file cut short."""
    directory, _ = saved
    abstract, step = placed_on(MeshConfig()).abstract, directory / "checkpoints" / "3"
    files = sorted(p for p in step.rglob("*") if p.is_file())
    rng = np.random.default_rng(0)
    for number in range(200):
        file = files[number % len(files)]
        before = file.read_bytes()
        if not before:
            continue
        flip(file, rng.random())
        with pytest.raises(c.Damaged):
            c.restore(step, abstract)
        file.write_bytes(before)
    for file in files:
        before = file.read_bytes()
        file.unlink()
        with pytest.raises(c.Damaged):
            c.restore(step, abstract)
        file.write_bytes(before)
    (step / "stray").touch()
    with pytest.raises(c.Damaged, match="stray does not belong to it"):
        c.restore(step, abstract)


def test_values_that_are_not_those_saved_are_found_without_the_files_hashes(saved, monkeypatch):
    """As on an object store: the digests that the devices took are enough, and name the leaf."""
    directory, _ = saved
    placed = placed_on(MeshConfig())
    other = fresh(placed)._replace(step=jnp.int32(3))
    other.params["embed"]["tokens"] = other.params["embed"]["tokens"].at[1, 2].add(1e-6)
    twin = c.Checkpoints(directory / "twin", c.CheckpointConfig())
    twin.save(3, other, {})
    twin.close()
    seal = (directory / "checkpoints" / "3" / c.SEAL).read_bytes()
    (directory / "twin" / "3" / c.SEAL).write_bytes(seal)
    monkeypatch.setattr(c, "check_files", lambda *_: None)
    with pytest.raises(c.Damaged, match=r"the values of params.embed.tokens are not those"):
        c.restore(directory / "twin" / "3", placed.abstract)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used_or_the_run_stops(
    tmp_path, capsys
):
    save_all(tmp_path / "checkpoints", c.CheckpointConfig(), [None, None])
    flip(next((tmp_path / "checkpoints" / "2" / "d").iterdir()), 0.5)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {"x": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=one)}
    stopping = c.Checkpoints(tmp_path / "checkpoints", c.CheckpointConfig(damaged="stop"))
    with pytest.raises(
        c.Damaged, match=r"checkpoints/2: this checkpoint is damaged or half-written"
    ) as error:
        stopping.restore_or_init(abstract, dict)
    assert "\n" not in str(error.value)
    saves = c.Checkpoints(tmp_path / "checkpoints", c.CheckpointConfig())
    state, _ = saves.restore_or_init(abstract, dict)
    np.testing.assert_array_equal(state["x"], [1.0, 1.0, 1.0])
    assert committed_steps(saves.directory) == [1] and (tmp_path / "damaged" / "2").exists()
    assert "set aside" in capsys.readouterr().err


def mount(path, *options):
    path.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", path], capture_output=True
    ).returncode:
        pytest.skip("cannot mount a small file system here")


@pytest.mark.parametrize("room", ["none at first", "less than it seems"])
def test_a_full_disk_ends_the_save_not_the_run(tmp_path, capsys, monkeypatch, room):
    disk, state = (
        tmp_path / "disk",
        {"x": jax.random.normal(jax.random.key(0), (1 << 18,))},
    )  # 1 MiB
    mount(disk, "size=3m")
    try:
        ballast = disk / "ballast"
        ballast.write_bytes(b"x" * (5 << 19))
        if room == "less than it seems":
            monkeypatch.setattr(c.Checkpoints, "_no_room", lambda *_: "")
        saves = c.Checkpoints(disk / "checkpoints", c.CheckpointConfig(keep_last=1))
        saves.save(1, state, {})
        saves.wait()
        said = " ".join(capsys.readouterr().err.split())
        assert "saving step 1 into" in said and "training continues" in said
        with pytest.raises(c.SaveFailed, match="make room"):
            saves.save_surely(2, state, {}, attempts=2, pause=0.0)
        ballast.unlink()
        saves.save_surely(3, state, {})
        assert committed_steps(saves.directory) == [3]
        saves.close()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_cannot_be_written_ends_the_save_not_the_run(tmp_path, capsys):
    disk = tmp_path / "disk"
    mount(disk, "size=8m")
    try:
        saves = c.Checkpoints(disk / "checkpoints", c.CheckpointConfig())
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        saves.save(1, {"x": jnp.ones(3)}, {})
        saves.wait()
        assert "Read-only file system" in " ".join(capsys.readouterr().err.split())
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        saves.save_surely(2, {"x": jnp.ones(3)}, {})
        assert committed_steps(saves.directory) == [2]
        saves.close()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_no_checkpoint_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match="has no checkpoints"):
        c.load_params(tmp_path, None)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="holds no complete checkpoint"):
        c.load_params(tmp_path, None)


ONE_DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
NAMES = st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=20)


@given(name=NAMES.filter(lambda name: name not in (".", "..")))
@example(name="r[1]")
@example(name="back\\slash")
@example(name="a*")
@example(name="a?b")
@example(name="**")
@example(name="percent%20#fragment {a,b}")
@example(name="\udcff")
@example(name="模型 é\n'\"$")
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_name_of_a_directory_keeps_checkpoints_or_is_refused_at_once(tmp_path_factory, name):
    directory = tmp_path_factory.mktemp("named") / name
    state = {"x": jnp.arange(3.0), "y": {"z": jnp.ones((2, 2))}}
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=ONE_DEVICE), state
    )
    try:
        saves = c.Checkpoints(directory, c.CheckpointConfig())
    except InputError as error:
        assert "--run-dir" in str(error) and not directory.exists()
        return
    saves.save_surely(1, state, {}, attempts=1)
    saves.close()
    restored, _ = c.restore(epath.Path(directory) / "1", abstract)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.parametrize("lost", ["manifest.ocdbt", "_METADATA", "d"])
def test_a_save_that_cannot_be_read_back_is_not_sealed(tmp_path, monkeypatch, capsys, lost):
    saves = c.Checkpoints(tmp_path / "checkpoints", c.CheckpointConfig())
    write = ocp.AsyncCheckpointer.wait_until_finished

    def write_and_lose(writer):
        write(writer)
        path = epath.Path(saves.directory / "1" / lost)
        if path.exists():
            path.rmtree() if path.is_dir() else path.unlink()

    monkeypatch.setattr(ocp.AsyncCheckpointer, "wait_until_finished", write_and_lose)
    with pytest.raises(c.SaveFailed):
        saves.save_surely(1, {"x": jnp.ones(3)}, {}, attempts=1)
    assert "cannot be read back" in " ".join(capsys.readouterr().err.split())
    assert committed_steps(saves.directory) == [] and not (saves.directory / "1").exists()
    monkeypatch.undo()
    saves.save_surely(2, {"x": jnp.ones(3)}, {})
    assert committed_steps(saves.directory) == [2]
    saves.close()
