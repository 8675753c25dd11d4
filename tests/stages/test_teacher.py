"""Pretrain and sft with a teacher: what is kept is what it thinks, computed once, and a student that learns it reaches it."""

import dataclasses
import itertools
import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from jaxllm import losses, soft_targets
from jaxllm.config import InputError
from jaxllm.data import soft_targets as kept_targets
from jaxllm.data.config import DataConfig, Source
from jaxllm.model_store import write_model_card
from jaxllm.models import next_token, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.models.parts_config import LoRAConfig, MoEConfig
from jaxllm.runtime import checkpoint
from jaxllm.runtime.config import CheckpointConfig, MeshConfig
from jaxllm.runtime.goodput import Ledger
from jaxllm.runtime.mesh import make_mesh
from jaxllm.runtime.processes import Signals, Stopped
from jaxllm.stages import language_model, teacher
from jaxllm.stages.config import KeptTeacher, LanguageModelConfig
from jaxllm.tokenizers.trained import train
from jaxllm.workspace import Workspace

LENGTH, TOP_K = 24, 5
SMALL = ModelConfig(max_length=LENGTH, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=16, dtype="float32")  # fmt: skip
LARGER = dataclasses.replace(SMALL, num_layers=2, embed_dim=32, init_std=0.3, logit_softcap=5.0)


def a_text(number):
    return f"line number {number} of some text " + "and more " * (number % 3)


@pytest.fixture(scope="module")
def tokenizer():
    texts = map(a_text, range(200))
    return train(texts, vocab_size=300, model_type="bpe", character_coverage=1.0, num_threads=1)


def save_teacher(directory, tokenizer, model=LARGER, seed=0):
    """A stage directory with a model that nobody has trained; its parameters."""
    directory = epath.Path(directory)
    directory.mkdir(parents=True)
    model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    params = transformer.init(model, jax.random.key(seed))
    write_model_card(directory, model, "policy", ("params",))
    saves = checkpoint.Checkpoints(directory / "checkpoints", CheckpointConfig())
    saves.save_surely(1, {"params": params}, {})
    saves.close()
    tokenizer.save(directory / "tokenizer")
    return params, model


@pytest.fixture(scope="module")
def taught(tmp_path_factory, tokenizer):
    """(folder of the teacher, its parameters and config); beside it texts and conversations."""
    folder = tmp_path_factory.mktemp("taught")
    texts = [a_text(number) for number in range(40)]
    (folder / "texts.txt").write_text("\n".join(texts))
    chats = [json.dumps({"prompt": str(i), "response": f"yes {i}"}) for i in range(40)]
    (folder / "chats.jsonl").write_text("\n".join(chats))
    return folder, *save_teacher(folder / "teacher", tokenizer)


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


class Run:
    """A stage of a run directory, as `jaxllm run` builds it."""

    def __init__(
        self, run_dir, tokenizer, taught, stage="pretrain", mesh=None, model=SMALL, **more
    ):
        folder = taught[0]
        name = "texts.txt" if stage == "pretrain" else "chats.jsonl"
        data = DataConfig((Source(str(folder / name)),), held_out_fraction=0.3)
        self.stage = stage
        self.config = LanguageModelConfig(
            data=data, num_steps=4, batch_size=8, init_from=str(folder / "base") * (stage == "sft")
        )
        self.config = dataclasses.replace(
            self.config, teacher=KeptTeacher(str(folder / "teacher"), TOP_K), **more
        )
        self.mesh = mesh or one_device()
        self.model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
        run_dir = epath.Path(run_dir)
        self.workspace = Workspace(run_dir, self.mesh, 7, {}, Ledger(run_dir / "goodput.jsonl"))
        if not (run_dir / "tokenizer").exists():
            tokenizer.save(run_dir / "tokenizer" / "tokenizer")
        self.workspace.stage_dir(stage).mkdir(parents=True, exist_ok=True)
        if stage == "sft" and not (folder / "base").exists():
            save_teacher(folder / "base", tokenizer, SMALL, seed=1)

    def build(self):
        life = SimpleNamespace(model=self.model, seed=7, **{self.stage: self.config})
        with jax.set_mesh(self.mesh):
            return language_model.build(self.workspace, life, self.stage)

    def train(self, training, state=None, steps=4):
        """(state after each step, metrics of each step)."""
        states, metrics = [], []
        with jax.set_mesh(self.mesh):
            state = state or training.init()
            for number in range(int(state.step), steps):
                state, found = training.step(state, training.batch_at(number))
                states.append(jax.device_get(state))
                metrics.append({k: float(a) / max(float(b), 1.0) for k, (a, b) in found.items()})
        return states, metrics


def reference(params, model, tokens, segment_ids, position):
    """float64[V]: log-probabilities of the token at a position, of a segment by itself, uncached and unpacked."""
    begin = np.flatnonzero(segment_ids == segment_ids[position])[0]
    row = jnp.zeros((1, len(tokens)), jnp.int32).at[0, : position - begin].set(tokens[begin:position])  # fmt: skip
    hidden = jax.jit(transformer.apply, static_argnums=1)(params, model, row)
    state = np.asarray(hidden[0, position - begin - 1], np.float64)
    logits = np.asarray(transformer.head(params), np.float64) @ state
    logits = model.logit_softcap * np.tanh(logits / model.logit_softcap)
    return logits - np.log(np.exp(logits).sum())


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_what_is_kept_is_what_the_teacher_thinks_of_every_target(
    tmp_path, tokenizer, taught, stage
):
    run = Run(tmp_path / "run", tokenizer, taught, stage)
    training = run.build()
    _, params, model = taught
    batch = jax.device_get(training.batch_at(1))
    planned = next_token.planned_rows(run.mesh, 8, LENGTH, TOP_K)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in planned.items()
    }
    mask = batch["loss_mask"]
    assert 0.1 < mask.mean() < 1 and (batch["segment_ids"].max(1) > 1).any()
    for name in ("teacher_ids", "teacher_logprobs"):
        assert not batch[name][~mask].any() and batch[name][mask].any(-1).all()
    for row, position in np.argwhere(mask)[::7]:
        log_t = reference(params, model, batch["tokens"][row], batch["segment_ids"][row], position)
        ids = batch["teacher_ids"][row, position]
        assert sorted(ids) == sorted(np.argsort(-log_t)[:TOP_K])
        np.testing.assert_allclose(
            batch["teacher_logprobs"][row, position], log_t[ids], rtol=1e-4, atol=1e-5
        )


def test_the_step_is_planned_with_the_soft_targets():
    """Its batch has them, and its program reads them: with and without them it is another one."""
    model = dataclasses.replace(SMALL, vocab_size=300)
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    sizes = []
    for place in ("", "not/there/yet"):
        config = LanguageModelConfig(batch_size=8, teacher=KeptTeacher(place, TOP_K))
        with jax.set_mesh(mesh):
            (update,), _ = language_model.programs(mesh, "sft", config, model, 0)
            lowered = update.run.lower(*update.arguments, **update.keywords)
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(update.arguments[1])))
        assert ("8x24x5xf32" in lowered.as_text()) == bool(place)
    assert sizes[1] - sizes[0] == 2 * 8 * LENGTH * TOP_K
    with pytest.raises(InputError, match=r"sft\.teacher\.top_k: 301 tokens cannot be kept"):
        life = SimpleNamespace(sft=dataclasses.replace(config, teacher=KeptTeacher("x", 301)), model=model, seed=0)  # fmt: skip
        language_model.plan(mesh, life, "sft")


def test_the_next_start_finds_it_and_goes_on_with_the_same_bits(
    tmp_path, tokenizer, taught, monkeypatch
):
    run = Run(tmp_path / "run", tokenizer, taught, num_micro=2)
    states, metrics = run.train(first := run.build())
    assert all(np.isfinite(list(found.values())).all() for found in metrics)

    def refuse(*args):
        raise AssertionError("the teacher is loaded again")

    monkeypatch.setattr(teacher, "load_model", refuse)
    again = run.build()
    assert again.data == first.data
    resumed, _ = run.train(again, jax.tree.map(jnp.asarray, states[1]))
    assert len(resumed) == 2
    for a, b in zip(*map(jax.tree.leaves, (resumed[-1], states[-1])), strict=True):
        np.testing.assert_array_equal(a, b)


def folders(run):
    return sorted(path.name for path in (run.workspace.run_dir / "cache").glob("teacher-*"))


def test_a_pass_that_is_cut_leaves_whole_parts_and_goes_on(
    tmp_path, tokenizer, taught, monkeypatch
):
    whole = Run(tmp_path / "whole", tokenizer, taught).build()
    # Parts of two rows each.
    monkeypatch.setattr(kept_targets, "_PART_BYTES", 2 * LENGTH * TOP_K * 6 + 1)
    run, seen = Run(tmp_path / "run", tokenizer, taught), []
    keep = teacher._keep_part

    def count(workspace, part, program, batch_size):
        seen.append(part.number)
        keep(workspace, part, program, batch_size)

    monkeypatch.setattr(teacher, "_keep_part", count)
    write = kept_targets.np.cumsum

    def killed(counts, **how):
        if len(seen) == 3:  # while the third part is being written
            raise KeyboardInterrupt
        return write(counts, **how)

    monkeypatch.setattr(kept_targets.np, "cumsum", killed)
    with pytest.raises(KeyboardInterrupt):
        run.build()
    monkeypatch.setattr(kept_targets.np, "cumsum", write)
    done = folders(run)
    assert len(done) == 2 and len(seen) == 3
    # A signal ends it between two parts.
    stopped = dataclasses.replace(run.workspace, signals=Signals())
    stopped.signals.received = "SIGTERM"
    run.workspace, unsignalled = stopped, run.workspace
    with pytest.raises(Stopped, match="the teacher has seen 1 of"):
        run.build()
    run.workspace = unsignalled
    assert len(folders(run)) == 3 and len(seen) == 4
    # Half a file is not taken for a whole one.
    kept = run.workspace.run_dir / "cache" / done[0] / "kept"
    kept.write_bytes(kept.read_bytes()[:-8])
    training = run.build()
    assert len(seen) - 4 == len(folders(run)) - 2
    for number in range(4):
        for a, b in zip(
            *(jax.tree.leaves(jax.device_get(t.batch_at(number))) for t in (whole, training)),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_what_is_kept_is_named_by_the_teachers_values(tmp_path, tokenizer, taught):
    run = Run(tmp_path / "run", tokenizer, taught)
    first, before = run.build().data, folders(run)
    # The same weights elsewhere are the same teacher, other weights in the same place are another one.
    for name, seed in (("moved", 0), ("other", 1)):
        save_teacher(tmp_path / name, tokenizer, seed=seed)
        run.config = dataclasses.replace(
            run.config, teacher=KeptTeacher(str(tmp_path / name), TOP_K)
        )
        same = run.build().data == first
        assert same == (name == "moved") == (folders(run) == before)
    run.config = dataclasses.replace(run.config, teacher=KeptTeacher(str(tmp_path / "moved"), 3))
    assert run.build().data != first
    run.config = dataclasses.replace(run.config, teacher=KeptTeacher())
    plain = run.build()
    assert "teacher_ids" not in plain.batch_at(0) and plain.best == "eval/bits_per_byte"


def test_evaluation_gives_the_usual_loss_and_the_divergence(tmp_path, tokenizer, taught):
    run = Run(tmp_path / "run", tokenizer, taught)
    training = run.build()
    run.config = dataclasses.replace(run.config, teacher=KeptTeacher())
    plain = run.build()
    with jax.set_mesh(run.mesh):
        state = training.init()
        found, usual = (each.evaluate(4, state) for each in (training, plain))
    assert found.keys() - usual.keys() == {training.best} == {"eval/divergence"}
    for name, value in usual.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6)
    assert found["eval/divergence"] > 0


SPARSE = dataclasses.replace(
    SMALL,
    vocab_size=40,
    mtp_modules=1,
    logit_softcap=3.0,
    moe=MoEConfig(num_experts=4, per_token=2, mlp_dim=8, aux_coef=0.1),
)


def rows_with_teacher(vocab, batch=8):
    rng = np.random.default_rng(0)
    shape = (batch, LENGTH)
    logits = rng.normal(size=(*shape, vocab))
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.argsort(-logits, axis=-1)[..., :TOP_K]
    plain = {
        "tokens": rng.integers(0, vocab, shape).astype(np.int32),
        "segment_ids": np.sort(rng.integers(1, 4, shape)).astype(np.int32),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape),
        "loss_mask": rng.random(shape) < 0.7,
    }
    of_teacher = {
        "teacher_ids": ids.astype(np.int32),
        "teacher_logprobs": np.take_along_axis(logits, ids, -1).astype(np.float32),
    }
    return plain, plain | of_teacher


def test_experts_and_mtp_modules_keep_their_terms():
    plain, with_teacher = rows_with_teacher(SPARSE.vocab_size)
    params = transformer.init(SPARSE, jax.random.key(0))
    loss = jax.jit(
        lambda batch: next_token.loss(
            params, batch, None, {}, model=SPARSE, mtp_coef=0.5, teacher_weight=0.7
        )
    )
    (usual, count, before), (total, same, found) = map(loss, (plain, with_teacher))
    assert count == same and found.keys() - before.keys() == {"divergence"}
    assert {"mtp_loss"} < before.keys()
    for name, pair in before.items():
        np.testing.assert_allclose(found[name], pair, rtol=1e-5)
    nats, divergence = before["loss"][0], found["divergence"][0]
    np.testing.assert_allclose(total - usual, 0.7 * (divergence - nats), rtol=1e-4)


@pytest.mark.parametrize(
    ("more", "sizes"),
    [({"lora": LoRAConfig(rank=2)}, {}), ({"num_micro": 2}, {"data": 2, "tensor": 2})],
    ids=["adapters", "mesh and microbatches"],
)
def test_it_learns_with_adapters_microbatches_and_on_a_mesh(
    tmp_path, tokenizer, taught, more, sizes
):
    """On four devices in microbatches, as on one device at once; of adapters only they change."""
    mesh = make_mesh(MeshConfig(data=sizes.get("data", 1), tensor=sizes.get("tensor", 1)), jax.devices()[: 4 if sizes else 1])  # fmt: skip
    optim = dataclasses.replace(LanguageModelConfig().optim, learning_rate=3e-2, warmup_steps=0)
    run = Run(tmp_path / "run", tokenizer, taught, "sft", mesh, optim=optim, **more)
    training = run.build()
    states, metrics = run.train(training)
    with jax.set_mesh(mesh):
        before, after = (training.evaluate(4, state) for state in (training.init(), states[-1]))
    assert after["eval/divergence"] < 0.99 * before["eval/divergence"]
    if sizes:
        alone = Run(tmp_path / "alone", tokenizer, taught, "sft", optim=optim)
        _, expected = alone.train(alone.build())
        for a, b in zip(metrics, expected, strict=True):
            for name in ("loss", "divergence", "grad_norm"):
                np.testing.assert_allclose(a[name], b[name], rtol=2e-4)
    else:
        assert {"lora"} == states[0].params.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 301}, r"pretrain\.teacher\.top_k: 301 tokens cannot be kept of a vocabulary of"),
        ({"stage_dir": "no/such"}, r"no/such: is not the directory of a trained stage"),
        ({"vocabulary": True}, r"pretrain\.teacher\.stage_dir: .* another tokenizer or vocabulary"),
        (
            {"context": True},
            r"pretrain\.teacher\.stage_dir: .* 24 tokens exceed model\.max_length 8",
        ),
    ],
    ids=["top_k", "place", "vocabulary", "context"],
)
def test_a_teacher_that_cannot_teach_is_one_line(tmp_path, tokenizer, taught, change, message):
    run = Run(tmp_path / "run", tokenizer, taught)
    place = change.get("stage_dir", str(taught[0] / "teacher"))
    if "vocabulary" in change:
        other = train(iter(["another text"] * 9), vocab_size=290, model_type="bpe", character_coverage=1.0, num_threads=1)  # fmt: skip
        save_teacher(place := str(tmp_path / "other"), other)
    if "context" in change:
        short = dataclasses.replace(LARGER, max_length=8)
        save_teacher(place := str(tmp_path / "short"), tokenizer, short)
    run.config = dataclasses.replace(
        run.config, teacher=KeptTeacher(place, change.get("top_k", TOP_K))
    )
    with pytest.raises(InputError, match=message):
        run.build()


# --- A world in which every text is known.

VOCAB, STEPS = 3, 200
WORLD = dataclasses.replace(SMALL, vocab_size=VOCAB, max_length=3, embed_dim=32)


def all_texts() -> dict[str, Any]:
    """Every text of three tokens, one a row: {tokens, segment_ids, positions, loss_mask}."""
    tokens = np.array([*itertools.product(range(VOCAB), repeat=3)], np.int32)
    positions = np.broadcast_to(np.arange(3, dtype=np.int32), tokens.shape)
    return {
        "tokens": tokens,
        "segment_ids": np.ones_like(tokens),
        "positions": positions,
        "loss_mask": positions > 0,
    }


def probabilities(params, model):
    """float64[rows, 2, V]: of the second and the third token."""
    texts = all_texts()
    hidden = transformer.apply(params, model, texts["tokens"])[:, :2]
    logits = np.asarray(hidden, np.float64) @ np.asarray(transformer.head(params), np.float64).T
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def distance(top_k):
    """Total variation of teacher and student after training, the tokens that are not kept counted as one; the worst."""
    model = dataclasses.replace(WORLD, num_layers=2, embed_dim=48, init_std=0.2)
    teacher_params = transformer.init(model, jax.random.key(1))
    kept = next_token.soft_targets(teacher_params, all_texts(), model=model, top_k=top_k)
    batch = {**all_texts(), "teacher_ids": kept.ids, "teacher_logprobs": kept.logprobs}
    params = transformer.init(WORLD, jax.random.key(0))
    tx = optax.adam(optax.linear_schedule(1e-2, 0.0, STEPS), b2=0.99)

    @jax.jit
    def learn(params, opt_state):
        def step(_, both):
            mean = lambda p: losses_of(p)[0] / losses_of(p)[1]
            losses_of = lambda p: next_token.loss(p, batch, None, {}, model=WORLD)
            with jax.numpy_dtype_promotion("standard"):
                updates, opt_state = tx.update(jax.grad(mean)(both[0]), both[1])
            return optax.apply_updates(both[0], updates), opt_state

        return jax.lax.fori_loop(0, STEPS, step, (params, opt_state))

    trained, _ = learn(params, tx.init(params))
    found = []
    for each in (params, trained):
        p, q = probabilities(teacher_params, model), probabilities(each, WORLD)
        order = np.argsort(-p, axis=-1)
        apart = np.take_along_axis(q - p, order, -1)
        rest = apart[..., top_k:].sum(-1, keepdims=True)
        apart = np.concatenate([apart[..., :top_k], rest], axis=-1)
        found.append(np.abs(apart).sum(-1).max() / 2)
    return found


@pytest.mark.usefixtures("compiled_well")
@pytest.mark.parametrize("top_k", [2, VOCAB])
def test_a_student_that_can_represent_the_teacher_reaches_it(top_k):
    start, end = distance(top_k)
    assert start > 0.2 and end < 0.01


@pytest.mark.usefixtures("compiled_well")
def test_without_the_remainder_it_is_missed(monkeypatch):
    """Over the kept tokens alone the best student gives them all of its probability."""
    right = soft_targets._outcomes
    without = lambda kept, size: (right(kept, size)[0], jnp.zeros(kept.ids.shape[:2]))
    monkeypatch.setattr(soft_targets, "_outcomes", without)
    assert distance(2)[1] > 0.05


def test_shift_and_unshift_undo_each_other():
    x = jnp.arange(2 * 4 * 3).reshape(2, 4, 3)
    np.testing.assert_array_equal(losses.shift(losses.unshift(x))[:, :-1], x[:, :-1])
    np.testing.assert_array_equal(losses.unshift(losses.shift(x))[:, 1:], x[:, 1:])
    tokens, segments = jnp.array([[5, 6, 7]]), jnp.ones((1, 3), jnp.int32)
    targets, mask = losses.next_token_targets(tokens, segments, jnp.array([[False, True, True]]))
    np.testing.assert_array_equal(targets, losses.shift(tokens))
    assert mask.tolist() == [[True, True, False]]
