"""PPO (Schulman et al. 2017) from a reward model, as InstructGPT: four trees, two of them trained.

Defaults and where they come from:

    field                  default  source
    num_epochs             4        Ziegler et al. 2019; Stiennon et al. 2020; Huang et al. 2024 (InstructGPT: 1)
    num_minibatches        4        ours, small batches (InstructGPT: 8 of 64)
    kl_coef                0.05     Huang et al. 2024 (InstructGPT 0.02; Ziegler 0.15 adaptive)
    discount               1.0      InstructGPT, appendix C.4; Ziegler
    gae_lambda             0.95     Ziegler; Huang (InstructGPT does not say)
    clip, value_clip       0.2      Schulman; Ziegler; InstructGPT (ratio clip)
    whiten_advantages      true     Ziegler; Huang (population variance)
    missing_end_score      -1.0     Ziegler; Huang, detail 13 ("EOS trick")
    sampling.temperature   1.0      InstructGPT, appendix C.4 (Ziegler and Huang 0.7)
    critic                 reward   started from the reward model: InstructGPT, Stiennon
    actor.learning_rate    1e-5     Ziegler (InstructGPT about 9e-6; Huang 3e-6); small models take more
    critic.learning_rate   1e-5     InstructGPT 9e-6
    Adam b2, eps           0.95, 1e-5   InstructGPT; Huang, detail 21
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import evaluate, losses, train
from jaxllm.checkpoint import CheckpointConfig
from jaxllm.config import InputError
from jaxllm.data import DataConfig, PromptExample, load_prompts, make_prompt_batch_at
from jaxllm.generate import Rollout, SamplingConfig, completions, generate, response_logprobs, roll_out, row_inputs
from jaxllm.losses import Metrics
from jaxllm.metrics import LoggingConfig, Work, console
from jaxllm.models import scalar, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.optim import OptimConfig, learning_rate, make_optimizer
from jaxllm.sharding import activation, check_batch, constrain, replicated
from jaxllm.train import TrainState
from jaxllm.workspace import Workspace, describe_model, load_model

_OPTIM = OptimConfig(learning_rate=1e-5, schedule="constant", weight_decay=0.0, eps=1e-5)


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Reinforcement learning from the reward model's scores. Sources of the defaults: the head of stages/ppo.py."""

    data: DataConfig = DataConfig()
    """Prompts; without sources those of the sample stage."""
    init_from: str = ""
    """Stage directory of the policy to start from, which is also the reference; empty: sft."""
    reward_from: str = ""
    """Stage directory of the reward model; empty: reward."""
    num_steps: int = 100
    """Updates: a batch of rollouts and num_epochs passes over it each."""
    batch_size: int = 64
    """Prompts, and so rollouts, per update."""
    num_epochs: int = 4
    """Passes over a batch of rollouts."""
    num_minibatches: int = 4
    """Optimiser updates per pass."""
    num_micro: int = 1
    """Microbatches per minibatch."""
    kl_coef: float = 0.05
    """Weight of the per-token KL to the reference in the reward."""
    discount: float = 1.0
    """Discount of later rewards."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    clip: float = 0.2
    """The probability ratio is clipped to 1 - clip .. 1 + clip."""
    value_clip: float = 0.2
    """A new value may move this far from the old one; 0: no limit."""
    whiten_advantages: bool = True
    """Normalise advantages over the batch."""
    missing_end_score: float = -1.0
    """Score of a response that never ends, in place of the reward model's."""
    max_prompt_length: int = 64
    """Prompts longer than this many tokens are refused (or dropped: data.too_long)."""
    sampling: SamplingConfig = SamplingConfig()
    """How responses are drawn; top_k and top_p stay off, the loss knows only the temperature."""
    log_every: int = 1
    """Updates per logged interval."""
    eval_every: int = 10
    """Updates between evaluations on held-out prompts."""
    eval_prompts: int = 64
    """Held-out prompts of an evaluation."""
    actor: OptimConfig = _OPTIM
    """The policy's optimiser."""
    critic: OptimConfig = _OPTIM
    """The critic's optimiser."""
    checkpoint: CheckpointConfig = CheckpointConfig(save_every=20)
    """Saving."""

    def __post_init__(self) -> None:
        for name in (
            "num_steps",
            "batch_size",
            "num_epochs",
            "num_minibatches",
            "num_micro",
            "log_every",
            "eval_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1")
        if self.batch_size % (self.num_minibatches * self.num_micro):
            raise ValueError("num_minibatches: num_minibatches x num_micro must divide batch_size")
        if self.sampling.temperature <= 0:
            raise ValueError("sampling.temperature: PPO needs a temperature above 0")
        if self.sampling.top_k or self.sampling.top_p < 1:
            raise ValueError("sampling.top_k: top_k and top_p must be off: the loss would not know the distribution")


class PPOState(NamedTuple):
    """Everything that moves."""

    step: Any  # int32[]: updates done
    actor: TrainState
    critic: TrainState
    kl_coef: Any  # float32[]


class Experience(NamedTuple):
    """What an update learns from; tokens int32[B, P+R], masks bool, the others float32[B, R]."""

    tokens: jax.Array
    prompt_mask: jax.Array  # [B, P]
    mask: jax.Array  # [B, R]
    old_logprobs: jax.Array
    old_values: jax.Array
    advantages: jax.Array
    returns: jax.Array


class Roles(NamedTuple):
    """The frozen models and their configs; policy and critic start as copies of them."""

    ref: Any
    model: ModelConfig
    reward: Any
    reward_model: ModelConfig
    stop_ids: tuple[int, ...]
    pad_id: int


def run(workspace: Workspace, config: PPOConfig, logging: LoggingConfig) -> dict[str, float]:
    """Train the policy; the result has score and KL on held-out prompts under the reward model."""
    mesh, directory = workspace.mesh, workspace.stage_dir("ppo")
    size = config.batch_size // config.num_minibatches // config.num_micro
    check_batch(mesh, size, "ppo.batch_size / num_minibatches / num_micro")
    roles = load_roles(workspace, config)
    prompts = load_all_prompts(workspace, config)
    updates = config.num_steps * config.num_epochs * config.num_minibatches
    actor_tx, critic_tx = make_optimizer(config.actor, updates), make_optimizer(config.critic, updates)
    model, reward_model = roles.model, roles.reward_model
    actor = train.place_state(mesh, transformer.abstract(model), transformer.axes(model), actor_tx)
    critic = train.place_state(mesh, scalar.abstract(reward_model), scalar.axes(reward_model), critic_tx)
    score = jax.jit(functools.partial(reward_scores, model=reward_model, missing_end_score=config.missing_end_score))
    describe_model(directory, model, "policy", ("actor", "params"))
    _, metrics = train.run_stage(
        directory,
        "ppo",
        init=lambda: first_state(config, roles, mesh, actor, critic),
        abstract=abstract_state(mesh, actor, critic),
        step=build_step(config, roles, score, (actor_tx, actor), (critic_tx, critic), workspace.seed),
        batch_at=make_prompt_batch_at(
            prompts["train"],
            batch_size=config.batch_size,
            seed=workspace.seed,
            length=config.max_prompt_length,
            pad_id=roles.pad_id,
            sharding=activation(mesh, "batch", None),
        ),
        num_steps=config.num_steps,
        settings=config,
        logging=logging,
        work=Work(config.batch_size * config.sampling.max_new_tokens),
        evaluate=make_evaluation(workspace, config, roles, score, prompts["held_out"]),
        best="eval/score",
        lower_is_better=False,
        schedules={
            "ppo/learning_rate": lambda n: learning_rate(config.actor, updates)(n * (updates // config.num_steps))
        },
        shown=("ppo/score", "ppo/kl", "ppo/entropy", "ppo/response_length", "eval/score", "eval/kl"),
    )
    return {
        "steps": config.num_steps,
        **{k.removeprefix("eval/"): v for k, v in metrics.items() if k.startswith("eval/")},
        **{k.removeprefix("ppo/"): v for k, v in metrics.items() if k in ("ppo/entropy", "ppo/clip_fraction")},
    }


def load_roles(workspace: Workspace, config: PPOConfig) -> Roles:
    """Reference and reward model, each from its stage or from the directory the config names."""
    for stage, given in (("sft", config.init_from), ("reward", config.reward_from)):
        if not given:
            workspace.require(stage, "ppo")
    ref, model = load_model(config.init_from or str(workspace.stage_dir("sft")), workspace.mesh)
    reward, reward_model = load_model(
        config.reward_from or str(workspace.stage_dir("reward")), workspace.mesh, "reward"
    )
    length = config.max_prompt_length + config.sampling.max_new_tokens
    if length > (limit := min(model.max_length, reward_model.max_length)):
        raise InputError(
            f"ppo.max_prompt_length: {config.max_prompt_length} + max_new_tokens {config.sampling.max_new_tokens} "
            f"exceed model.max_length {limit}; lower one of them"
        )
    tokenizer = workspace.tokenizer()
    return Roles(ref, model, reward, reward_model, (tokenizer.end_id, tokenizer.eos_id), tokenizer.pad_id)


def load_all_prompts(workspace: Workspace, config: PPOConfig) -> dict[str, list[PromptExample]]:
    tokenizer = workspace.tokenizer()
    prompts = {s: load_prompts(config.data, s, tokenizer, config.max_prompt_length) for s in ("train", "held_out")}
    prompts["held_out"] = prompts["held_out"][: config.eval_prompts]
    counts = f"{len(prompts['train'])} training prompts, {len(prompts['held_out'])} held-out prompts for evaluation"
    console.print(f"ppo: {counts}")
    return prompts


def first_state(config: PPOConfig, roles: Roles, mesh, actor: train.Placed, critic: train.Placed) -> PPOState:
    copy = functools.partial(jax.tree.map, jnp.copy)  # making a state donates; reference and reward model stay
    step, kl_coef = (jax.device_put(x, replicated(mesh)) for x in (jnp.int32(0), jnp.float32(config.kl_coef)))
    return PPOState(step, actor.init(copy(roles.ref)), critic.init(copy(roles.reward)), kl_coef)


def abstract_state(mesh: jax.sharding.Mesh, actor: train.Placed, critic: train.Placed) -> PPOState:
    scalar_of = functools.partial(jax.ShapeDtypeStruct, (), sharding=replicated(mesh))
    return PPOState(scalar_of(jnp.int32), actor.abstract, critic.abstract, scalar_of(jnp.float32))


def build_step(config: PPOConfig, roles: Roles, score, actor: tuple[Any, Any], critic: tuple[Any, Any], seed: int):
    """Compile-ready parts of the PPO step; actor and critic are (optimiser, placement) each."""
    model, temperature = roles.model, config.sampling.temperature
    settings: dict[str, Any] = {"sampling": config.sampling, "stop_ids": roles.stop_ids, "pad_id": roles.pad_id}

    def rollout(params: Any, batch: Any, key: jax.Array) -> Rollout:
        return generate(params, model, batch["tokens"], batch["mask"], key, index=batch["index"], **settings)

    def update(loss, tx: Any, placed: train.Placed):
        return train.make_step(loss, tx, num_micro=config.num_micro, state_shardings=placed.shardings)

    return make_ppo_step(
        config,
        rollout=jax.jit(rollout),
        score=score,
        experience=jax.jit(
            functools.partial(make_experience, config=config, model=model, reward_model=roles.reward_model)
        ),
        actor_step=update(
            functools.partial(actor_loss, model=model, temperature=temperature, clip=config.clip), *actor
        ),
        critic_step=update(
            functools.partial(critic_loss, model=roles.reward_model, value_clip=config.value_clip), *critic
        ),
        seed=seed,
        ref=roles.ref,
        reward=roles.reward,
    )


def make_evaluation(workspace: Workspace, config: PPOConfig, roles: Roles, score, prompts: list[PromptExample]):
    """(step, state) -> held-out numbers under the reward model."""
    logprobs = jax.jit(
        functools.partial(response_logprobs, config=roles.model, temperature=config.sampling.temperature)
    )
    settings: dict[str, Any] = {"sampling": config.sampling, "stop_ids": roles.stop_ids, "pad_id": roles.pad_id}

    def measure(params: Any, rollout: Rollout) -> tuple[jax.Array, jax.Array]:
        log_ratio = logprobs(params, rollout).logprob - logprobs(roles.ref, rollout).logprob
        return score(roles.reward, rollout), jnp.where(rollout.mask, losses.kl_k1(log_ratio), 0.0).sum(1)

    def evaluation(step: int, state: PPOState) -> dict[str, float]:
        del step
        more = {**settings, "mesh": workspace.mesh}
        return held_out_numbers(state.actor.params, roles.model, prompts, workspace.seed, more, measure)

    return evaluation


def make_ppo_step(
    config: PPOConfig, *, rollout, score, experience, actor_step, critic_step, seed: int, ref: Any, reward: Any
):
    """(state, prompts) -> (state, metrics): one batch of rollouts, then num_epochs x num_minibatches updates.

    Every random choice is a function of (seed, state.step): rollouts, and a fresh permutation for each epoch.
    """
    size = config.batch_size // config.num_minibatches
    place = lambda x: constrain(x, "batch", *[None] * (x.ndim - 1))
    take = jax.jit(lambda tree, rows: jax.tree.map(lambda x: place(x[rows]), tree))

    def step(state: PPOState, prompts: Any) -> tuple[PPOState, Metrics]:
        number = int(state.step)
        roll = rollout(state.actor.params, prompts, jax.random.fold_in(jax.random.key(seed), number))
        scores = score(reward, roll)
        batch, metrics = experience(state.actor.params, state.critic.params, ref, roll, scores, state.kl_coef)
        actor, critic, collected = state.actor, state.critic, []
        for epoch in range(config.num_epochs):
            order = np.random.default_rng([seed, number, epoch]).permutation(config.batch_size).astype(np.int32)
            for rows in order.reshape(config.num_minibatches, size):
                minibatch = take(batch, rows)
                actor, of_actor = actor_step(actor, minibatch)
                critic, of_critic = critic_step(critic, minibatch)
                collected.append({**of_actor, **_rename(of_critic, "critic_")})
        metrics = metrics | _total(collected)
        new = PPOState(state.step + 1, actor, critic, state.kl_coef)
        return new, {f"ppo/{name}": pair for name, pair in metrics.items()}

    return step


def make_experience(
    actor: Any,
    critic: Any,
    ref: Any,
    rollout: Rollout,
    scores: jax.Array,
    kl_coef: jax.Array,
    *,
    config,
    model,
    reward_model,
) -> tuple[Experience, Metrics]:
    """Per-token rewards and advantages of a batch of rollouts; scores float32[B] is per sequence."""
    temperature, mask = config.sampling.temperature, rollout.mask
    policy = response_logprobs(actor, rollout, config=model, temperature=temperature)
    ref_logprobs = response_logprobs(ref, rollout, config=model, temperature=temperature).logprob
    values = response_values(critic, rollout, model=reward_model)
    rewards = losses.token_rewards(scores, policy.logprob, ref_logprobs, mask, kl_coef)
    advantages, returns = losses.gae(rewards, values, mask, discount=config.discount, lam=config.gae_lambda)
    metrics = _rollout_metrics(rollout, scores, policy, ref_logprobs, values, returns)
    if config.whiten_advantages:
        advantages = losses.whiten(advantages, mask)
    fields = (rollout.tokens, rollout.prompt_mask, mask, policy.logprob, values, advantages, returns)
    return Experience(*fields), metrics


def _rollout_metrics(rollout: Rollout, scores, policy: losses.TokenStats, ref_logprobs, values, returns) -> Metrics:
    mask = rollout.mask
    total = lambda x: jnp.where(mask, x, 0.0).sum()
    log_ratio = policy.logprob - ref_logprobs
    rows, tokens = jnp.float32(mask.shape[0]), mask.astype(jnp.float32).sum()
    mean = total(returns) / tokens
    unexplained = total(jnp.square(returns - values)) / jnp.maximum(total(jnp.square(returns - mean)), 1e-8)
    return {
        "score": (scores.sum(), rows),
        "score_std": (scores.std(), jnp.ones(())),
        "kl": (total(losses.kl_k1(log_ratio)), rows),  # nats per response
        "kl_k3": (total(losses.kl_k3(log_ratio)), rows),
        "entropy": (total(policy.entropy), tokens),
        "value": (total(values), tokens),
        "explained_variance": (1.0 - unexplained, jnp.ones(())),
        "response_length": (tokens, rows),
        "finished": (rollout.finished.astype(jnp.float32).sum(), rows),
        "sampler_drift": (total(jnp.abs(policy.logprob - rollout.logprobs)), tokens),
    }


def actor_loss(
    params: Any, batch: Experience, key: Any, *, model: ModelConfig, temperature: float, clip: float
) -> losses.Loss:
    del key  # no dropout: the ratio of the first minibatch is exactly 1
    logprobs = response_logprobs(params, batch, config=model, temperature=temperature).logprob
    return losses.policy(logprobs, batch.old_logprobs, batch.advantages, batch.mask, clip=clip)


def critic_loss(params: Any, batch: Experience, key: Any, *, model: ModelConfig, value_clip: float) -> losses.Loss:
    del key
    values = response_values(params, batch, model=model)
    return losses.value(values, batch.old_values, batch.returns, batch.mask, clip=value_clip)


def response_values(params: Any, batch: Rollout | Experience, *, model: ModelConfig) -> jax.Array:
    """The critic's value float32[B, R] of the state each response token was chosen in (the place before it)."""
    R = batch.mask.shape[1]
    return scalar.apply(params, model, batch.tokens, *row_inputs(batch))[:, -R - 1 : -1]


def reward_scores(params: Any, rollout: Rollout, *, model: ModelConfig, missing_end_score: float) -> jax.Array:
    """The reward model's score float32[B] of each response; missing_end_score where it never ended."""
    segments, positions = row_inputs(rollout)
    values = scalar.apply(params, model, rollout.tokens, segments, positions)
    return jnp.where(rollout.finished, scalar.last_value(values, segments), missing_end_score)


def held_out_numbers(
    params: Any, model: ModelConfig, prompts: list[PromptExample], seed: int, settings: dict[str, Any], measure
) -> dict[str, float]:
    """Score, KL to the reference in nats per response, length and distinct-2 on held-out prompts.

    measure(params, rollout) -> (scores [B], k1 KL summed over the response [B]).
    """
    scores, kls, responses = [], [], []
    for rollout, count in roll_out(params, model, [p.ids for p in prompts], seed=seed, **settings):
        score, kl = jax.device_get(measure(params, rollout))
        scores, kls = [*scores, *score[:count].tolist()], [*kls, *kl[:count].tolist()]
        responses += completions(jax.device_get(rollout))[:count]
    numbers = {"score": float(np.mean(scores)), "kl": float(np.mean(kls))}
    numbers |= {"response_length": float(np.mean([len(r.ids) for r in responses]))}
    numbers |= {
        "finished": float(np.mean([r.finished for r in responses])),
        "distinct_2": evaluate.distinct(r.ids for r in responses),
    }
    return {f"eval/{name}": value for name, value in numbers.items()}


def _rename(metrics: Metrics, prefix: str) -> Metrics:
    return {name if name.startswith("value") else prefix + name: pair for name, pair in metrics.items()}


def _total(collected: list[Metrics]) -> Metrics:
    add = lambda *xs: functools.reduce(jnp.add, xs)
    return jax.tree.map(add, *collected)
