"""Scores of responses against NumPy; DPO from the command line: it learns, and resumes with the same bits."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import __main__ as cli
from jaxllm import run
from jaxllm.config import InputError, build
from jaxllm.data.loader import RankedExample, make_ranked_batch_at
from jaxllm.life import Config
from jaxllm.models import lora, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.preference_losses import OBJECTIVES
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.sharding import activation, param_shardings
from jaxllm.stages import microbatches, preference, response_scores
from jaxllm.stages.config import DPOConfig, PreferenceConfig
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
        "ranks": np.array([[2, 1, 3], [1, 1, 2]], np.int32),
        "labels": np.zeros((B, K), np.int32),
    }


def oracle_logprobs(params, batch):
    """float64[B, K]: each row alone, without its padding; the softmax of the last layer in NumPy, a token at a time."""
    head = np.asarray(transformer.head(params), np.float64)
    sums = np.zeros((B, K))
    for b in range(B):
        for k in range(K):
            length = batch["segment_ids"][b, k].sum()
            if not length:
                continue  # there is no such response
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


def test_responses_have_both_models_logprobs_and_their_lengths(policy, reference, batch):
    arrays = jax.tree.map(jnp.array, batch)
    found = response_scores.policy_responses(policy, arrays, base={}, ref=reference, model=MODEL)
    np.testing.assert_allclose(found.logprobs, oracle_logprobs(policy, batch), rtol=2e-5)
    np.testing.assert_allclose(found.ref_logprobs, oracle_logprobs(reference, batch), rtol=2e-5)
    np.testing.assert_array_equal(found.lengths, batch["loss_mask"].sum(2))
    alone = response_scores.policy_responses(policy, arrays, base={}, model=MODEL)
    assert alone.ref_logprobs is None


def test_new_adapters_have_the_logprobs_of_the_reference(reference, batch):
    arrays = jax.tree.map(jnp.array, batch)
    config = lora.LoRAConfig(rank=2)
    adapters = lora.init(config, reference, jax.random.key(2), transformer.axes(MODEL))
    for params, base in ((reference, {}), (adapters, lora.frozen(config, reference))):
        found = response_scores.policy_responses(
            params, arrays, base=base, ref=reference, model=MODEL
        )
        np.testing.assert_allclose(found.logprobs, found.ref_logprobs, atol=1e-6)


def test_neither_the_reference_nor_the_kl_has_a_gradient(policy, reference, batch):
    arrays = jax.tree.map(jnp.array, batch)

    def of_reference(ref):
        return response_scores.policy_responses(
            policy, arrays, base={}, ref=ref, model=MODEL
        ).ref_logprobs.sum()

    def of_policy(params):
        return response_scores.unrelated_kl(params, arrays, base={}, ref=reference, model=MODEL)

    gradients = (jax.grad(of_reference)(reference), jax.grad(of_policy)(policy))
    for gradient in jax.tree.leaves(gradients):
        assert not gradient.any()


def unrelated_oracle(batch):
    """Rows of NumPy, one at a time: each prompt with the reply of the same number to the next prompt."""
    rows = {name: np.zeros_like(batch[name]) for name in ("tokens", "segment_ids", "loss_mask")}
    for b, k in np.ndindex(B, K):
        other = (b + 1) % B
        reply = batch["tokens"][other, k][batch["loss_mask"][other, k]]
        before = batch["tokens"][b, 0, : batch["loss_mask"][b, 0].argmax()]
        if len(reply):
            row = np.concatenate([before, reply])[:T]
            rows["tokens"][b, k, : len(row)] = row
            rows["segment_ids"][b, k, : len(row)] = 1
            rows["loss_mask"][b, k, len(before) : len(row)] = True
    return rows


def test_unrelated_pairs_are_prompts_with_responses_to_the_next_prompt(policy, reference, batch):
    """One response does not exist, and one no longer fits behind the longer prompt."""
    batch = {name: x.copy() for name, x in batch.items()}
    for name in ("tokens", "segment_ids", "loss_mask"):
        batch[name][0, 2] = 0
    batch["segment_ids"][0, 1], batch["loss_mask"][0, 1] = 1, np.arange(T) >= 3
    batch["loss_mask"][0, 1, T - 1] = True
    arrays, want = jax.tree.map(jnp.array, batch), unrelated_oracle(batch)
    found = response_scores.unrelated_pairs(arrays)
    for name, rows in want.items():
        np.testing.assert_array_equal(found[name], rows)
    assert want["loss_mask"][1, 1].sum() == batch["loss_mask"][0, 1].sum() - 1
    ratios = oracle_logprobs(policy, want) - oracle_logprobs(reference, want)
    kl = response_scores.unrelated_kl(policy, arrays, base={}, ref=reference, model=MODEL)
    np.testing.assert_allclose(kl, ratios.sum() / 5, rtol=1e-4)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_on_eight_devices_is_that_of_one(name, policy, reference):
    """Also KTO's pairs, which reach over the devices."""
    config, model = DPOConfig(loss=name, num_steps=1, batch_size=8), MODEL
    rng = np.random.default_rng(1)
    examples = []
    for number in range(8):
        prompt = rng.integers(2, 19, size=1 + number % 3).tolist()
        rows = [[*prompt, *rng.integers(2, 19, size=n)] for n in rng.integers(1, 6, size=3)]
        examples.append(RankedExample(rows, [2, 1, 3], len(prompt)))
    results = []
    for devices in (8, 1):
        mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
        place = lambda tree, mesh=mesh: jax.device_put(
            tree, param_shardings(mesh, transformer.abstract(model), transformer.axes(model))
        )
        with jax.set_mesh(mesh):
            step, _, layout = preference._program(mesh, "dpo", config, model, 1, 0)
            frozen = preference._frozen_params("dpo", config, place(reference))
            sharding = activation(mesh, "batch", None, None)
            batch_at = make_ranked_batch_at(examples, batch_size=8, seed=0, sharding=sharding)
            state = layout.init(jax.tree.map(jnp.copy, place(policy)))
            _, metrics = step(state, batch_at(0), **frozen)
        results.append({key: float(total) for key, (total, _) in metrics.items()})
    assert results[0]["grad_norm"] > 1e-4
    for key, value in results[0].items():
        np.testing.assert_allclose(value, results[1][key], rtol=1e-4, atol=1e-5, err_msg=key)


def labeled(labels):
    return [RankedExample([[1, 2]], [1], 1, labels=(label,)) for label in labels]


def test_accuracy_over_labels_is_over_all_prompts():
    scores = np.array([[0.1, 9.0], [0.3, 9.0], [0.2, 9.0]])
    ranks = np.array([[1, 0], [1, 0], [1, 0]])
    found = response_scores.held_out_metrics(scores, ranks, labeled([False, True, True]))
    assert (found["label_accuracy"], found["pairs"]) == (1.0, 0.0)
    found = response_scores.held_out_metrics(scores, ranks, labeled([True, True, False]))
    assert found["label_accuracy"] == 0.5
    # One kind alone has no pair.
    assert "label_accuracy" not in response_scores.held_out_metrics(
        scores, ranks, labeled([True] * 3)
    )


def test_the_best_checkpoint_goes_by_pairs_or_else_by_labels():
    assert preference._best_metric(labeled([True, False])) == "eval/label_accuracy"
    assert preference._best_metric(labeled([True])) == "eval/accuracy"
    pair = RankedExample([[1, 2], [1, 3]], [1, 2], 1)
    assert preference._best_metric([*labeled([True, False]), pair]) == "eval/accuracy"


def test_labels_of_one_kind_are_refused(tiny_run, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        kto_of_labels(tiny_run, tmp_path, monkeypatch, lambda number: True)
    assert "responses are desirable and 0 are undesirable; kto needs both" in spoken(capsys)


def test_kto_learns_labels_of_single_responses(tiny_run, tmp_path, monkeypatch, capsys):
    result = kto_of_labels(tiny_run, tmp_path, monkeypatch, lambda number: number % 2 == 0)
    assert "desirable and" in spoken(capsys)
    assert result["label_accuracy"] > 0.9
    assert result["pairs"] == 0


def kto_of_labels(tiny_run, tmp_path, monkeypatch, label):
    """The result of stage dpo on responses one by one: "good" for even prompts and "bad" for odd ones."""
    monkeypatch.chdir(ROOT)
    for stage in ("tokenizer", "sft"):
        shutil.copytree(tiny_run / stage, tmp_path / stage)
    lines = [
        {
            "prompt": f"Number {number}?",
            "response": ("good", "bad")[number % 2],
            "label": label(number),
            "split": ("train", "held_out")[number % 5 == 0],
        }
        for number in range(80)
    ]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "kto.yaml").write_text(
        f"extends: {ROOT}/configs/tiny.yaml\ndpo: {{data: {{sources: [{{path: {tmp_path}/labels.jsonl}}]}}}}"
    )
    flags = """
        --dpo.loss kto --dpo.batch-size 16 --dpo.num-steps 12 --dpo.eval-every 6 --dpo.optim.learning-rate 1e-3
    """
    cli.main(["dpo", str(tmp_path / "kto.yaml"), "--run-dir", str(tmp_path), *flags.split()])
    return json.loads((tmp_path / "dpo" / "result.json").read_text())


def spoken(capsys):
    return " ".join(capsys.readouterr().err.split())


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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "ipo", "label_smoothing": 0.1}, "dpo.label_smoothing: is read by loss dpo, not by ipo; remove it"),
        ({"loss": "simpo", "beta": 0.3}, "dpo.beta: is read by loss dpo or plackett_luce or ipo or kto, not by simpo"),
        ({"simpo_gamma": 0.3}, "dpo.simpo_gamma: is read by loss simpo, not by dpo"),
        ({"loss": "regression"}, "dpo.loss: "),
        ({"loss": "kto", "batch_size": 8, "num_micro": 8}, "dpo.batch_size: kto needs at least 2 prompts"),
    ],
)  # fmt: skip
def test_coefficients_of_another_objective_are_refused(fields, message):
    with pytest.raises(InputError) as error:
        build(Config, {"dpo": fields})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_loss_has_the_name_of_older_configs_too():
    assert build(Config, {"dpo": {"loss": "pairwise"}}).dpo.loss == "dpo"


def test_fewer_devices_never_leave_kto_a_prompt_alone(tmp_path):
    """8 prompts began on 8 devices, one on each. One device takes them in pairs, not one at a time."""
    config = build(Config, {"dpo": {"loss": "kto", "batch_size": 8}})
    many, one = (make_mesh(MeshConfig(), jax.devices()[:n]) for n in (8, 1))
    assert microbatches.fit(config, "dpo", many, tmp_path).dpo.num_micro == 1
    assert microbatches.fit(config, "dpo", one, tmp_path).dpo.num_micro == 4


PLANNED = {"vocab_size": 512, "max_length": 64, "num_layers": 2, "embed_dim": 64, "num_heads": 2}


def test_a_plan_has_a_reference_only_where_the_objective_has_one():
    """State, FLOPs, and those of the step itself: a reference is a forward pass of 3 more, KTO's KL two."""
    mesh = make_mesh(MeshConfig())
    flops, lowered, held = {}, {}, {}
    for name in OBJECTIVES:
        life = build(Config, {"model": PLANNED, "dpo": {"loss": name, "batch_size": 8}})
        with jax.set_mesh(mesh):
            (program,), held[name] = preference.plan(mesh, life, "dpo")
            step = program.run.lower(*program.arguments, **program.keywords)
        flops[name] = program.flops
        lowered[name] = step.cost_analysis()["flops"]
        assert ("ref" in program.keywords) == OBJECTIVES[name].has_reference
    forward = lowered["dpo"] - lowered["simpo"]
    assert forward > 0.15 * lowered["simpo"]
    for name, passes in {"dpo": 4, "ipo": 4, "kto": 6, "orpo": 3, "simpo": 3}.items():
        assert flops[name] == pytest.approx(flops["orpo"] * passes / 3)
        more = (passes - 3) * forward
        assert lowered[name] == pytest.approx(lowered["simpo"] + more, rel=0.02)
        assert ("reference" in held[name]) == (passes > 3)


def test_shared_fields_have_the_defaults_and_checks_of_the_stage():
    config = PreferenceConfig(num_steps=1)
    assert (config.log_every, config.eval_every, config.optim.learning_rate) == (5, 20, 1e-4)
    with pytest.raises(ValueError, match="num_micro: 3 does not divide batch_size 16"):
        PreferenceConfig(num_micro=3)


class Interrupted(Exception):
    pass


RATES = {"ipo": 1e-4}  # a square has larger gradients than a sigmoid


def run_dpo(directory, loss="dpo", interrupt_at=0):
    """`jaxllm dpo` in this process; with interrupt_at it ends in the evaluation after that step."""
    original = run.run_training

    def run_training(directory, title, training, *rest):
        def evaluate(step, state):
            if step == interrupt_at:
                raise Interrupted
            return training.evaluate(step, state)

        return original(directory, title, training._replace(evaluate=evaluate), *rest)

    flags = f"""
        --dpo.loss {loss} --dpo.num-steps 12 --dpo.log-every 2 --dpo.eval-every 4
        --dpo.checkpoint.save-every 4 --dpo.optim.learning-rate {RATES.get(loss, 1e-3)}
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run_training", run_training)
        cli.main(["dpo", "configs/tiny.yaml", "--run-dir", str(directory), *flags.split()])
    lines = (directory / "dpo" / "metrics.jsonl").read_text().splitlines()
    losses = [line["train/loss"] for line in map(json.loads, lines) if "train/loss" in line]
    return json.loads((directory / "dpo" / "result.json").read_text()), losses


# Where every reward is 0 the losses are log 2, (1 / (2 beta))^2 = 25 and 1/2; those without a reference begin anywhere.
FIRST_LOSS = {"dpo": 0.693, "ipo": 25.0, "kto": 0.5}


@pytest.mark.parametrize(
    "loss",
    [
        "dpo",
        "orpo",
        *(pytest.param(n, marks=pytest.mark.life) for n in ("ipo", "kto", "simpo")),
    ],
)
def test_dpo_learns_and_resumes_with_the_same_bits(loss, tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for name in ("complete", "interrupted"):
        (tmp_path / name).mkdir()
        for stage in ("tokenizer", "sft", "rank"):
            shutil.copytree(tiny_run / stage, tmp_path / name / stage)
    result, losses = run_dpo(tmp_path / "complete", loss)
    assert ("1 to 1.5 is advised" in " ".join(capsys.readouterr().err.split())) == (loss == "kto")
    assert len(losses) == 6
    assert losses[-1] < 0.95 * losses[0]
    if loss in FIRST_LOSS:
        assert losses[0] == pytest.approx(FIRST_LOSS[loss], rel=0.1)
    assert result["steps"] == 12
    assert 0.6 < result["accuracy"] <= 1
    assert result["pairs"] > 0
    assert set(result) >= {"loss", "top1_accuracy", "calibration_error", "accuracy_by_k"}

    with pytest.raises(Interrupted):
        run_dpo(tmp_path / "interrupted", loss, interrupt_at=8)
    checkpoints = tmp_path / "interrupted" / "dpo" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir() if path.name.isdigit()] == ["4"]
    resumed, same_losses = run_dpo(tmp_path / "interrupted", loss)
    assert same_losses == losses
    assert resumed["accuracy"] == result["accuracy"]
    assert resumed["loss"] == result["loss"]
    same_checkpoint(tmp_path / "complete" / "dpo", tmp_path / "interrupted" / "dpo")
