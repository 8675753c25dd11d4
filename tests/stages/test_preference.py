"""Scores of responses against NumPy; DPO from the command line: it learns, and resumes with the same bits."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import __main__ as cli
from jaxllm import run
from jaxllm.models import lora, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.stages import response_scores
from jaxllm.stages.config import PreferenceConfig
from jaxllm.stages.preference import _distance
from jaxllm.train import Guard, TrainState
from tests.conftest import ROOT
from tests.test_life import same_checkpoint

MODEL = ModelConfig(
    dtype="float32",
    vocab_size=19,
    num_layers=2,
    embed_dim=16,
    num_heads=2,
    num_kv_heads=1,
    mlp_dim=32,
    max_length=12,
)
B, K, T = 2, 3, 12


@pytest.fixture(scope="module")
def policy():
    return transformer.init(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def reference():
    return transformer.init(MODEL, jax.random.key(1))


@pytest.fixture(scope="module")
def batch():
    """K responses of 1 to 5 tokens to a prompt of 3 or 4; what is beyond the end is garbage of segment 0."""
    rng = np.random.default_rng(0)
    prompt_lengths = np.array([3, 4])[:, None, None]
    lengths = prompt_lengths + rng.integers(1, 6, (B, K, 1))
    positions = np.arange(T)[None, None]
    return {
        "tokens": rng.integers(0, MODEL.vocab_size, (B, K, T)).astype(np.int32),
        "segment_ids": (positions < lengths).astype(np.int32),
        "loss_mask": (positions >= prompt_lengths) & (positions < lengths),
    }


def oracle_logprobs(params, batch):
    """float64[B, K]: each row alone, without its padding; the softmax of the last layer in NumPy, a token at a time."""
    head = np.asarray(transformer.head(params), np.float64)
    sums = np.zeros((B, K))
    for b in range(B):
        for k in range(K):
            length = batch["segment_ids"][b, k].sum()
            tokens = batch["tokens"][b, k, :length]
            hidden = transformer.apply(
                params, MODEL, jnp.array(tokens[None]), jnp.ones((1, length), jnp.int32)
            )
            logits = np.asarray(hidden[0], np.float64) @ head.T
            for t in range(1, length):
                if batch["loss_mask"][b, k, t]:
                    before = logits[t - 1]
                    top = before.max()
                    total = top + np.log(np.exp(before - top).sum())
                    sums[b, k] += before[tokens[t]] - total
    return sums


def test_reply_logprobs_sum_over_the_reply_alone(policy, batch):
    found = response_scores.reply_logprobs(policy, jax.tree.map(jnp.array, batch), MODEL)
    np.testing.assert_allclose(found, oracle_logprobs(policy, batch), rtol=2e-5)


def test_implicit_rewards_are_beta_times_the_log_ratio(policy, reference, batch):
    rewards = response_scores.implicit_rewards(
        policy, jax.tree.map(jnp.array, batch), base={}, ref=reference, model=MODEL, beta=0.3
    )
    expected = 0.3 * (oracle_logprobs(policy, batch) - oracle_logprobs(reference, batch))
    np.testing.assert_allclose(rewards, expected, rtol=1e-4, atol=1e-5)


def test_implicit_rewards_of_the_reference_and_of_new_adapters_are_zero(reference, batch):
    arrays = jax.tree.map(jnp.array, batch)
    config = lora.LoRAConfig(rank=2)
    adapters = lora.init(config, reference, jax.random.key(2), transformer.axes(MODEL))
    for params, base in ((reference, {}), (adapters, lora.frozen(config, reference))):
        rewards = response_scores.implicit_rewards(
            params, arrays, base=base, ref=reference, model=MODEL, beta=0.3
        )
        np.testing.assert_allclose(rewards, np.zeros((B, K)), atol=1e-6)


def test_the_reference_gets_no_gradient(policy, reference, batch):
    arrays = jax.tree.map(jnp.array, batch)

    def total(ref):
        rewards = response_scores.implicit_rewards(
            policy, arrays, base={}, ref=ref, model=MODEL, beta=0.3
        )
        return rewards.sum()

    for gradient in jax.tree.leaves(jax.grad(total)(reference)):
        assert not gradient.any()


def test_distance_is_in_scores_and_in_ranks_where_there_are_none():
    batch = {
        "scores": jnp.array([[0.0, 0.0, 0.0], [2.0, 0.0, 5.0]]),
        "ranks": jnp.array([[1, 2, 2], [2, 3, 1]], jnp.int32),
    }
    expected = [
        [[0, 1, 1], [-1, 0, 0], [-1, 0, 0]],
        [[0, 2, -3], [-2, 0, -5], [3, 5, 0]],
    ]
    np.testing.assert_array_equal(_distance(batch), expected)


@pytest.mark.parametrize(
    ("how", "mean", "std"), [("center", 0.0, 2.5), ("unit", 0.0, 1.0), ("none", 4.0, 2.5)]
)
def test_normalized_scores_have_this_mean_and_deviation(how, mean, std):
    hidden = np.random.default_rng(0).normal(size=(40, 8))
    kernel = np.linalg.lstsq(hidden - hidden.mean(0), np.linspace(-1, 1, 40), rcond=None)[0]
    kernel *= 2.5 / (hidden @ kernel).std()
    bias = 4.0 - (hidden @ kernel).mean()
    head = {"kernel": jnp.array(kernel, jnp.float32), "bias": jnp.float32(bias)}
    state = TrainState(0, {"head": head}, (), Guard(0, 0, 0))
    old = hidden @ kernel + bias
    head = response_scores.normalize_scores(state, old, how).params["head"]
    new = hidden @ np.asarray(head["kernel"], np.float64) + float(head["bias"])
    np.testing.assert_allclose([new.mean(), new.std()], [mean, std], atol=1e-5)
    np.testing.assert_array_equal(np.argsort(new), np.argsort(old))


def test_shared_fields_have_the_defaults_and_checks_of_the_stage():
    config = PreferenceConfig(num_steps=1)
    assert (config.log_every, config.eval_every, config.optim.learning_rate) == (5, 20, 1e-4)
    with pytest.raises(ValueError, match="num_micro: 3 does not divide batch_size 16"):
        PreferenceConfig(num_micro=3)


class Interrupted(Exception):
    pass


def run_dpo(directory, interrupt_at=0):
    """`jaxllm dpo` in this process; with interrupt_at it ends in the evaluation after that step."""
    original = run.run_training

    def run_training(directory, title, training, *rest):
        def evaluate(step, state):
            if step == interrupt_at:
                raise Interrupted
            return training.evaluate(step, state)

        return original(directory, title, training._replace(evaluate=evaluate), *rest)

    flags = """
        --dpo.num-steps 12 --dpo.log-every 2 --dpo.eval-every 4 --dpo.checkpoint.save-every 4
        --dpo.optim.learning-rate 1e-3
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run_training", run_training)
        cli.main(["dpo", "configs/tiny.yaml", "--run-dir", str(directory), *flags.split()])
    lines = (directory / "dpo" / "metrics.jsonl").read_text().splitlines()
    losses = [line["train/loss"] for line in map(json.loads, lines) if "train/loss" in line]
    return json.loads((directory / "dpo" / "result.json").read_text()), losses


def test_dpo_learns_and_resumes_with_the_same_bits(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("complete", "interrupted"):
        (tmp_path / name).mkdir()
        for stage in ("tokenizer", "sft", "rank"):
            shutil.copytree(tiny_run / stage, tmp_path / name / stage)
    result, losses = run_dpo(tmp_path / "complete")
    # Before the first update the implicit rewards are 0, and the loss is log 2.
    assert len(losses) == 6
    assert losses[-1] < 0.6 < losses[0] < 0.72
    assert result["steps"] == 12
    assert 0.6 < result["accuracy"] <= 1
    assert result["pairs"] > 0
    assert set(result) >= {"loss", "top1_accuracy", "calibration_error", "accuracy_by_k"}

    with pytest.raises(Interrupted):
        run_dpo(tmp_path / "interrupted", interrupt_at=8)
    checkpoints = tmp_path / "interrupted" / "dpo" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir() if path.name.isdigit()] == ["4"]
    resumed, same_losses = run_dpo(tmp_path / "interrupted")
    assert same_losses == losses
    assert resumed["accuracy"] == result["accuracy"]
    assert resumed["loss"] == result["loss"]
    same_checkpoint(tmp_path / "complete" / "dpo", tmp_path / "interrupted" / "dpo")
