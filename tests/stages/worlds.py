"""Small worlds for the reinforcement-learning stages: a tokenizer of few tokens, and a run of the real stage on them."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.data.loader import PromptExample, make_prompt_batch_at
from jaxllm.models import scalar, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.rl import roles
from jaxllm.rl.config import PPOConfig
from jaxllm.rl.layouts import role_meshes
from jaxllm.rl.programs import build_programs
from jaxllm.rl.roles import (
    FrozenModels,
    RunSpec,
    abstract_state,
    initial_critic,
    initial_state,
    split_trainable,
    with_value_head,
)
from jaxllm.rl.scoring import end_at_strings, make_scorer
from jaxllm.rl.update import HostWork, make_step, passes_kl_limit
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.sharding import activation, param_shardings
from jaxllm.stages import reinforce

PROMPTS = [[2], [0, 0, 2]]  # of two lengths: one is padded; neither goes on as the other begins
REWARDS: dict[
    tuple[str, str], float
] = {}  # (prompt, response without its end) -> reward, for `reward_of`


@dataclasses.dataclass(frozen=True)
class Letters:
    """A tokenizer of few tokens: id 0 is "a"; 1 ends a response. Padding is token 0, which is also an ordinary one."""

    pad_id: int = 0
    end_id: int = 1
    eos_id: int = 1
    stop_ids: tuple[int, ...] = (1, 1)

    def decode(self, ids):
        return "".join(chr(ord("a") + i) for i in ids)


LETTERS = Letters()


def reward_of(prompt, response, answer):
    del answer
    return REWARDS[prompt, response]


class Responses:
    """Every response of at most `length` tokens over `vocab` tokens; those of full length may lack the end."""

    def __init__(self, vocab: int, length: int):
        others = [t for t in range(vocab) if t != LETTERS.end_id]
        bodies = [b for n in range(length + 1) for b in itertools.product(others, repeat=n)]
        self.rows = [(*b, LETTERS.end_id) if len(b) < length else b for b in bodies]
        self.texts = [LETTERS.decode(b) for b in bodies]
        self.finished = np.array([len(b) < length for b in bodies])
        self.tokens = np.zeros((len(self.rows), length), np.int32)
        for out, row in zip(self.tokens, self.rows, strict=True):
            out[: len(row)] = row
        self.mask = np.arange(length)[None] < np.array([len(r) for r in self.rows])[:, None]

    def logprobs(self, params, model, prompt, temperature):
        """log pi(response | prompt) float64[N] by a plain forward pass, without cache or padding before it."""
        rows = np.tile(np.array(prompt, np.int32), (len(self.rows), 1))
        tokens = np.concatenate([rows, self.tokens], axis=1)
        tokens = jnp.array(
            np.pad(tokens, ((0, -len(tokens) % 8), (0, 0)))
        )  # to what 8 devices can share
        hidden = transformer.apply(params, model, tokens)[: len(rows), len(prompt) - 1 : -1]
        logits = (
            np.asarray(jnp.einsum("btd,vd->btv", hidden, transformer.head(params)), np.float64)
            / temperature
        )
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        each = np.take_along_axis(logp, self.tokens[..., None], -1)[..., 0]
        return np.where(self.mask, each, 0.0).sum(1)


def run_spec(config: PPOConfig, model: ModelConfig, seed: int = 0) -> RunSpec:
    return RunSpec(config, model, model, LETTERS.stop_ids, LETTERS.pad_id, seed)


def place_model(params, model, meshes):
    """A teacher's parameters on its mesh."""
    mesh = meshes["teacher"]
    return jax.device_put(params, param_shardings(mesh, params, transformer.axes(model)))


def host_work(spec: RunSpec, score, examples, prompts_at=None) -> HostWork:
    """The host's part of an update, without documents and without a log."""
    config = spec.config
    return HostWork(
        prompts_of=lambda batch: reinforce.prompts_of_rows(batch, examples, config.num_responses),
        more_prompts=prompts_at and reinforce.further_prompts(config, prompts_at),
        score=score,
        end_responses=lambda rollout: end_at_strings(rollout, spec, LETTERS.decode),
        ptx_rows_at=None,
        ends_early=lambda metrics: passes_kl_limit(metrics, config.max_approx_kl),
        log=None,
    )


class World:
    """The real stage on two prompts whose every response can be listed: where it ends is known beforehand.

    The optimum of E[r] - beta KL(pi || ref) is pi*(y) = ref(y) exp(r(y) / beta) / Z, and what another policy falls
    short of it is beta KL(pi || pi*).
    """

    def __init__(
        self,
        config: PPOConfig,
        seed: int,
        vocab: int = 5,
        length: int = 4,
        reward_scale: float = 1.0,
        reward_digits: int = 15,  # decimals that rewards are rounded to
        devices: int = 8,
        width: int = 64,
        layers: int = 1,
        heads: int = 4,
        init_std: float = 0.1,
        teachers=(),  # for each of the config's: fields of its model that differ from the policy's
        **more,
    ):
        self.config, self.seed, rng = config, seed, np.random.default_rng(seed)
        self.mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
        self.model = ModelConfig(
            vocab_size=vocab, max_length=16, num_layers=layers, embed_dim=width, num_heads=heads, dtype="float32",
            init_std=init_std, tie_embeddings=False, **{"position": "learned", **more},
        )  # fmt: skip
        self.space = Responses(vocab, length)
        self.reward_rows = [
            np.where(
                self.space.finished,
                np.round(reward_scale * rng.normal(size=len(self.space.rows)), reward_digits),
                config.missing_end_score,
            )
            for _ in PROMPTS
        ]
        for prompt, values in zip(PROMPTS, self.reward_rows, strict=True):
            name = LETTERS.decode(prompt)
            REWARDS.update(
                {(name, t): float(v) for t, v in zip(self.space.texts, values, strict=True)}
            )
        shardings = param_shardings(
            self.mesh, transformer.abstract(self.model), transformer.axes(self.model)
        )
        self.ref = jax.device_put(transformer.init(self.model, jax.random.key(seed)), shardings)
        meshes = role_meshes(config, self.mesh)
        models = tuple(dataclasses.replace(self.model, **fields) for fields in teachers)
        self.teachers = tuple(
            place_model(transformer.init(model, jax.random.key(seed + number)), model, meshes)
            for number, model in enumerate(models, 1)
        )
        self.moved_heads = roles.moved_heads(self.teachers, models, meshes)
        self.spec = run_spec(config, self.model, seed)._replace(teachers=models)
        with jax.set_mesh(self.mesh):
            self.programs, self.layouts = build_programs(self.spec, meshes)
        self.examples = [
            PromptExample([{"role": "user", "content": LETTERS.decode(p)}], p)
            for p in PROMPTS
            for _ in range(4096)
        ]

    def train(self, num_steps: int | None = None, watch=None, resume=None):
        """The stage's loop; returns the final policy's parameters. watch(step, metrics, state) sees every update."""
        spec, config, mesh = self.spec, self.config, self.mesh
        copy = functools.partial(jax.tree.map, jnp.copy)
        with jax.set_mesh(mesh):
            start = copy(self.ref)
            if config.shares_trunk:
                start = with_value_head(start, self.model)
            actor, actor_base = split_trainable(
                config.lora,
                start,
                (scalar if config.shares_trunk else transformer).axes(self.model),
            )
            critic, critic_base = {}, {}
            if config.has_critic:
                first = initial_critic(config, copy(self.ref), {}, self.model)
                critic, critic_base = split_trainable(config.lora, first, scalar.axes(self.model))
            frozen = FrozenModels(
                self.ref, actor_base, critic_base, {}, self.teachers, self.moved_heads
            )
            state = initial_state(self.layouts, config, mesh, copy(actor), copy(critic))
            if resume is not None:
                place = lambda value, like: jax.device_put(value, like.sharding)
                state = jax.tree.map(place, resume, abstract_state(self.layouts, config, mesh))
            score = make_scorer(spec, self.programs, frozen, LETTERS.decode, mesh, "rewards")
            prompts_at = make_prompt_batch_at(
                self.examples, batch_size=config.batch_size // config.num_responses, seed=self.seed, length=4,
                pad_id=0, sharding=activation(self.mesh, "batch", None),
            )  # fmt: skip
            host = host_work(spec, score, self.examples, prompts_at)
            step = make_step(spec, self.programs, frozen, host, "ppo")
            for number in range(
                int(state.step), config.num_steps if num_steps is None else num_steps
            ):
                state, metrics = step(state, prompts_at(number * config.sampling_rounds))
                if watch:
                    watch(
                        number,
                        {name: float(s) / float(w) for name, (s, w) in metrics.items()},
                        state,
                    )
            return jax.device_get(spec.policy(state.actor.params, frozen.actor_base))

    def expected_reward(self, params) -> float:
        pi = [
            np.exp(self.space.logprobs(params, self.model, p, self.config.sampling.temperature))
            for p in PROMPTS
        ]
        return float(
            np.mean([(p * reward).sum() for p, reward in zip(pi, self.reward_rows, strict=True)])
        )

    def distances(self, params):
        """(total variation to the optimum, share of J* - J(ref) that is missing), the worse of the prompts."""
        temperature, beta, worst = self.config.sampling.temperature, self.config.kl_coef, []
        for prompt, reward in zip(PROMPTS, self.reward_rows, strict=True):
            ref, policy = (
                self.space.logprobs(p, self.model, prompt, temperature) for p in (self.ref, params)
            )
            best = ref + reward / beta
            best -= np.log(np.exp(best - best.max()).sum()) + best.max()
            pi = np.exp(policy)
            assert abs(pi.sum() - 1) < 1e-5 and abs(np.exp(ref).sum() - 1) < 1e-5
            gap = (pi * (policy - best)).sum() / (np.exp(ref) * (ref - best)).sum()
            worst.append((0.5 * np.abs(pi - np.exp(best)).sum(), gap))
        return tuple(max(values) for values in zip(*worst, strict=True))
