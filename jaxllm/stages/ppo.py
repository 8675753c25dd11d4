"""PPO (Schulman et al. 2017) as InstructGPT; RLOO and GRPO are the same loop with other advantages and no critic.

PPOConfig's comments say where a default comes from: Ziegler et al. 2019; Stiennon et al. 2020; InstructGPT (Ouyang et
al. 2022); Huang et al. 2024. RLOO and GRPO differ where `RLOO` and `GRPO` below say.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxllm import generate, losses, rollouts, train
from jaxllm.config.ranges import (
    AnyFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Proportion,
    ProportionBelowOne,
)
from jaxllm.data.loader import (
    PromptExample,
    fingerprint,
    load_prompts,
    load_rows,
    make_batch_at,
    make_prompt_batch_at,
)
from jaxllm.data.messages import prompt_text
from jaxllm.data.sources import DataConfig
from jaxllm.evaluation import measures
from jaxllm.generate import Rollout, SamplingConfig
from jaxllm.losses import Metrics, Moments
from jaxllm.metrics import Work, held_out
from jaxllm.models import decode, lora, next_token, scalar, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.models.lora import LoRAConfig
from jaxllm.optim import OptimConfig, learning_rate, make_optimizer
from jaxllm.rl import rewards
from jaxllm.rl.rewards import RewardSource
from jaxllm.runtime.checkpoint import CheckpointConfig
from jaxllm.runtime.console import console
from jaxllm.runtime.files import json_line, read_metrics, write_whole
from jaxllm.sharding import (
    MeshConfig,
    activation,
    batch_shards,
    check_batch,
    constrain,
    fetch,
    param_shardings,
    place_params,
    planned_mesh,
    replicated,
    reshard_across_meshes,
    rows_like,
)
from jaxllm.tokenizers.trained import Tokenizer
from jaxllm.train import TrainState
from jaxllm.workspace import Workspace, load_model, write_model_card

# Adam's b2 0.95: InstructGPT; its eps: Huang, detail 21.
_OPTIM = OptimConfig(learning_rate=1e-5, schedule="constant", weight_decay=0.0, eps=1e-5)


@dataclasses.dataclass(frozen=True)
class PtxConfig:
    """PPO-ptx: the pre-training gradient mixed into the policy's (Ouyang et al. 2022, eq. 2)."""

    coef: NonNegativeFloat = (
        0.0  # InstructGPT 27.8, on sums over sequences; ours weighs means per token
    )
    """Weight of the next-token loss (mean per token) beside the policy loss (mean per token); 0: off."""
    data: DataConfig = DataConfig()
    """Documents; without sources those of pretrain."""
    batch_size: PositiveInt = 16
    """Rows of documents per minibatch of rollouts."""
    length: NonNegativeInt = 0
    """Tokens per row; 0: model.max_length."""


@dataclasses.dataclass(frozen=True)
class RoleMesh(MeshConfig):
    """Another layout of the same devices for one role. The policy trains in that of the stage."""

    role: Literal["rollout", "reference", "reward", "critic"] = "rollout"
    """rollout: the policy while it draws responses; the reference; the reward model; a critic of its own, training."""


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Reinforcement learning from a reward. The comments are the sources of the defaults (stages/ppo.py)."""

    data: DataConfig = DataConfig()
    """Prompts; without sources those of the sample stage."""
    init_from: str = ""
    """Stage directory of the policy to start from, which is also the reference; empty: sft."""
    reward_from: str = ""
    """Stage directory of the reward model; empty: reward."""
    rewards: tuple[RewardSource, ...] = (RewardSource(),)
    """Terms of the score: the reward model, functions, patterns, length."""
    advantages: Literal["gae", "rloo", "grpo"] = "gae"
    """gae: a critic's (PPO); rloo, grpo: from the scores of a prompt's responses alone, without a critic."""
    num_responses: PositiveInt = 1
    """Responses drawn to each prompt."""
    num_steps: PositiveInt = 100
    """Updates: a batch of rollouts and num_epochs passes over it each."""
    batch_size: PositiveInt = 64
    """Responses per update, num_responses to each prompt."""
    num_epochs: PositiveInt = 4  # Ziegler; Stiennon; Huang (InstructGPT: 1)
    """Passes over a batch of rollouts."""
    num_minibatches: PositiveInt = 4  # ours, small batches (InstructGPT: 8 of 64)
    """Optimizer updates per pass."""
    num_micro: PositiveInt = 1
    """Microbatches per minibatch."""
    kl_coef: NonNegativeFloat = 0.05  # Huang (InstructGPT 0.02; Ziegler 0.15 adaptive)
    """Weight of the per-token KL to the reference in the reward."""
    kl_target: NonNegativeFloat = 0.0  # Ziegler: 6 nats, with kl_horizon 10000
    """KL in nats per response that kl_coef is adapted to (Ziegler et al. 2019, section 2.2); 0: kl_coef is fixed."""
    kl_horizon: PositiveFloat = 10_000.0
    """Responses over which kl_coef adapts; with the error clipped to 0.2, it takes five times as many to double."""
    kl_loss_coef: NonNegativeFloat = 0.0
    """Weight of the k3 estimate in the loss, as in GRPO; beside kl_coef or in its place."""
    max_approx_kl: NonNegativeFloat = 0.0
    """An update ends early once a minibatch's approximate KL to the old policy, nats per token, passes this; 0: never."""
    discount: Proportion = 1.0  # InstructGPT, appendix C.4; Ziegler
    """Discount of later rewards."""
    gae_lambda: Proportion = 0.95  # Ziegler; Huang (InstructGPT does not say)
    """Lambda of generalised advantage estimation."""
    clip_low: Proportion = 0.2  # Schulman; InstructGPT (two limits: Yu et al. 2025)
    """The probability ratio is clipped from below at 1 - clip_low."""
    clip_high: NonNegativeFloat = 0.2
    """And from above at 1 + clip_high."""
    dual_clip: NonNegativeFloat = 0.0
    """Where the advantage is negative, the loss is at most this times it (above 1; Ye et al. 2020); 0: off."""
    value_clip: NonNegativeFloat = 0.2  # Ziegler; Huang
    """A new value may move this far from the old one; 0: no limit."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of an entropy bonus per token."""
    whiten_advantages: bool = True  # Ziegler; Huang
    """Normalise advantages over the batch (population variance)."""
    whiten_rewards: bool = False  # Huang (Ziegler: true)
    """Scale per-token rewards to variance one over the batch, their mean kept."""
    normalise_scores: bool = False
    """Scale scores by the running mean and standard deviation of all scores so far."""
    score_clip: NonNegativeFloat = 0.0
    """Scores are clipped to +-this, after normalising; 0: not."""
    missing_end_score: AnyFloat = -1.0  # Ziegler; Huang, detail 13 ("EOS trick")
    """Score of a response that never ends, in place of all terms."""
    stop_strings: tuple[str, ...] = ()
    """A response ends with the token that completes one of these, and counts as finished."""
    max_prompt_length: PositiveInt = 64
    """Prompts longer than this many tokens are refused (or dropped: data.too_long)."""
    meshes: tuple[RoleMesh, ...] = ()
    """Roles for which devices are laid out otherwise, such as [{role: rollout, tensor: 8}]."""
    sampling: SamplingConfig = (
        SamplingConfig()
    )  # temperature 1: InstructGPT, appendix C.4 (Ziegler and Huang 0.7)
    """How responses are drawn; top_k and top_p stay off, the loss knows only the temperature."""
    critic_trunk: Literal["separate", "shared"] = (
        "separate"  # from the reward model: InstructGPT; Stiennon
    )
    """A critic of its own, started from the reward model, or a value head on the policy's trunk."""
    critic_head: Literal["copy", "zero"] = "copy"  # InstructGPT (zero: Huang, detail 11)
    """The critic's head at the start: the reward model's, or zero; without a reward model it is zero."""
    value_coef: NonNegativeFloat = 0.1  # Ziegler; Huang; a separate critic has its own step
    """Weight of the value loss where the trunk is shared."""
    ema_decay: ProportionBelowOne = 0.0  # InstructGPT: 0.992 an update
    """Decay per update of the running mean of the policy, which is then the stage's model; 0: off."""
    lora: LoRAConfig = LoRAConfig()
    """Train adapters of policy and critic; the reference is the policy without them."""
    ptx: PtxConfig = PtxConfig()
    """Pre-training gradients mixed in (PPO-ptx)."""
    log_every: PositiveInt = 1
    """Updates per logged interval."""
    num_logged: NonNegativeInt = 4
    """Rollouts of each update written to rollouts.jsonl."""
    eval_every: PositiveInt = 10
    """Updates between evaluations on held-out prompts."""
    eval_prompts: PositiveInt = 64
    """Held-out prompts of an evaluation."""
    actor: OptimConfig = (
        _OPTIM  # 1e-5: Ziegler (InstructGPT about 9e-6; Huang 3e-6); small models take more
    )
    """The policy's optimizer."""
    critic: OptimConfig = _OPTIM  # 1e-5: InstructGPT 9e-6
    """The critic's optimizer."""
    checkpoint: CheckpointConfig = CheckpointConfig(save_every=20)
    """Saving."""

    def __post_init__(self) -> None:
        if self.batch_size % (self.num_minibatches * self.num_micro):
            raise ValueError("num_minibatches: num_minibatches x num_micro must divide batch_size")
        if self.batch_size % self.num_responses:
            raise ValueError(
                f"num_responses: {self.num_responses} does not divide batch_size {self.batch_size}"
            )
        if self.advantages != "gae" and self.num_responses < 2:
            raise ValueError(
                f"num_responses: {self.advantages} needs at least 2 responses to each prompt"
            )
        if self.sampling.greedy:
            raise ValueError(
                "sampling.temperature: a policy gradient needs a temperature of at least 1e-5"
            )
        if self.sampling.top_k or self.sampling.top_p < 1:
            raise ValueError(
                "sampling.top_k: top_k and top_p must be off: the loss would not know the distribution"
            )
        if not self.rewards:
            raise ValueError("rewards: name at least one source")
        given = [source.source for source in self.rewards]
        if twice := next((source for source in given if given.count(source) > 1), ""):
            raise ValueError(f"rewards: {twice} is given twice; add up the weights")
        if not all(self.stop_strings):
            raise ValueError(
                "stop_strings: an empty text would end every response at once; leave it out"
            )
        if len({each.role for each in self.meshes}) < len(self.meshes):
            raise ValueError("meshes: a role can have one layout only")
        if not self.has_critic and any(each.role == "critic" for each in self.meshes):
            raise ValueError(
                "meshes: there is no critic of its own to lay out; leave the role critic out"
            )
        if self.dual_clip and self.dual_clip <= 1:
            raise ValueError("dual_clip: must be above 1, or 0 for off")

    @property
    def has_critic(self) -> bool:
        """Whether the critic is a model of its own."""
        return self.advantages == "gae" and self.critic_trunk == "separate"


# Ahmadian et al. 2024: the whole response is one action, its KL in the reward, one step per batch.
RLOO = PPOConfig(
    advantages="rloo", num_responses=4, num_epochs=1, num_minibatches=1, whiten_advantages=False
)
# Shao et al. 2024: scores normalised within the prompt's responses, the k3 estimate in the loss.
GRPO = dataclasses.replace(RLOO, advantages="grpo", num_responses=8, kl_coef=0.0, kl_loss_coef=0.04)


class PPOState(NamedTuple):
    """Everything that moves."""

    step: Any  # int32[]: updates done
    actor: TrainState
    critic: Any  # TrainState, or {} without a critic of its own
    kl_coef: Any  # float32[]
    ema: Any  # the policy's running mean, or {}
    moments: Moments  # of the scores so far


class _PlannedTokenizer(NamedTuple):
    """What planning needs of one."""

    stop_ids: tuple[int, ...] = (0,)
    pad_id: int = 0


class Experience(NamedTuple):
    """What an update learns from; tokens int32[B, P+R], masks bool, the others float32[B, R]."""

    tokens: jax.Array
    prompt_mask: jax.Array  # [B, P]
    mask: jax.Array  # [B, R]
    old_logprobs: jax.Array
    ref_logprobs: jax.Array
    old_values: jax.Array
    advantages: jax.Array
    returns: jax.Array


class Roles(NamedTuple):
    """Frozen models; with LoRA also the base weights of actor and critic (`lora.join`)."""

    ref: Any
    actor_base: Any
    critic_base: Any
    reward: Any  # {} where no source is a reward model


class Setup(NamedTuple):
    """What a run of the stage is made from, besides its config."""

    config: PPOConfig
    model: ModelConfig  # of policy and reference
    reward_model: ModelConfig  # of reward model and critic
    tokenizer: Any  # Tokenizer; of a planned run only what is needed
    seed: int

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.tokenizer.stop_ids

    @property
    def drawing(self) -> dict[str, Any]:
        """How responses are drawn, for the functions of `generate`."""
        return {
            "sampling": self.config.sampling,
            "stop_ids": self.stop_ids,
            "pad_id": self.tokenizer.pad_id,
        }

    @property
    def has_critic(self) -> bool:
        return self.config.has_critic

    @property
    def shares_trunk(self) -> bool:
        return self.config.advantages == "gae" and self.config.critic_trunk == "shared"

    def policy(self, params: Any, base: Any) -> Any:
        """The decoder's parameters in what the actor trains."""
        whole = lora.join(base, params)
        return whole["trunk"] if self.shares_trunk else whole

    def logprobs(self, params: Any, rollout: Rollout) -> losses.TokenStats:
        """Of the responses, under a decoder at the temperature they are drawn at."""
        temperature = self.config.sampling.temperature
        return rollouts.response_logprobs(
            params, rollout, config=self.model, temperature=temperature
        )


# (fetchable rollout, its prompts) -> scores float32[B] before anything is done to them, and each term's mean
Score = Callable[[Rollout, Sequence[PromptExample]], tuple[jax.Array, Metrics]]


def build_training(workspace: Workspace, life: Any, stage: str) -> train.Training:
    """The training of the policy; its result has score and KL on held-out prompts under the same reward."""
    config: PPOConfig = getattr(life, stage)
    mesh, directory = workspace.mesh, workspace.stage_dir(stage)
    check_batch(
        mesh, config.batch_size // config.num_minibatches // config.num_micro, f"{stage} minibatch"
    )
    check_batch(
        mesh,
        config.batch_size // config.num_responses,
        f"{stage}.batch_size / {stage}.num_responses",
    )
    tokenizer = workspace.tokenizer()
    setup, roles, *starts = load_roles(workspace, config, stage, tokenizer)
    prompts = load_all_prompts(stage, config, tokenizer)
    rewards.check_answers(
        config.rewards, [p.answer for each in prompts.values() for p in each], f"{stage}.rewards"
    )
    parts = build(setup, mesh)
    score = make_score(setup, parts, roles, mesh, f"{stage}.rewards")
    path = ("ema",) if config.ema_decay else ("actor", "params")
    shared = ("trunk",) if setup.shares_trunk else ()
    source = workspace.source(config.init_from, "sft", stage)
    write_model_card(directory, setup.model, "policy", (*path, *shared), config.lora, source)
    table, ptx_at = (
        SampleTable(directory / "rollouts.jsonl", setup),
        ptx_batches(workspace, setup, stage),
    )
    updates = config.num_steps * config.num_epochs * config.num_minibatches

    def result(state: PPOState, metrics: Mapping[str, float]) -> dict[str, Any]:
        del state
        more = {
            name: metrics[f"{stage}/{name}"]
            for name in ("entropy", "clip_fraction", "sampler_drift")
        }
        return {"steps": config.num_steps, **held_out(metrics), **more}

    return train.Training(
        data=fingerprint([*prompts["train"], *prompts["held_out"]]),
        # Copies: making a state donates, and reference and reward model stay.
        init=lambda: first_state(parts, config, mesh, *jax.tree.map(jnp.copy, starts)),
        abstract=abstract_state(parts, config, mesh),
        step=make_step(setup, parts, roles, score, prompts["train"], stage, ptx_at, table),
        batch_at=make_prompt_batch_at(
            prompts["train"],
            batch_size=config.batch_size // config.num_responses,
            seed=workspace.seed,
            length=config.max_prompt_length,
            pad_id=tokenizer.pad_id,
            sharding=activation(mesh, "batch", None),
        ),
        num_steps=config.num_steps,
        settings=config,
        work=Work(config.batch_size * config.sampling.max_new_tokens),
        evaluate=make_evaluation(setup, parts, roles, score, prompts["held_out"], mesh),
        best="eval/score",
        lower_is_better=False,
        schedules={
            f"{stage}/learning_rate": lambda n: learning_rate(config.actor, updates)(
                n * (updates // config.num_steps)
            )
        },
        shown=(
            *(f"{stage}/{n}" for n in ("score", "kl", "entropy", "response_length")),
            "eval/score",
            "eval/kl",
        ),
        result=result,
    )


def plan(
    mesh: jax.sharding.Mesh, life: Any, stage: str
) -> tuple[list[train.Program], dict[str, Any]]:
    """`programs` of a stage of this config."""
    return programs(mesh, stage, getattr(life, stage), life.model, life.seed)


def load_roles(workspace: Workspace, config: PPOConfig, stage: str, tokenizer: Tokenizer):
    """(setup, roles, and the actor's and the critic's first parameters, which the roles may share).

    The reference is the policy's start; the critic starts from the reward model, without one from the policy.
    """
    mesh, has_reward = workspace.mesh, any(source.source == "model" for source in config.rewards)
    source = workspace.source(config.init_from, "sft", stage)
    reward_from = workspace.source(config.reward_from, "reward", stage) if has_reward else ""
    ref, model = load_model(source, mesh)
    ref, reward, reward_model = lora.merge(ref), {}, model
    if has_reward:
        reward, reward_model = load_model(reward_from, mesh, "reward", {source: ref})
    for each in (model, reward_model):
        check_lengths(config, each, stage)
    setup = Setup(config, model, reward_model, tokenizer, workspace.seed)
    with_head = scalar.axes(reward_model)
    actor, actor_base = split(
        config.lora,
        first_scalar(ref, model, reward, config) if setup.shares_trunk else ref,
        with_head if setup.shares_trunk else transformer.axes(model),
    )
    there = role_meshes(config, mesh)

    def moved(role: str, params: Any, axes: Any) -> Any:
        """In the layout of the role; adapters are added in where that is another one."""
        if not params or there[role] is mesh:
            return params
        params = lora.merge(params)
        return reshard_across_meshes(
            params, there[role], param_shardings(there[role], params, axes)
        )

    critic, critic_base = {}, {}
    if setup.has_critic:
        critic, critic_base = split(
            config.lora, first_scalar(ref, model, reward, config, of_reward=True), with_head
        )
        places = jax.tree.map(lambda leaf: leaf.sharding, frozen_critic(setup, there["critic"]))
        critic_base = reshard_across_meshes(critic_base, there["critic"], places)
    ref = moved("reference", ref, transformer.axes(model))
    return (
        setup,
        Roles(ref, actor_base, critic_base, moved("reward", reward, scalar.axes(reward_model))),
        actor,
        critic,
    )


def check_lengths(config: PPOConfig, model: ModelConfig, stage: str) -> None:
    """Raise InputError where a prompt and its response, or a row of documents, are longer than the model's context."""
    asked, new = config.max_prompt_length, config.sampling.max_new_tokens
    model.row_length(asked + new, f"{stage}.max_prompt_length", f"{asked} + max_new_tokens {new}")
    model.row_length(config.ptx.length, f"{stage}.ptx.length")


def frozen_critic(setup: Setup, there: Any) -> Any:
    """Shapes with their shardings of what lies under the critic's adapters on the mesh `there`."""
    model = setup.reward_model
    placed = place_params(there, scalar.abstract(model), scalar.axes(model))
    return lora.place_frozen(setup.config.lora, placed, replicated(there))


def first_scalar(
    ref: Any, model: ModelConfig, reward: Any, config: PPOConfig, of_reward: bool = False
) -> Any:
    """A critic's parameters at the start: the reward model's trunk and head, or the policy's trunk with a head."""
    zero = {"kernel": jnp.zeros(model.embed_dim), "bias": jnp.zeros(())}
    head = reward["head"] if reward and of_reward and config.critic_head == "copy" else zero
    return {"trunk": reward["trunk"] if reward and of_reward else ref, "head": head}


def split(config: LoRAConfig, params: Any, axes: Any) -> tuple[Any, Any]:
    """(trained, frozen). Adapters of the same kind that are there already are what is trained."""
    trunk = params.get("trunk", {})
    if config.rank and "lora" in trunk:
        fresh = jax.eval_shape(
            lambda: lora.init(config, lora.merge(params), jax.random.key(0), axes)
        )
        own = {**params, "trunk": {"lora": {"layers": trunk["lora"]["layers"]}}}
        if jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, own):
            return own, {"trunk": {**trunk, "lora": {"scale": trunk["lora"]["scale"]}}}
    merged = lora.merge(params)
    return lora.init(config, merged, jax.random.key(0), axes), lora.frozen(config, merged)


def load_all_prompts(
    stage: str, config: PPOConfig, tokenizer: Tokenizer
) -> dict[str, list[PromptExample]]:
    prompts = {
        s: load_prompts(config.data, s, tokenizer, config.max_prompt_length)
        for s in ("train", "held_out")
    }
    prompts["held_out"] = prompts["held_out"][: config.eval_prompts]
    counts = f"{len(prompts['train'])} training prompts, {len(prompts['held_out'])} held-out prompts for evaluation"
    console.print(f"{stage}: {counts}")
    return prompts


def make_score(
    setup: Setup, parts: "Parts", roles: Roles, mesh: jax.sharding.Mesh, field: str
) -> Score:
    """The weighted sum of the configured sources, and the mean of each."""
    sources = setup.config.rewards
    on_texts = {
        s: rewards.resolve(s, field) for s in sources if s.source not in ("model", "length")
    }
    length = jax.jit(lambda mask: mask.astype(jnp.float32).mean(1))
    rows = activation(mesh, "batch")
    names = rewards.metric_names(sources)

    def score(rollout: Rollout, prompts: Sequence[PromptExample]) -> tuple[jax.Array, Metrics]:
        texts: list[str] = []
        if on_texts:
            texts = [
                setup.tokenizer.decode(c.ids)
                for c in rollouts.completions(fetch(rollout), setup.stop_ids)
            ]
        asked, answers = [prompt_text(p.messages) for p in prompts], [p.answer for p in prompts]
        total, metrics = jnp.zeros(()), {}
        for source, name in zip(sources, names, strict=True):
            if source.source == "model":
                term = parts.reward(roles.reward, rollout)
            elif source.source == "length":
                term = length(rollout.mask)
            else:
                term = jax.device_put(
                    on_texts[source](asked, texts, answers).astype(np.float32), rows
                )
            total = total + source.weight * term
            metrics[f"reward_{name}"] = (term.sum(), jnp.float32(len(prompts)))
        return total, metrics

    return score


class Judge(NamedTuple):
    """A jitted function of (params, rollout) that runs on its own mesh."""

    mesh: Any
    home: Any  # the stage's
    program: Callable[..., jax.Array]  # jitted: (parameters, rollout) -> an array with its rows

    def __call__(self, params: Any, rollout: Rollout) -> jax.Array:
        """Rows and result go from device to device where the meshes are two."""
        if self.mesh is self.home:
            return self.program(params, rollout)
        rollout = reshard_across_meshes(rollout, self.mesh, activation(self.mesh, "batch"))
        with jax.set_mesh(self.mesh):
            made = self.program(params, rollout)
        return reshard_across_meshes(made, self.home, activation(self.home, "batch"))


class Drawing(NamedTuple):
    """Responses drawn in another layout than that of training."""

    mesh: jax.sharding.Mesh
    weights: Any  # shapes of the policy's weights with their shardings there
    place: Callable[..., Any]  # (params, base) -> the weights, gone from device to device
    run: Callable[
        ..., Rollout
    ]  # jitted: (weights, batch, the key's words, which go to any mesh from the host)


class Parts(NamedTuple):
    """The compiled parts of an update, and where its states live."""

    rollout: Callable[..., Rollout]
    drawing: "Drawing | None"  # how rollout goes about it in a layout of its own
    reference: Judge  # log-probabilities float32[B, R] of the responses
    reward: Judge  # scores float32[B]
    values: (
        Judge  # float32[B, R] by a critic of its own: (trained, base) -> of every response token
    )
    shape_scores: Callable[..., Any]
    experience: Callable[..., tuple[Experience, Metrics]]
    actor_step: Callable[..., tuple[TrainState, Metrics]]
    critic_step: Any  # as actor_step, or None
    actor: train.StateLayout
    critic: train.StateLayout | None


def build(setup: Setup, mesh: jax.sharding.Mesh) -> Parts:
    """Compile-ready parts of an update."""
    config, model = setup.config, setup.model
    updates = config.num_steps * config.num_epochs * config.num_minibatches
    decoder = (transformer.abstract(model), transformer.axes(model))
    with_head = (scalar.abstract(setup.reward_model), scalar.axes(setup.reward_model))

    def trained(
        loss: Callable[..., losses.Loss],
        optim: OptimConfig,
        family: Any,
        mesh: Any,
        mixed: Any = None,
    ):
        """(update step, where the state lives) of parameters with these shapes and logical axes."""
        shapes, axes = lora.trained(config.lora, *family)
        tx = make_optimizer(optim, updates, axes)
        placed = train.state_layout(mesh, shapes, axes, tx)
        settings = {
            "state_shardings": placed.shardings,
            "mixed": mixed,
            "spike_factor": optim.spike_factor,
        }
        loss = functools.partial(loss, setup=setup)
        return train.make_step(loss, tx, num_micro=config.num_micro, **settings), placed

    def draw(policy: Any, batch: Any, key: jax.Array) -> Rollout:
        samples = {"index": batch["index"], "num_samples": config.num_responses}
        return generate.generate(
            policy, model, batch["tokens"], batch["mask"], key, **samples, **setup.drawing
        )

    rollout = lambda params, base, batch, key: draw(setup.policy(params, base), batch, key)
    there = role_meshes(config, mesh)
    drawing = None if there["rollout"] is mesh else make_drawing(setup, there["rollout"], draw)
    judge = functools.partial(reward_scores, model=setup.reward_model)
    value = lambda critic, rollout: response_values(
        lora.join(critic[1], critic[0]), rollout, model=setup.reward_model
    )
    whole = jax.jit(rollout, out_shardings=activation(mesh, "batch"))
    mixed = (functools.partial(ptx_loss, setup=setup), config.ptx.coef) if config.ptx.coef else None
    actor_step, actor = trained(
        actor_loss, config.actor, with_head if setup.shares_trunk else decoder, mesh, mixed
    )
    critic_step, critic = None, None
    if setup.has_critic:
        critic_step, critic = trained(critic_loss, config.critic, with_head, there["critic"])
    return Parts(
        rollout=draw_elsewhere(mesh, drawing) if drawing else whole,
        drawing=drawing,
        reference=Judge(
            there["reference"],
            mesh,
            jax.jit(lambda ref, rollout: setup.logprobs(ref, rollout).logprob),
        ),
        reward=Judge(there["reward"], mesh, jax.jit(judge)),
        values=Judge(there["critic"], mesh, jax.jit(value)),
        shape_scores=jax.jit(functools.partial(shape_scores, config=config)),
        experience=jax.jit(functools.partial(make_experience, setup=setup)),
        actor_step=actor_step,
        critic_step=critic_step,
        actor=actor,
        critic=critic,
    )


def role_meshes(config: PPOConfig, mesh: Any) -> dict[str, Any]:
    """The mesh of every role: its own over the same devices, or the stage's."""
    devices: Any = (
        mesh.size
        if isinstance(mesh, jax.sharding.AbstractMesh)
        else mesh.devices.flatten().tolist()
    )
    own = {each.role: planned_mesh(each, devices) for each in config.meshes}
    of_step = config.num_minibatches * config.num_micro
    for role, there in own.items():
        rows = config.batch_size // {"rollout": config.num_responses, "critic": of_step}.get(
            role, 1
        )
        what = {"rollout": "prompts", "critic": "responses of a microbatch"}.get(role, "responses")
        check_batch(there, rows, f"{what} in meshes, role {role},")
    return {role: own.get(role, mesh) for role in ("rollout", "reference", "reward", "critic")}


def make_drawing(setup: Setup, there: Any, draw: Callable[..., Rollout]) -> Drawing:
    """draw: (policy, batch, key), traced on the mesh `there`."""
    shapes = jax.eval_shape(
        functools.partial(narrow, setup.model), transformer.abstract(setup.model)
    )
    weights = place_params(there, shapes, transformer.axes(setup.model))
    policy = jax.jit(
        lambda params, base: narrow(setup.model, lora.merge(setup.policy(params, base)))
    )
    places = jax.tree.map(lambda leaf: leaf.sharding, weights)
    place = lambda params, base: reshard_across_meshes(policy(params, base), there, places)
    run = lambda weights, batch, words: draw(weights, batch, jax.random.wrap_key_data(words))
    return Drawing(there, weights, place, jax.jit(run, out_shardings=activation(there, "batch")))


def draw_elsewhere(mesh: jax.sharding.Mesh, drawing: Drawing) -> Callable[..., Rollout]:
    """(params, base, batch, key) -> Rollout: weights and rows go from device to device, never through the host."""

    def rollout(params: Any, base: Any, batch: Any, key: jax.Array) -> Rollout:
        weights = drawing.place(params, base)
        there = drawing.mesh
        batch, words = (
            reshard_across_meshes(batch, there, activation(there, "batch")),
            fetch(jax.random.key_data(key)),
        )
        with jax.set_mesh(there):
            drawn = drawing.run(weights, batch, words)
        return reshard_across_meshes(drawn, mesh, activation(mesh, "batch"))

    return rollout


def narrow(model: ModelConfig, params: Any) -> Any:
    """Matrices in the type they are decoded in; norms and biases stay float32, as in `decode.unstack`."""
    dtype, stacked = (
        decode.decoding_config(model).compute_dtype,
        {name for name, *_ in transformer.stacks(model)},
    )

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if leaf.ndim > 1 + (path[0].key in stacked) else leaf

    return jax.tree_util.tree_map_with_path(one, params)


def programs(
    mesh: jax.sharding.Mesh, stage: str, config: PPOConfig, model: ModelConfig, seed: int
) -> tuple[list[train.Program], dict[str, Any]]:
    """(what an update runs, {role: its state}), as shapes with their shardings; all models are of one size."""
    check_lengths(config, model, stage)
    setup = Setup(config, model, model, _PlannedTokenizer(), seed)
    parts = build(setup, mesh)
    state, roles = abstract_state(parts, config, mesh), _abstract_roles(setup, mesh)
    everywhere = replicated(mesh)
    key = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    B, P, R = config.batch_size, config.max_prompt_length, config.sampling.max_new_tokens
    asked = B // config.num_responses
    shape = {
        "tokens": ((asked, P), jnp.int32),
        "mask": ((asked, P), jnp.bool_),
        "index": ((asked,), jnp.int32),
    }
    batch = rows_like(mesh, {name: jax.ShapeDtypeStruct(*each) for name, each in shape.items()})
    drawing = (state.actor.params, roles.actor_base, batch, key)
    draw, there = parts.rollout, parts.drawing
    if there:
        words = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
        drawing, draw = (there.weights, rows_like(there.mesh, batch), words), there.run
    rollout = rows_like(mesh, jax.eval_shape(draw, *drawing))
    scores, kl_coef = rows_like(mesh, jax.ShapeDtypeStruct((B,), jnp.float32)), state.kl_coef
    of_tokens = rows_like(mesh, jax.ShapeDtypeStruct((B, R), jnp.float32))
    values = of_tokens if setup.has_critic else {}
    judging = (state.actor.params, roles.actor_base, rollout, of_tokens, values, scores, kl_coef)
    experience = jax.eval_shape(parts.experience, *judging)[0]
    cut = lambda x: jax.ShapeDtypeStruct((B // config.num_minibatches, *x.shape[1:]), x.dtype)
    minibatch = rows_like(mesh, jax.tree.map(cut, experience))
    whole, unscored = (transformer.flops_per_token(model, P + R, scored=s) for s in (True, False))
    tokens, updates = B * (P + R), config.num_epochs * config.num_minibatches
    ptx = (
        next_token.planned_rows(mesh, config.ptx.batch_size, config.ptx.length or model.max_length),
    )
    mixed = (minibatch, *ptx) if config.ptx.coef else minibatch
    size = tokens / config.num_minibatches

    def judged(name: str, judge: Judge, params: Any, flops: float) -> train.Program:
        return train.Program(
            name,
            judge.program,
            (params, rows_like(judge.mesh, rollout)),
            {},
            flops,
            mesh=judge.mesh,
        )

    found = [
        train.Program(
            *("rollout", draw, drawing, {}, whole / 3 * (asked * P + B * R)),
            **{"decoded": R, "mesh": there and there.mesh, "copied": there and there.weights},
        ),
        judged("reference", parts.reference, roles.ref, whole / 3 * tokens),
        train.Program("experience", parts.experience, judging, {}, whole / 3 * tokens),
        train.Program(
            "actor",
            parts.actor_step,
            (state.actor, mixed),
            {"base": roles.actor_base},
            whole * size,
            updates,
        ),
    ]
    if roles.reward:
        found.insert(1, judged("score", parts.reward, roles.reward, unscored / 3 * tokens))
    if setup.has_critic:
        found.insert(
            1,
            judged(
                "values",
                parts.values,
                (state.critic.params, roles.critic_base),
                unscored / 3 * tokens,
            ),
        )
        critic, base = (
            (state.critic, rows_like(parts.values.mesh, minibatch)),
            {"base": roles.critic_base},
        )
        found.append(
            train.Program(
                "critic",
                parts.critic_step,
                critic,
                base,
                unscored * size,
                updates,
                mesh=parts.values.mesh,
            )
        )
    held = {"policy": state.actor, "critic": state.critic, "ema": state.ema, **roles._asdict()}
    return found, {name: tree for name, tree in held.items() if jax.tree.leaves(tree)}


def _abstract_roles(setup: Setup, mesh: jax.sharding.Mesh) -> Roles:
    config, model = setup.config, setup.model
    place = lambda family, there=mesh: place_params(
        there, family.abstract(model), family.axes(model)
    )
    meshes = role_meshes(config, mesh)
    policy = place(scalar if setup.shares_trunk else transformer)
    return Roles(
        ref=place(transformer, meshes["reference"]),
        actor_base=lora.place_frozen(config.lora, policy, replicated(mesh)),
        critic_base=frozen_critic(setup, meshes["critic"]) if setup.has_critic else {},
        reward=place(scalar, meshes["reward"])
        if any(source.source == "model" for source in config.rewards)
        else {},
    )


def first_state(
    parts: Parts, config: PPOConfig, mesh: jax.sharding.Mesh, actor: Any, critic: Any
) -> PPOState:
    number = lambda dtype, value: jax.device_put(dtype(value), replicated(mesh))
    ema = (
        jax.device_put(jax.tree.map(jnp.copy, actor), parts.actor.shardings.params)
        if config.ema_decay
        else {}
    )
    if parts.critic:
        critic = reshard_across_meshes(critic, parts.values.mesh, parts.critic.shardings.params)
        with jax.set_mesh(parts.values.mesh):
            critic = parts.critic.init(critic)
    return _state(config, number, parts.actor.init(actor), critic, ema)


def abstract_state(parts: Parts, config: PPOConfig, mesh: jax.sharding.Mesh) -> PPOState:
    number = lambda dtype, _: jax.ShapeDtypeStruct((), dtype, sharding=replicated(mesh))
    actor, critic = parts.actor.abstract, parts.critic.abstract if parts.critic else {}
    return _state(config, number, actor, critic, actor.params if config.ema_decay else {})


def _state(
    config: PPOConfig, number: Callable[..., Any], actor: Any, critic: Any, ema: Any
) -> PPOState:
    moments = Moments(*(number(jnp.float32, 0) for _ in range(3)))
    return PPOState(
        number(jnp.int32, 0), actor, critic, number(jnp.float32, config.kl_coef), ema, moments
    )


def ptx_batches(workspace: Workspace, setup: Setup, stage: str) -> Callable[[int], Any] | None:
    """Optimizer update number -> rows of documents; None without PPO-ptx."""
    config = setup.config.ptx
    if not config.coef:
        return None
    check_batch(
        workspace.mesh,
        config.batch_size // setup.config.num_micro,
        f"{stage}.ptx.batch_size / num_micro",
    )
    length, cache = config.length or setup.model.max_length, workspace.run_dir / "cache"
    rows = load_rows(config.data, "document", "train", setup.tokenizer, length, cache)
    sharding = activation(workspace.mesh, "batch", None)
    return make_batch_at(rows, batch_size=config.batch_size, seed=workspace.seed, sharding=sharding)


def make_step(
    setup: Setup,
    parts: Parts,
    roles: Roles,
    score: Score,
    prompts: Sequence[PromptExample],
    stage: str,
    ptx_at: Callable[[int], Any] | None = None,
    table: Callable[..., None] | None = None,
):
    """(state, batch of prompts) -> (state, metrics): one batch of rollouts, then num_epochs x num_minibatches updates.

    Every random choice is a function of (seed, state.step): rollouts, and a fresh permutation for each epoch.
    """
    config = setup.config
    take = jax.jit(
        lambda tree, rows: jax.tree.map(
            lambda x: constrain(x[rows], "batch", *[None] * (x.ndim - 1)), tree
        )
    )

    def step(state: PPOState, batch: Any) -> tuple[PPOState, Metrics]:
        number, actor, critic = int(state.step), state.actor, state.critic
        key = jax.random.fold_in(jax.random.key(setup.seed), number)
        roll = end_at_strings(parts.rollout(actor.params, roles.actor_base, batch, key), setup)
        asked = [prompts[i] for i in np.repeat(fetch(batch["prompt"]), config.num_responses)]
        raw, terms = score(roll, asked)
        scores, moments, shaped = parts.shape_scores(raw, roll.finished, state.moments)
        values = parts.values((critic.params, roles.critic_base), roll) if setup.has_critic else {}
        judging = (roll, parts.reference(roles.ref, roll), values, scores, state.kl_coef)
        experience, metrics = parts.experience(actor.params, roles.actor_base, *judging)
        metrics |= terms | shaped | {"kl_coef": (state.kl_coef, jnp.ones(()))}
        if table:
            table(number + 1, roll, asked, scores)
        actor, critic, collected = update(number, actor, critic, experience)
        kl_coef = state.kl_coef
        if config.kl_target:
            kl = metrics["kl"][0] / metrics["kl"][1]
            control = {
                "target": config.kl_target,
                "horizon": config.kl_horizon,
                "batch_size": config.batch_size,
            }
            kl_coef = losses.adapt_kl_coef(kl_coef, kl, **control)
        ema = move(state.ema, actor.params, config.ema_decay) if config.ema_decay else {}
        metrics |= jax.tree.map(lambda *sums: functools.reduce(jnp.add, sums), *collected)
        metrics |= {"minibatches": (jnp.float32(len(collected)), jnp.ones(()))}
        # Minibatches skipped in a row by the policy, or by the critic where that is more.
        last = [
            collected[-1][name][0]
            for name in ("skip_streak", "critic_skip_streak")
            if name in collected[-1]
        ]
        metrics |= {"skip_streak": (functools.reduce(jnp.maximum, last), jnp.ones(()))}
        state = PPOState(state.step + 1, actor, critic, kl_coef, ema, moments)
        return state, {f"{stage}/{name}": pair for name, pair in metrics.items()}

    def step_critic(critic: TrainState, minibatch: Experience) -> tuple[TrainState, Metrics]:
        there, base = parts.values.mesh, {"base": roles.critic_base}
        if there is parts.values.home:
            return parts.critic_step(critic, minibatch, **base)
        minibatch = reshard_across_meshes(minibatch, there, activation(there, "batch"))
        with jax.set_mesh(there):
            critic, metrics = parts.critic_step(critic, minibatch, **base)
        return critic, reshard_across_meshes(
            metrics, parts.values.home, replicated(parts.values.home)
        )

    def update(number: int, actor: TrainState, critic: Any, experience: Experience):
        collected: list[Metrics] = []
        for rows in minibatches(setup, number):
            minibatch = take(experience, rows)
            mixed = (minibatch, ptx_at(int(actor.step))) if ptx_at else minibatch
            actor, metrics = parts.actor_step(actor, mixed, base=roles.actor_base)
            if setup.has_critic:
                critic, more = step_critic(critic, minibatch)
                metrics |= {
                    name if name.startswith("value") else f"critic_{name}": pair
                    for name, pair in more.items()
                }
            collected.append(metrics)
            total, tokens = metrics["approx_kl"]
            if (
                config.max_approx_kl
                and float(total) / max(float(tokens), 1.0) > config.max_approx_kl
            ):
                break
        return actor, critic, collected

    return step


def minibatches(setup: Setup, number: int) -> np.ndarray:
    """Rows int32[updates, size] of the minibatches of update `number`: a fresh permutation for each epoch."""
    config, size = setup.config, setup.config.batch_size // setup.config.num_minibatches
    draws = (
        np.random.default_rng([setup.seed, number, epoch]) for epoch in range(config.num_epochs)
    )
    orders = (draw.permutation(config.batch_size) for draw in draws)
    return np.concatenate([*orders]).reshape(-1, size).astype(np.int32)


def end_at_strings(rollout: Rollout, setup: Setup) -> Rollout:
    """Cut responses at the configured stop strings; without any the rollout stays on its devices."""
    if not setup.config.stop_strings:
        return rollout
    cut = rollouts.cut_at_strings(fetch(rollout), setup.config.stop_strings, setup.tokenizer.decode)
    mask, finished = (
        jax.device_put(getattr(cut, n), getattr(rollout, n).sharding) for n in ("mask", "finished")
    )
    return rollout._replace(mask=mask, finished=finished)


@jax.jit
def move(ema: Any, params: Any, decay: float) -> Any:
    """The running mean, one update on."""
    return jax.tree.map(lambda e, p: e * decay + p * (1.0 - decay), ema, params)


def shape_scores(scores: jax.Array, finished: jax.Array, moments: Moments, *, config: PPOConfig):
    """(scores the update learns from, moments, metrics): normalised, clipped, and set where the response never ended."""
    ended = jnp.where(finished, scores, config.missing_end_score)
    rows = jnp.float32(scores.shape[0])
    metrics = {"score": (ended.sum(), rows), "score_std": (ended.std(), jnp.ones(()))}
    if config.normalise_scores:
        moments = losses.update_moments(moments, scores, finished)
        std = jnp.sqrt(moments.m2 / jnp.maximum(moments.count, 1.0))
        scores = (scores - moments.mean) / jnp.maximum(std, 1e-6)
    if config.score_clip:
        scores = jnp.clip(scores, -config.score_clip, config.score_clip)
    return jnp.where(finished, scores, config.missing_end_score), moments, metrics


def make_experience(
    actor: Any,
    base: Any,
    rollout: Rollout,
    ref_logprobs: jax.Array,
    values: Any,
    scores: jax.Array,
    kl_coef: jax.Array,
    *,
    setup: Setup,
) -> tuple[Experience, Metrics]:
    """Per-token rewards and advantages of a batch of rollouts, from the reference's float32[B, R] log-probabilities.

    base: what lies under the actor's adapters. values: float32[B, R] of a critic of its own; else it is not read. scores
    float32[B] is per sequence.
    """
    config, mask = setup.config, rollout.mask
    policy = setup.logprobs(setup.policy(actor, base), rollout)
    rewards_ = losses.token_rewards(scores, policy.logprob, ref_logprobs, mask, kl_coef)
    if config.whiten_rewards:
        rewards_ = losses.whiten(rewards_, mask, centre=False)
    if config.advantages == "gae":
        if setup.shares_trunk:
            values = response_values(lora.join(base, actor), rollout, model=setup.reward_model)
        advantages, returns = losses.gae(
            rewards_, values, mask, discount=config.discount, lam=config.gae_lambda
        )
    else:
        values = returns = jnp.zeros_like(rewards_)
        by_prompt = rewards_.sum(1).reshape(-1, config.num_responses)
        each = losses.group_advantages(by_prompt, config.advantages).reshape(-1, 1)
        advantages = jnp.where(mask, each, 0.0)
    metrics = rollout_metrics(rollout, policy, ref_logprobs, advantages)
    metrics |= value_metrics(values, returns, mask) if config.advantages == "gae" else {}
    if config.whiten_advantages:
        advantages = losses.whiten(advantages, mask)
    fields = (policy.logprob, ref_logprobs, values, advantages, returns)
    return Experience(rollout.tokens, rollout.prompt_mask, mask, *fields), metrics


def rollout_metrics(
    rollout: Rollout, policy: losses.TokenStats, ref_logprobs: jax.Array, advantages
) -> Metrics:
    mask = rollout.mask
    total = lambda x: jnp.where(mask, x, 0.0).sum()
    log_ratio = policy.logprob - ref_logprobs
    rows, tokens = jnp.float32(mask.shape[0]), mask.astype(jnp.float32).sum()
    return {
        "kl": (total(losses.kl_k1(log_ratio)), rows),  # nats per response
        "kl_k3": (total(losses.kl_k3(log_ratio)), rows),
        "entropy": (total(policy.entropy), tokens),
        "advantage_size": (total(jnp.abs(advantages)), tokens),
        "response_length": (tokens, rows),
        "finished": (rollout.finished.astype(jnp.float32).sum(), rows),
        "sampler_drift": (total(jnp.abs(policy.logprob - rollout.logprobs)), tokens),
    }


def value_metrics(values: jax.Array, returns: jax.Array, mask: jax.Array) -> Metrics:
    total = lambda x: jnp.where(mask, x, 0.0).sum()
    tokens = mask.astype(jnp.float32).sum()
    spread = total(jnp.square(returns - total(returns) / tokens))
    unexplained = total(jnp.square(returns - values)) / jnp.maximum(spread, 1e-8)
    return {
        "value": (total(values), tokens),
        "explained_variance": (1.0 - unexplained, jnp.ones(())),
    }


def actor_loss(params: Any, batch: Experience, key: Any, base: Any, *, setup: Setup) -> losses.Loss:
    """The clipped surrogate, with the entropy bonus, the KL in the loss and a shared trunk's value loss if they are on."""
    del key  # no dropout: the ratio of the first minibatch is exactly 1
    config, mask = setup.config, batch.mask
    policy = setup.policy(params, base)
    hidden = rollouts.response_hidden(policy, batch, setup.model)
    targets, head = batch.tokens[:, -mask.shape[1] :], transformer.head(policy)
    temperature, cap = config.sampling.temperature, setup.model.logit_softcap
    stats = losses.token_logprobs(hidden, head, targets, temperature=temperature, cap=cap)
    clips = {
        "clip_low": config.clip_low,
        "clip_high": config.clip_high,
        "dual_clip": config.dual_clip,
    }
    loss, count, metrics = losses.policy(
        stats.logprob, batch.old_logprobs, batch.advantages, mask, **clips
    )
    if config.entropy_coef:
        loss = loss - config.entropy_coef * jnp.where(mask, stats.entropy, 0.0).sum()
    if config.kl_loss_coef:
        log_ratio = jnp.where(mask, stats.logprob - batch.ref_logprobs, 0.0)
        loss = loss + config.kl_loss_coef * losses.kl_k3(log_ratio).sum()
    if setup.shares_trunk:
        values = scalar.read(lora.join(base, params)["head"], hidden)
        of_values, _, more = losses.value(
            values, batch.old_values, batch.returns, mask, clip=config.value_clip
        )
        loss, metrics = loss + config.value_coef * of_values, metrics | more
    return loss, count, metrics


def critic_loss(
    params: Any, batch: Experience, key: Any, base: Any, *, setup: Setup
) -> losses.Loss:
    del key
    values = response_values(lora.join(base, params), batch, model=setup.reward_model)
    return losses.value(
        values, batch.old_values, batch.returns, batch.mask, clip=setup.config.value_clip
    )


def ptx_loss(params: Any, batch: Any, key: Any, base: Any, *, setup: Setup) -> losses.Loss:
    """Next-token loss of the policy on documents."""
    return next_token.loss(setup.policy(params, base), batch, key, {}, model=setup.model)


def response_values(params: Any, batch: Rollout | Experience, *, model: ModelConfig) -> jax.Array:
    """The critic's value float32[B, R] of the state each response token was chosen in (the place before it)."""
    return scalar.read(params["head"], rollouts.response_hidden(params["trunk"], batch, model))


def reward_scores(params: Any, rollout: Rollout, *, model: ModelConfig) -> jax.Array:
    """The reward model's score float32[B] of each response, read at its last token."""
    segments, positions = rollouts.row_inputs(rollout)
    return scalar.last_value(
        scalar.apply(params, model, rollout.tokens, segments, positions), segments
    )


def make_evaluation(
    setup: Setup,
    parts: Parts,
    roles: Roles,
    score: Score,
    prompts: list[PromptExample],
    mesh: jax.sharding.Mesh,
) -> Callable[[int, PPOState], dict[str, float]]:
    """(step, state) -> score, KL to the reference in nats per response, length and distinct-2 on held-out prompts."""
    config, logprobs = setup.config, jax.jit(functools.partial(Setup.logprobs, setup))

    def kl(params: Any, rollout: Rollout) -> np.ndarray:
        log_ratio = logprobs(params, rollout).logprob - parts.reference(roles.ref, rollout)
        return fetch(jnp.where(rollout.mask, losses.kl_k1(log_ratio), 0.0).sum(1))

    def draw_all(trained: Any, params: Any, prompts: Any) -> Any:
        shards = [batch_shards(each) for each in (mesh, parts.reference.mesh, parts.reward.mesh)]
        settings = {"seed": setup.seed, "multiple": math.lcm(*shards), **setup.drawing}
        if not (drawing := parts.drawing):
            return generate.roll_out(params, setup.model, prompts, mesh=mesh, **settings)
        weights = drawing.place(trained, roles.actor_base)
        with jax.set_mesh(drawing.mesh):
            drawn = [
                *generate.roll_out(weights, setup.model, prompts, mesh=drawing.mesh, **settings)
            ]
        return [
            (reshard_across_meshes(rollout, mesh, activation(mesh, "batch")), count)
            for rollout, count in drawn
        ]

    def evaluation(step: int, state: PPOState) -> dict[str, float]:
        del step
        trained = state.ema if config.ema_decay else state.actor.params
        params = setup.policy(trained, roles.actor_base)
        scores, kls, responses = [], [], []
        asked_ids = [prompt.ids for prompt in prompts]
        for rollout, count in draw_all(trained, params, asked_ids):
            rollout, begin = end_at_strings(rollout, setup), len(scores)
            asked = [
                *prompts[begin : begin + count],
                *[prompts[begin]] * (rollout.mask.shape[0] - count),
            ]
            raw = fetch(score(rollout, asked)[0])
            ended = np.where(fetch(rollout.finished), raw, config.missing_end_score)
            scores, kls = (
                [*scores, *ended[:count].tolist()],
                [*kls, *kl(params, rollout)[:count].tolist()],
            )
            responses += rollouts.completions(fetch(rollout), setup.stop_ids)[:count]
        return {
            "eval/score": float(np.mean(scores)),
            "eval/kl": float(np.mean(kls)),
            "eval/response_length": float(np.mean([len(r.ids) for r in responses])),
            "eval/finished": float(np.mean([r.finished for r in responses])),
            "eval/distinct_2": measures.distinct(r.ids for r in responses),
        }

    return evaluation


class SampleTable:
    """rollouts.jsonl: a few rollouts of each update, with prompt, response and score.

    Lines of updates past the checkpoint a run goes on from are dropped, so that it ends as a run never cut.
    """

    def __init__(self, path: epath.Path, setup: Setup):
        self.path, self.setup, self._file, self._last = path, setup, None, 0

    def __call__(
        self, step: int, rollout: Rollout, prompts: Sequence[PromptExample], scores: jax.Array
    ) -> None:
        count = min(self.setup.config.num_logged, len(prompts))
        if not count:
            return
        first, scores = fetch(jax.tree.map(lambda x: x[:count], rollout)), fetch(scores)
        if jax.process_index():
            return
        if self._file is None or step <= self._last:  # a run that goes on, or that has gone back
            kept = (
                line
                for line in read_metrics(self.path, "skip")
                if line.get("step", math.inf) < step
            )
            write_whole(self.path, "".join(map(json_line, kept)))
            self._file = self.path.open("a", encoding="utf-8")
        self._last = step
        rows = zip(prompts, rollouts.completions(first, self.setup.stop_ids), scores, strict=False)
        for prompt, response, score in rows:
            text = {
                "prompt": prompt_text(prompt.messages),
                "response": self.setup.tokenizer.decode(response.ids),
            }
            more = {"finished": response.finished, "score": round(float(score), 4)}
            self._file.write(json_line({"step": step, **text, **more}))
        self._file.flush()
