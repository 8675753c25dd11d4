"""On-policy distillation reaches its teachers, where the policy can represent them, and with one mistake does not.

Every response is listed, prompts are padded, responses end early or never, at temperature 0.7. The divergence is taken in
every state by itself, so that a policy that can represent any distribution rests, in each state, at its minimum: of one
teacher at the teacher, of several and reverse_kl at their normalized geometric mean, of several and forward_kl at their
mean. All of it, with its figures:

    python -m pytest tests/stages/test_distillation.py -m "slow or not slow" -n 0 -s
"""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from jaxllm.config import InputError
from jaxllm.engine.config import SamplingConfig
from jaxllm.model_store import write_model_card
from jaxllm.models import transformer
from jaxllm.models.config import ModelConfig
from jaxllm.optim_config import OptimConfig
from jaxllm.rl import distillation, layouts, roles, update
from jaxllm.rl.config import DISTILL, RoleMesh, TeacherConfig
from jaxllm.rl.experience import Experience
from jaxllm.rl.objectives import actor_loss
from jaxllm.rl.reward_config import RewardSource
from jaxllm.runtime.mesh import make_mesh
from tests.stages import worlds
from tests.stages.fixed_points import Table, total_variation

compiled_well = pytest.mark.usefixtures("compiled_well")
slow = pytest.mark.slow

LIMIT = 0.01  # total variation
ONE = dataclasses.replace(
    DISTILL,
    num_steps=200,
    batch_size=128,
    max_prompt_length=4,
    sampling=SamplingConfig(3, 0.7),
    actor=OptimConfig(
        learning_rate=5e-3,
        schedule="linear",
        final_fraction=0.0,
        weight_decay=0.0,
        eps=1e-6,
        b2=0.99,
    ),
)
WEIGHTS = (0.7, 0.3)
TWO = dataclasses.replace(
    ONE,
    teachers=tuple(TeacherConfig(name, weight) for name, weight in zip("ab", WEIGHTS, strict=True)),
)
# Another width and depth than the policy's, and sure of what it says.
OTHER: dict[str, Any] = {"embed_dim": 32, "num_layers": 2, "init_std": 0.5}


def make_world(config, devices=1, **more):
    teachers = (OTHER, {**OTHER, "embed_dim": 48})[: len(config.teachers)]
    size = {"vocab": 3, "length": 3, "layers": 1, "devices": devices, **more}
    return worlds.World(config, seed=0, teachers=teachers, **size)


def probs(world, params, model, prompt):
    return np.exp(world.space.logprobs(params, model, prompt, 0.7))


def rest(world, prompt):
    """Probabilities float64[N] of the responses where the loss is smallest."""
    config, table = world.config, Table(world.space)
    each = [
        probs(world, jax.device_get(params), model, prompt)
        for params, model in zip(world.teachers, world.spec.teachers, strict=True)
    ]
    if len(each) == 1:
        return each[0]
    logits = [table.logits_of(p) for p in each]
    logs = np.stack([table.policy(rows).steps for rows in logits])
    weights = np.array([teacher.weight for teacher in config.teachers])[:, None, None]
    if config.divergence == "reverse_kl":
        mixed = (weights * logs).sum(0) / weights.sum()
    else:
        mixed = np.log((weights * np.exp(logs)).sum(0) / weights.sum())
    return table.policy(mixed).probs


def farthest(world, params, points):
    return max(
        total_variation(probs(world, params, world.model, prompt), point)
        for prompt, point in zip(worlds.PROMPTS, points, strict=True)
    )


def reached(config, name):
    """Total variation of the trained policy to where it should rest."""
    world = make_world(config)
    points = [rest(world, prompt) for prompt in worlds.PROMPTS]
    start, end = (farthest(world, params, points) for params in (world.ref, world.train()))
    print(
        f"\n{len(config.teachers)} teachers, {config.divergence}, {name}: "
        f"total variation {start:.3f} -> {end:.4f}",
        flush=True,
    )
    assert start > 0.2  # there was something to learn
    return end


@compiled_well
@pytest.mark.parametrize(
    ("config", "divergence"),
    [
        pytest.param(ONE, "reverse_kl", marks=slow, id="one teacher, reverse_kl"),
        pytest.param(ONE, "forward_kl", marks=slow, id="one teacher, forward_kl"),
        pytest.param(ONE, "jsd", id="one teacher, jsd", marks=pytest.mark.life),
        pytest.param(TWO, "reverse_kl", id="two teachers, reverse_kl"),
        pytest.param(TWO, "forward_kl", id="two teachers, forward_kl"),
    ],
)
def test_a_policy_that_can_represent_its_teachers_reaches_them(config, divergence):
    assert reached(dataclasses.replace(config, divergence=divergence), "no mistake") <= LIMIT


_right, _right_hidden = distillation.token_divergences, update.teacher_hidden


def _swapped(student, teacher, *, kind, **more):
    return _right(student, teacher, kind="reverse_kl", **more)


def _at_temperature_one(student, teacher, *, temperature, **more):
    return _right(student, teacher, **more)


def _one_token_late(run, programs, frozen, rollout):
    return tuple(
        jnp.roll(states, 1, axis=1) for states in _right_hidden(run, programs, frozen, rollout)
    )


def _of_other_rows(run, programs, frozen, rollout):
    return tuple(
        jnp.roll(states, 1, axis=0) for states in _right_hidden(run, programs, frozen, rollout)
    )


MISTAKES = {
    "arguments swapped": (distillation, "token_divergences", _swapped),
    "no temperature": (distillation, "token_divergences", _at_temperature_one),
    "teacher one token late": (update, "teacher_hidden", _one_token_late),
    "teacher of other rows": (update, "teacher_hidden", _of_other_rows),
}


@slow
@compiled_well
@pytest.mark.parametrize("mistake", [*MISTAKES, "weights ignored"])
def test_with_one_mistake_the_teachers_are_missed(mistake, monkeypatch):
    config = dataclasses.replace(TWO, divergence="forward_kl")
    world = make_world(config)
    points = [rest(world, prompt) for prompt in worlds.PROMPTS]
    if mistake in MISTAKES:
        monkeypatch.setattr(*MISTAKES[mistake])
    else:
        even = tuple(dataclasses.replace(teacher, weight=0.5) for teacher in config.teachers)
        world = make_world(dataclasses.replace(config, teachers=even))
    end = farthest(world, world.train(), points)
    print(f"\nmistake: {mistake}: total variation {end:.4f}", flush=True)
    assert end > LIMIT


def test_the_loss_is_the_weighted_divergence_of_the_responses_and_the_gradient_is_the_students():
    """In float64, from the whole distributions, of two teachers of other widths; padding does not count."""
    world = make_world(dataclasses.replace(TWO, loss_mean="response"))
    spec, space = world.spec, world.space
    rows = len(space.rows)
    tokens = jnp.concatenate([jnp.array([worlds.PROMPTS[1]] * rows), space.tokens], axis=1)
    zeros = jnp.zeros(space.tokens.shape)
    batch = Experience(
        tokens=tokens.astype(jnp.int32),
        prompt_mask=jnp.ones((rows, 3), bool),
        mask=jnp.array(space.mask),
        old_logprobs=zeros,
        ref_logprobs=zeros,
        old_values=zeros,
        advantages=zeros,
        returns=zeros,
    )
    models = list(zip(world.teachers, spec.teachers, strict=True))
    hidden = [distillation.rollouts.response_hidden(p, batch, m) for p, m in models]
    heads = tuple(transformer.head(p) for p, _ in models)
    batch = batch._replace(teacher_hidden=tuple(hidden))
    loss = functools.partial(actor_loss, spec=spec)
    total, weight, metrics = loss(world.ref, batch, None, {}, heads)

    def log_probs(params, model):
        states = transformer.apply(params, model, batch.tokens)[:, 2:-1]
        logits = np.einsum("btd,vd->btv", states, transformer.head(params), dtype=np.float64) / 0.7
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    s = log_probs(world.ref, world.model)
    nats = sum(
        weight * (np.exp(s) * (s - log_probs(params, model))).sum(-1)
        for weight, (params, model) in zip(WEIGHTS, models, strict=True)
    )
    each = np.where(space.mask, nats, 0.0)
    want = (each / space.mask.sum(1, keepdims=True)).sum()
    np.testing.assert_allclose(total, want, rtol=1e-4)
    assert float(weight) == rows
    mean = each.sum() / space.mask.sum()
    np.testing.assert_allclose(metrics["divergence"][0] / metrics["divergence"][1], mean, rtol=1e-4)
    # A small step against the gradient makes the loss smaller by as much as the gradient says.
    gradient = jax.grad(lambda params: loss(params, batch, None, {}, heads)[0])(world.ref)
    square = sum(float(jnp.square(leaf).sum()) for leaf in jax.tree.leaves(gradient))
    step = 1e-2 / square

    def after(size):
        moved = jax.tree.map(lambda p, g: p - size * g, world.ref, gradient)
        return float(loss(moved, batch, None, {}, heads)[0])

    ahead, behind = after(step), after(-step)
    assert (behind - ahead) / 2 == pytest.approx(1e-2, rel=0.05)


QUICK = dataclasses.replace(TWO, num_steps=4, batch_size=32, divergence="jsd")


@pytest.mark.parametrize(
    "more",
    [
        {},
        pytest.param(
            {
                "rewards": (RewardSource("tests.stages.worlds:reward_of"),),
                "advantages": "rloo",
                "num_responses": 4,
                "kl_coef": 0.1,
                "num_minibatches": 2,
                "num_micro": 2,
            },
            marks=pytest.mark.life,
        ),
    ],
    ids=["teachers alone", "with a reward"],
)
def test_a_resumed_run_has_the_same_bits(more):
    world, states = make_world(dataclasses.replace(QUICK, **more)), {}

    def keep(name, number, metrics, state):
        assert all(np.isfinite(value) for value in metrics.values())
        assert ("ppo/score" in metrics) == bool(more) and metrics["ppo/divergence"] > 0
        states[name, number] = jax.device_get(state)

    world.train(watch=functools.partial(keep, "first"))
    world.train(watch=functools.partial(keep, "resumed"), resume=states["first", 1])
    assert ("resumed", 1) not in states
    for a, b in zip(
        *(jax.tree.leaves(states[name, 3]) for name in ("first", "resumed")), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.life
def test_one_device_and_eight_with_teachers_laid_out_otherwise_make_the_same_update(monkeypatch):
    monkeypatch.setattr(
        layouts, "planned_mesh", lambda layout, devices: make_mesh(layout, devices[::-1])
    )
    after = []
    for devices, meshes in ((1, ()), (8, (RoleMesh(role="teacher", data=2, fsdp=2, tensor=2),))):
        world = make_world(dataclasses.replace(QUICK, meshes=meshes), devices, vocab=4)
        assert bool(meshes) == bool(world.moved_heads)
        seen = {}
        world.train(2, lambda number, metrics, state, seen=seen: seen.update(m=metrics, s=state))
        after.append(seen)
    np.testing.assert_allclose(*(seen["m"]["ppo/divergence"] for seen in after), rtol=1e-4)
    moments = (jax.tree.leaves(seen["s"].actor.opt_state) for seen in after)
    for a, b in zip(*moments, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"teachers": ()}, "rewards: name at least one source, or teachers"),
        ({"kl_coef": 0.1}, "kl_coef: the KL is weighed against rewards"),
        ({"teachers": (TeacherConfig("a"),) * 2}, "teachers: a is given twice"),
        ({"sampling_rounds": 2, "num_responses": 2}, "sampling_rounds: "),
        ({"meshes": (RoleMesh(role="critic"),)}, "no separate critic"),
        (
            {
                "teachers": (),
                "rewards": (RewardSource(),),
                "meshes": (RoleMesh(role="teacher"),),
            },
            "there is no teacher",
        ),
    ],
)
def test_what_makes_no_sense_is_one_line(more, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DISTILL, **more)


def test_a_teacher_whose_tokens_mean_something_else_is_refused(tmp_path, monkeypatch):
    policy = ModelConfig(vocab_size=300, max_length=16)
    tokenizer = lambda name: SimpleNamespace(fingerprint=name)
    workspace = SimpleNamespace(tokenizer=lambda: tokenizer("ours"))
    for vocab_size, name in ((300, "ours"), (300, "theirs"), (310, "ours")):
        model = dataclasses.replace(policy, vocab_size=vocab_size)
        write_model_card(epath.Path(tmp_path), model, "policy", ("params",))
        monkeypatch.setattr(roles, "load_tokenizer", lambda path, name=name: tokenizer(name))
        check = functools.partial(
            roles.check_vocabulary, workspace, "ppo.teachers", str(tmp_path), policy
        )
        if (vocab_size, name) == (300, "ours"):
            check()
            continue
        with pytest.raises(InputError, match=r"ppo\.teachers: .* another tokenizer or vocabulary"):
            check()
