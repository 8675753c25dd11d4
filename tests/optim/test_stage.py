"""Every kind of optimizer in the real pretrain stage: resumed with the same bits, and the model that later stages load."""

import json
import shutil

import jax
import numpy as np
import pytest

import jaxllm.__main__ as cli
from jaxllm import run
from jaxllm.model_store import load_model
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from tests.conftest import ROOT
from tests.optim.reference import KINDS
from tests.test_life import newest_checkpoint, same_checkpoint


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A run directory with a tokenizer."""
    directory = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        cli.main(["tokenizer", "configs/tiny.yaml", "--run-dir", str(directory)])
    return directory


@pytest.fixture
def new_run(prepared, tmp_path, monkeypatch):
    """name -> a directory in which `pretrain` can be run."""
    monkeypatch.chdir(ROOT)

    def make(name):
        shutil.copytree(prepared, tmp_path / name)
        return tmp_path / name

    return make


def pretrain(directory, kind, *flags, interrupt_at=0):
    """`jaxllm pretrain` in this process; with interrupt_at it ends in the evaluation after that step."""
    original = run.run_training

    def run_training(directory, title, training, *rest):
        def evaluate(step, state):
            if step == interrupt_at:
                raise Interrupted
            return training.evaluate(step, state)

        return original(directory, title, training._replace(evaluate=evaluate), *rest)

    fixed = f"""
        --model.num-layers 1 --model.embed-dim 32 --model.mlp-dim 32 --pretrain.num-steps 6
        --pretrain.batch-size 8 --pretrain.log-every 2 --pretrain.eval-every 4 --pretrain.eval-batches 1
        --pretrain.checkpoint.save-every 2 --pretrain.optim.kind {kind} --pretrain.optim.basis-every 2
        --pretrain.optim.schedule constant --pretrain.optim.warmup-steps 2
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run_training", run_training)
        words = ["pretrain", "configs/tiny.yaml", "--run-dir", str(directory)]
        cli.main([*words, *fixed.split(), *flags])
    return json.loads((directory / "pretrain" / "result.json").read_text())


# Of a base half as wide and twice as deep: parameters have their own learning rates.
SCALED = ("--model.scaling.base-width", "16", "--model.scaling.base-depth", "2")
SLOWER = [pytest.param(kind, (), marks=pytest.mark.life) for kind in KINDS if kind != "muon"]


@pytest.mark.parametrize(("kind", "flags"), [("muon", ()), ("adamw", SCALED), *SLOWER])
def test_resumed_with_the_same_bits(kind, flags, new_run):
    whole, interrupted = new_run("whole"), new_run("interrupted")
    result = pretrain(whole, kind, *flags)
    with pytest.raises(Interrupted):
        pretrain(interrupted, kind, *flags, interrupt_at=4)
    assert newest_checkpoint(interrupted / "pretrain")[0] == 2
    assert pretrain(interrupted, kind, *flags)["norm"] == result["norm"]
    same_checkpoint(whole / "pretrain", interrupted / "pretrain")


def test_the_model_of_schedule_free_is_the_average(new_run):
    """What the checkpoint calls params was evaluated, and is loaded; it is not where the last gradient was taken."""
    directory = new_run("averaged")
    result = pretrain(directory, "schedule_free")
    params, _ = load_model(directory / "pretrain", make_mesh(MeshConfig()))
    norm = lambda tree: np.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in tree))
    loaded = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    assert abs(norm(loaded) / result["norm"] - 1) < 1e-6
    _, leaves = newest_checkpoint(directory / "pretrain")
    z = {name: leaf for name, leaf in leaves.items() if "unaveraged" in name}
    assert len(z) == len(loaded)
    for name, leaf in z.items():
        average = leaves["['params']" + name.split("['unaveraged']")[1]]
        assert np.abs(average - leaf).max() > 1e-5, name


@pytest.mark.life
@pytest.mark.parametrize(("kind", "scaled"), [("muon", ()), ("soap", ()), ("adamw", SCALED)])
def test_adapters_and_microbatches(kind, scaled, new_run):
    """A matrix's adapters a and b are matrices: both learn, although the gradient of a is 0 at first."""
    start = new_run("adapters")
    pretrain(start, "adamw", *scaled)
    flags = f"""
        --sft.lora.rank 4 --sft.num-micro 2 --sft.num-steps 4 --sft.batch-size 16 --sft.eval-every 4
        --sft.eval-batches 1 --sft.optim.kind {kind} --model.num-layers 1 --model.embed-dim 32 --model.mlp-dim 32
    """
    cli.main(["sft", "configs/tiny.yaml", "--run-dir", str(start), *flags.split(), *scaled])
    step, leaves = newest_checkpoint(start / "sft")
    assert step == 4
    adapters = {name: leaf for name, leaf in leaves.items() if name.startswith("['params']")}
    assert len(adapters) == 2 * 7
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in adapters.values())
