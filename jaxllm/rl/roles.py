"""The models of an update: which are trained, which are frozen, and where they start.

    policy     trained. Starts from `init_from`, by default the sft stage.
    reference  frozen: the policy as it started.
    reward     frozen: the reward stage's model, where a term of the score is a model.
    critic     trained, with GAE only. Starts from the reward model, or from the policy where there is none; or it is a
               value head on the policy's trunk.
    teachers   frozen: models of their own size, where the policy is distilled from some.

With adapters (`lora`), policy and critic train small matrices on top of frozen base weights.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm import output_layer
from jaxllm.config import InputError
from jaxllm.engine.rollouts import Rollout, response_logprobs
from jaxllm.losses import Moments
from jaxllm.model_store import load_model, read_model_card
from jaxllm.models import lora, scalar, transformer
from jaxllm.models.config import ModelConfig
from jaxllm.models.parts_config import LoRAConfig
from jaxllm.rl.config import PPOConfig
from jaxllm.runtime.store.working import local_folder
from jaxllm.runtime.transfer import reshard_across_meshes
from jaxllm.sharding import param_shardings, place_params, replicated, with_shardings
from jaxllm.tokenizers.published import load_tokenizer
from jaxllm.train import StateLayout, TrainState
from jaxllm.workspace import Workspace


class PPOState(NamedTuple):
    """Everything that changes, and therefore everything that a checkpoint holds."""

    step: Any  # int32[]: updates done
    actor: TrainState
    critic: Any  # TrainState, or {} without a separate critic
    kl_coef: Any  # float32[]
    ema: Any  # moving average of the policy, or {}
    moments: Moments  # of all scores so far


class FrozenModels(NamedTuple):
    """Parameters that are not trained; with adapters also the base weights of actor and critic (`lora.join`)."""

    ref: Any
    actor_base: Any
    critic_base: Any
    reward: Any  # {} where no term of the score is a reward model
    teachers: Any = ()
    # Their output matrices on the policy's mesh, where the teachers are on another one.
    moved_heads: Any = ()

    @property
    def teacher_heads(self) -> tuple[Any, ...]:
        """The output matrix of every teacher, on the policy's mesh."""
        return self.moved_heads or tuple(map(transformer.head, self.teachers))


class RunSpec(NamedTuple):
    """What the programs of an update are made from."""

    config: PPOConfig
    model: ModelConfig  # of policy and reference
    reward_model: ModelConfig  # of reward model and critic
    stop_ids: tuple[int, ...]  # tokens that end a response
    pad_id: int
    seed: int
    teachers: tuple[ModelConfig, ...] = ()

    @property
    def sampling(self) -> dict[str, Any]:
        """How responses are sampled, as keyword arguments for `responses.roll_out`."""
        return {
            "sampling": self.config.sampling,
            "stop_ids": self.stop_ids,
            "pad_id": self.pad_id,
            "engine": self.config.engine,
        }

    def policy(self, params: Any, base: Any) -> Any:
        """The decoder inside what the actor trains: joined with frozen base weights, without a value head."""
        joined = lora.join(base, params)
        return joined["trunk"] if self.config.shares_trunk else joined

    def logprobs(self, params: Any, rollout: Rollout) -> output_layer.TokenStats:
        """Of each response token under a decoder, at the temperature responses are sampled at."""
        temperature = self.config.sampling.temperature
        return response_logprobs(params, rollout, config=self.model, temperature=temperature)


class InitialModels(NamedTuple):
    """Models of a stage as it starts. Actor and critic may share arrays with the frozen ones: copy before donating."""

    spec: RunSpec
    frozen: FrozenModels
    actor: Any
    critic: Any  # {} without a separate critic


def load_models(
    workspace: Workspace,
    config: PPOConfig,
    stage: str,
    meshes: Mapping[str, Any],
    stop_ids: tuple[int, ...],
    pad_id: int,
) -> InitialModels:
    """Loads every model of the stage, each onto the mesh of its role (`layouts.role_meshes`).

    Raises:
      InputError: where a stage that a model comes from is not finished, or a context is too short.
    """
    mesh = meshes["policy"]
    source = workspace.source(config.init_from, "sft", stage)
    loaded, model = load_model(source, mesh)
    # The reference is a plain model: adapters of an earlier stage are part of it.
    ref = lora.merge(loaded)
    reward, reward_model = {}, model
    if config.has_reward_model:
        reward_from = workspace.source(config.reward_from, "reward", stage)
        # A reward model trained as adapters has the policy as its base, which is loaded already.
        reward, reward_model = load_model(reward_from, mesh, "reward", {source: ref})
    teachers, teacher_models = _load_teachers(workspace, config, stage, model, meshes["teacher"])
    for each in (model, reward_model, *teacher_models):
        check_lengths(config, each, stage)
    spec = RunSpec(config, model, reward_model, stop_ids, pad_id, workspace.seed, teacher_models)

    start = with_value_head(ref, model) if config.shares_trunk else ref
    actor_family = scalar if config.shares_trunk else transformer
    actor, actor_base = split_trainable(config.lora, start, actor_family.axes(model))
    # An empty tree rather than None: states and checkpoints map over it.
    critic, critic_base = {}, {}
    if config.has_critic:
        critic, critic_base = split_trainable(
            config.lora,
            initial_critic(config, ref, reward, reward_model),
            scalar.axes(reward_model),
        )
        shapes = _critic_base_shapes(spec, meshes["critic"])
        shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
        critic_base = reshard_across_meshes(critic_base, meshes["critic"], shardings)
    frozen = FrozenModels(
        ref=_on_role_mesh(ref, transformer.axes(model), mesh, meshes["reference"]),
        actor_base=actor_base,
        critic_base=critic_base,
        reward=_on_role_mesh(reward, scalar.axes(reward_model), mesh, meshes["reward"]),
        teachers=teachers,
        moved_heads=moved_heads(teachers, teacher_models, meshes),
    )
    return InitialModels(spec, frozen, actor, critic)


def _load_teachers(
    workspace: Workspace, config: PPOConfig, stage: str, model: ModelConfig, mesh: Any
) -> tuple[tuple[Any, ...], tuple[ModelConfig, ...]]:
    """(parameters, configs) of the teachers. Raises InputError where one has another vocabulary than the policy."""
    loaded, models = [], []
    for teacher in config.teachers:
        source = workspace.source(teacher.stage_dir, "ppo", stage)
        # Before it is loaded: a wrong teacher should not take minutes to find.
        check_vocabulary(workspace, f"{stage}.teachers", source, model)
        # Straight onto its own mesh, which may be the only one that it fits.
        with jax.set_mesh(mesh):
            params, teacher_model = load_model(source, mesh)
            loaded.append(lora.merge(params))
        models.append(teacher_model)
    return tuple(loaded), tuple(models)


def check_vocabulary(workspace: Workspace, field: str, source: str, model: ModelConfig) -> None:
    """Raises InputError where the tokens of the model in a stage directory are not those of `model`."""
    vocab_size = read_model_card(source)[0].vocab_size
    tokenizer = load_tokenizer(local_folder(source) / "tokenizer")
    same = tokenizer.fingerprint == workspace.tokenizer().fingerprint
    if not same or vocab_size != model.vocab_size:
        raise InputError(
            f"{field}: {source} has another tokenizer or vocabulary than the model that learns; "
            "name a teacher whose tokens mean the same"
        )


def moved_heads(
    teachers: Sequence[Any],
    models: Sequence[ModelConfig],
    meshes: Mapping[str, Any],
    move: Callable[[Any, Any, Any], Any] = reshard_across_meshes,
) -> tuple[Any, ...]:
    """The teachers' output matrices on the policy's mesh; none where the teachers are there.

    move: (array, mesh, its sharding there) -> the array there, or its shape.
    """
    mesh = meshes["policy"]
    if meshes["teacher"] is mesh:
        return ()
    moved = []
    for params, model in zip(teachers, models, strict=True):
        head = transformer.head(params)
        axes = transformer.head(transformer.axes(model))
        moved.append(move(head, mesh, param_shardings(mesh, head, axes)))
    return tuple(moved)


def _on_role_mesh(params: Any, axes: Any, mesh: Any, role_mesh: Any) -> Any:
    """Parameters on the mesh of their role. Adapters are merged where that is another one: their axes have no rules."""
    if not params or role_mesh is mesh:
        return params
    merged = lora.merge(params)
    return reshard_across_meshes(merged, role_mesh, param_shardings(role_mesh, merged, axes))


def check_lengths(config: PPOConfig, model: ModelConfig, stage: str) -> None:
    """Raises InputError where a prompt and its response, or a row of documents, exceed the model's context."""
    prompt, response = config.max_prompt_length, config.sampling.max_new_tokens
    model.row_length(
        prompt + response,
        f"{stage}.max_prompt_length",
        f"{prompt} + max_new_tokens {response}",
    )
    model.row_length(config.ptx.length, f"{stage}.ptx.length")


def with_value_head(trunk: Any, model: ModelConfig) -> Any:
    """A decoder with a scalar head of zeros."""
    head = {"kernel": jnp.zeros(model.embed_dim), "bias": jnp.zeros(())}
    return {"trunk": trunk, "head": head}


def initial_critic(config: PPOConfig, ref: Any, reward: Any, model: ModelConfig) -> Any:
    """The separate critic as it starts: a copy of the reward model, or the policy where there is none ({}).

    model: the reward model's config; the policy's where there is none.
    """
    if not reward:
        return with_value_head(ref, model)
    if config.critic_head == "zero":
        return with_value_head(reward["trunk"], model)
    return {"trunk": reward["trunk"], "head": reward["head"]}


def split_trainable(config: LoRAConfig, params: Any, axes: Any) -> tuple[Any, Any]:
    """(trainable, frozen) parts of parameters. Adapters of the configured shape that exist already are trained on.

    axes: logical axes of the parameters without adapters.
    """
    trunk = params.get("trunk", {})
    if config.rank and "lora" in trunk:
        fresh = jax.eval_shape(
            lambda: lora.init(config, lora.merge(params), jax.random.key(0), axes)
        )
        # Shapes rather than ranks decide: the adapted matrices have to be the same as well.
        present = {**params, "trunk": {"lora": {"layers": trunk["lora"]["layers"]}}}
        if jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, present):
            scale = {"scale": trunk["lora"]["scale"]}
            return present, {"trunk": {**trunk, "lora": scale}}
    merged = lora.merge(params)
    return lora.init(config, merged, jax.random.key(0), axes), lora.frozen(config, merged)


# --- The state, and everything as shapes: for checkpoints, which are restored through them, and for `jaxllm plan`.


class StateLayouts(NamedTuple):
    """Where the trained states live."""

    actor: StateLayout
    critic: StateLayout | None
    critic_mesh: Any


def initial_state(
    layouts: StateLayouts, config: PPOConfig, mesh: jax.sharding.Mesh, actor: Any, critic: Any
) -> PPOState:
    """The state before the first update. Donates `actor` and `critic`."""
    ema = {}
    if config.ema_decay:
        # A copy: the actor's own arrays are donated to its state.
        ema = jax.device_put(jax.tree.map(jnp.copy, actor), layouts.actor.shardings.params)
    if layouts.critic:
        # On the critic's own mesh, where its optimizer state is made too.
        shardings = layouts.critic.shardings.params
        critic = reshard_across_meshes(critic, layouts.critic_mesh, shardings)
        with jax.set_mesh(layouts.critic_mesh):
            critic = layouts.critic.init(critic)

    def number(dtype: Any, value: float) -> jax.Array:
        return jax.device_put(dtype(value), replicated(mesh))

    return _assemble(config, number, layouts.actor.init(actor), critic, ema)


def abstract_state(layouts: StateLayouts, config: PPOConfig, mesh: jax.sharding.Mesh) -> PPOState:
    """Shapes, dtypes and shardings of the state."""
    actor = layouts.actor.abstract
    critic = layouts.critic.abstract if layouts.critic else {}

    def number(dtype: Any, _: float) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((), dtype, sharding=replicated(mesh))

    return _assemble(config, number, actor, critic, actor.params if config.ema_decay else {})


def _assemble(config: PPOConfig, number: Any, actor: Any, critic: Any, ema: Any) -> PPOState:
    """number: (dtype, value) -> a scalar array, or its shape."""
    return PPOState(
        step=number(jnp.int32, 0),
        actor=actor,
        critic=critic,
        kl_coef=number(jnp.float32, config.kl_coef),
        ema=ema,
        moments=Moments(*(number(jnp.float32, 0) for _ in range(3))),
    )


def abstract_frozen(spec: RunSpec, meshes: Mapping[str, Any]) -> FrozenModels:
    """Shapes, dtypes and shardings of the frozen models."""
    config, mesh = spec.config, meshes["policy"]
    policy_family = scalar if config.shares_trunk else transformer
    policy = _abstract(policy_family, spec.model, mesh)
    reward = {}
    if config.has_reward_model:
        reward = _abstract(scalar, spec.reward_model, meshes["reward"])
    teachers = tuple(_abstract(transformer, model, meshes["teacher"]) for model in spec.teachers)
    return FrozenModels(
        ref=_abstract(transformer, spec.model, meshes["reference"]),
        actor_base=lora.place_frozen(config.lora, policy, replicated(mesh)),
        critic_base=_critic_base_shapes(spec, meshes["critic"]) if config.has_critic else {},
        reward=reward,
        teachers=teachers,
        moved_heads=moved_heads(
            teachers, spec.teachers, meshes, lambda head, _, there: with_shardings(head, there)
        ),
    )


def _abstract(family: Any, model: ModelConfig, mesh: Any) -> Any:
    """Shapes with shardings of a model of a family: `transformer`, or `scalar` with its head."""
    return place_params(mesh, family.abstract(model), family.axes(model))


def _critic_base_shapes(spec: RunSpec, mesh: Any) -> Any:
    placed = _abstract(scalar, spec.reward_model, mesh)
    return lora.place_frozen(spec.config.lora, placed, replicated(mesh))
