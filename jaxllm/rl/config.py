"""Settings of PPO, RLOO, GRPO and distillation. A comment beside a default names its source.

Schulman: Schulman et al. 2017, "Proximal policy optimization algorithms".
Ziegler: Ziegler et al. 2019, "Fine-tuning language models from human preferences".
Stiennon: Stiennon et al. 2020, "Learning to summarize from human feedback".
InstructGPT: Ouyang et al. 2022, "Training language models to follow instructions with human feedback".
Huang: Huang et al. 2024, "The N+ implementation details of RLHF with PPO".
DAPO: Yu et al. 2025, "DAPO: an open-source LLM reinforcement learning system at scale".
GKD: Agarwal et al. 2024, "On-policy distillation of language models: learning from self-generated mistakes".
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from annotated_types import Gt, Lt

from jaxllm.config import require
from jaxllm.config.ranges import (
    FINITE,
    NOT_BOOL,
    AnyFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Proportion,
    ProportionBelowOne,
)
from jaxllm.data.config import DataConfig
from jaxllm.engine.config import EngineConfig, SamplingConfig
from jaxllm.models.parts_config import LoRAConfig
from jaxllm.optim_config import OptimConfig
from jaxllm.rl.reward_config import OVERLONG, RewardSource
from jaxllm.runtime.config import CheckpointConfig, MeshConfig

# Advantages that compare the responses to one prompt.
COMPARING = ("rloo", "grpo", "dr_grpo")

# Adam's b2 of 0.95: InstructGPT; its eps of 1e-5: Huang, detail 21.
_OPTIM = OptimConfig(learning_rate=1e-5, schedule="constant", weight_decay=0.0, eps=1e-5)


@dataclasses.dataclass(frozen=True)
class PtxConfig:
    """PPO-ptx: the gradient of earlier training mixed into the policy's (InstructGPT, eq. 2)."""

    # InstructGPT uses 27.8 on sums over sequences; this coefficient weighs means per token.
    coef: NonNegativeFloat = 0.0
    """Weight of the next-token loss on `data`, relative to the policy loss; both are means per token. 0: off."""
    data: DataConfig = DataConfig()
    """Documents, or conversations as in sft, of which the assistant's tokens are targets; by default the data of pretrain."""
    batch_size: PositiveInt = 16
    """Rows of it per minibatch of responses."""
    length: NonNegativeInt = 0
    """Tokens per row; 0: model.max_length."""


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """A model whose distribution over the next token the policy learns."""

    stage_dir: str = ""
    """Stage directory of the teacher, whose tokenizer must be the policy's; empty: ppo."""
    weight: PositiveFloat = 1.0
    """Weight of its divergence in the loss, of which the policy loss has weight 1."""


@dataclasses.dataclass(frozen=True)
class RoleMesh(MeshConfig):
    """Another mesh over the same devices for one role. The policy itself trains on the stage's mesh."""

    role: Literal["rollout", "reference", "reward", "critic", "teacher"] = "rollout"
    """rollout: the policy while it samples; reference, reward, teacher: those models; critic: a separate critic."""


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Reinforcement learning from a reward. Sources of the defaults: jaxllm/rl/config.py."""

    RENAMED: ClassVar[Mapping[str, str]] = {"normalise_scores": "normalize_scores"}

    # --- Data and models.
    data: DataConfig = DataConfig()
    """Prompts; by default those of the sample stage."""
    init_from: str = ""
    """Stage directory of the initial policy, which is also the reference; empty: sft."""
    reward_from: str = ""
    """Stage directory of the reward model; empty: reward."""
    rewards: tuple[RewardSource, ...] = (RewardSource(),)
    """Terms of the score: the reward model, functions, patterns, length; none: only the teachers are learned from."""
    step_marker: str = "\n"
    """The text that ends a step of a response; the last step ends with the response."""
    teachers: tuple[TeacherConfig, ...] = ()
    """Models to distill: the policy's distribution over each token of its own responses is moved towards theirs (GKD)."""

    # --- The size of an update.
    advantages: Literal["gae", "rloo", "grpo", "dr_grpo", "grpo_steps", "reinforce_pp"] = "gae"
    """gae: from a critic (PPO); without one: rloo, grpo, dr_grpo: from a prompt's other responses; grpo_steps: from the rewards of steps of a prompt's responses; reinforce_pp: normalized over the batch."""
    num_responses: PositiveInt = 1
    """Responses sampled for each prompt."""
    num_steps: PositiveInt = 100
    """Updates. Each samples a batch of responses and makes num_epochs passes over it."""
    batch_size: PositiveInt = 64
    """Responses per update, num_responses of each prompt."""
    num_epochs: PositiveInt = 4  # Ziegler; Stiennon; Huang (InstructGPT: 1)
    """Passes over a batch of responses."""
    num_minibatches: PositiveInt = 4  # chosen for small batches (InstructGPT: 8 of 64)
    """Optimizer updates per pass."""
    sampling_rounds: PositiveInt = 1
    """Dynamic sampling (DAPO, section 3.2): groups of responses with equal scores give way to those of further prompts, in at most so many rounds of an update; 1: off."""
    num_micro: PositiveInt = 1
    """Microbatches per minibatch, whose gradients are accumulated."""

    # --- Staying near the reference.
    kl_coef: NonNegativeFloat = 0.05  # Huang (InstructGPT 0.02; Ziegler 0.15, adaptive)
    """Weight of the per-token KL to the reference in the reward."""
    kl_target: NonNegativeFloat = 0.0  # Ziegler: 6 nats, with kl_horizon 10000
    """Adapt kl_coef to reach this KL in nats per response (Ziegler et al. 2019, section 2.2); 0: kl_coef is fixed."""
    kl_horizon: PositiveFloat = 10_000.0
    """Time constant of that adaptation, in responses. Its error is clipped to 0.2, so doubling kl_coef takes five times as many."""
    kl_loss_coef: NonNegativeFloat = 0.0
    """Weight of an estimate of the KL in the loss, as in GRPO; in addition to kl_coef or instead of it."""
    kl_loss: Literal["k3", "k2"] = "k3"  # Shao et al. 2024, eq. 4 (k2: Hu et al. 2025)
    """That estimate. The mean gradient of k2 is that of KL(policy || reference), that of k3 of KL(reference || policy), for each token."""
    max_approx_kl: NonNegativeFloat = 0.0
    """End an update early when a minibatch's approximate KL to the old policy, in nats per token, exceeds this; 0: never."""

    # --- Teachers.
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    """From a teacher, over the whole vocabulary: KL(policy || teacher), KL(teacher || policy), or between them jsd."""
    jsd_beta: Annotated[float, NOT_BOOL, FINITE, Gt(0), Lt(1)] = (
        0.5  # the Jensen-Shannon divergence itself
    )
    """jsd: near 0 as forward_kl, near 1 as reverse_kl (GKD, section 2)."""

    # --- Advantages and losses.
    discount: Proportion = 1.0  # InstructGPT, appendix C.4; Ziegler
    """Discount of later rewards."""
    gae_lambda: Proportion = 0.95  # Ziegler; Huang (InstructGPT does not say)
    """Lambda of generalized advantage estimation."""
    ratio: Literal["token", "sequence"] = "token"
    """Probability ratio of each token, or of a response, as the mean over its tokens (GSPO); with sequence, clip at about 3e-4 and 4e-4 (Zheng et al. 2025, section 5.1)."""
    surrogate: Literal["clip", "cispo"] = "clip"
    """clip: tokens whose ratio has left its limits teach nothing (PPO); cispo: the clipped ratio weighs every token."""
    loss_mean: Literal["token", "response", "constant"] = "token"
    """The loss is a mean over tokens (DAPO), over responses of their means (GRPO's paper), or per response a sum over max_new_tokens (Dr. GRPO)."""
    clip_low: Proportion = 0.2  # Schulman; InstructGPT (two limits: DAPO)
    """The probability ratio is clipped from below at 1 - clip_low."""
    clip_high: NonNegativeFloat = 0.2
    """The probability ratio is clipped from above at 1 + clip_high."""
    dual_clip: NonNegativeFloat = 0.0
    """Bound the loss of a negative advantage by this times the advantage (Ye et al. 2020); above 1, or 0: off."""
    value_clip: NonNegativeFloat = 0.2  # Ziegler; Huang
    """A value may move this far from its old value in an update; 0: no limit."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of an entropy bonus per token."""
    whiten_advantages: bool = True  # Ziegler; Huang
    """Normalize advantages over the batch to mean 0 and (population) variance 1."""
    whiten_rewards: bool = False  # Huang (Ziegler: true)
    """Scale per-token rewards over the batch to variance 1, without shifting their mean."""
    normalize_scores: bool = False
    """Normalize scores by the running mean and standard deviation of all scores so far."""
    score_clip: NonNegativeFloat = 0.0
    """Clip scores to plus or minus this, after they are normalized; 0: off."""
    missing_end_score: AnyFloat = -1.0  # Ziegler; Huang, detail 13 ("EOS trick")
    """Score of a response that does not end, instead of the sum of all terms."""

    # --- Sampling.
    stop_strings: tuple[str, ...] = ()
    """A response ends with the token that completes one of these strings, and counts as finished."""
    max_prompt_length: PositiveInt = 64
    """Longest prompt in tokens. Longer ones are an error, or dropped, as data.too_long says."""
    meshes: tuple[RoleMesh, ...] = ()
    """Overrides of the mesh for single roles, such as [{role: rollout, tensor: 8}]."""
    # Temperature 1: InstructGPT, appendix C.4 (Ziegler and Huang: 0.7).
    sampling: SamplingConfig = SamplingConfig()
    """How responses are sampled. Filters and penalties must stay off: the loss models the temperature only."""
    sampler: Literal["engine", "trainer"] = "engine"
    """engine: the rollout engine. trainer: whole rows through the program that learns, for each token; the log-probabilities
    are then the same bit for bit. Slow: it tells whether the engine's rounding matters."""
    sampler_correction: Literal["off", "token", "sequence"] = "off"
    """Weigh tokens, or responses, by how much likelier the trainer finds them than the sampler did (Yao et al. 2025)."""
    sampler_cap: PositiveFloat = 2.0  # chosen: rounding alone leaves weights near 1
    """Largest such weight."""
    engine: EngineConfig = EngineConfig()
    """How many responses are decoded together, and with how much memory."""

    # --- The critic.
    # Separate, initialized from the reward model: InstructGPT; Stiennon.
    critic_trunk: Literal["separate", "shared"] = "separate"
    """separate: a critic with its own weights, initialized from the reward model; shared: a value head on the policy."""
    critic_head: Literal["copy", "zero"] = "copy"  # InstructGPT (zero: Huang, detail 11)
    """Initial head of the critic: the reward model's, or zero. Without a reward model it is zero."""
    value_coef: NonNegativeFloat = (
        0.1  # Ziegler; Huang. A separate critic has its own optimizer step.
    )
    """Weight of the value loss when the trunk is shared."""

    # --- The trained model.
    ema_decay: ProportionBelowOne = 0.0  # InstructGPT: 0.992 an update
    """Decay per update of a moving average of the policy, which becomes the stage's model; 0: off."""
    lora: LoRAConfig = LoRAConfig()
    """Train adapters of policy and critic; the reference is the policy without them."""
    ptx: PtxConfig = PtxConfig()
    """Pretraining gradients mixed in (PPO-ptx)."""

    # --- The loop.
    log_every: PositiveInt = 1
    """Updates per logged interval."""
    num_logged: NonNegativeInt = 4
    """Responses of each update that are written to rollouts.jsonl."""
    eval_every: PositiveInt = 10
    """Updates between evaluations on held-out prompts."""
    eval_prompts: PositiveInt = 64
    """Held-out prompts per evaluation."""
    # 1e-5: Ziegler (InstructGPT about 9e-6; Huang 3e-6). Small models take more.
    actor: OptimConfig = _OPTIM
    """The policy's optimizer."""
    critic: OptimConfig = _OPTIM  # InstructGPT: 9e-6
    """The critic's optimizer."""
    checkpoint: CheckpointConfig = CheckpointConfig(save_every=20)
    """When to save."""

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_sampling()
        self._check_rewards()
        self._check_teachers()
        self._check_meshes()
        for role, optim in (("actor", self.actor), ("critic", self.critic)):
            # Responses would come from the average, and the gradient from elsewhere: no minibatch would be on-policy.
            require(
                optim.kind != "schedule_free",
                f"{role}.kind: schedule_free learns at other weights than it samples from; set another kind",
            )
        self._check_objective()

    def _check_sizes(self) -> None:
        require(
            self.batch_size % (self.num_minibatches * self.num_micro) == 0,
            "num_minibatches: num_minibatches x num_micro must divide batch_size",
        )
        require(
            self.batch_size % self.num_responses == 0,
            f"num_responses: {self.num_responses} does not divide batch_size {self.batch_size}",
        )
        require(
            self.advantages not in (*COMPARING, "grpo_steps") or self.num_responses > 1,
            f"num_responses: {self.advantages} needs at least 2 responses to each prompt",
        )
        require(
            self.sampling_rounds == 1 or (self.advantages != "gae" and self.num_responses > 1),
            "sampling_rounds: only groups of responses can be dropped; set 1, or num_responses and other advantages than gae",
        )

    def _check_objective(self) -> None:
        require(
            not self.dual_clip or self.dual_clip > 1, "dual_clip: must be above 1, or 0 for off"
        )
        require(
            not self.dual_clip or (self.surrogate == "clip" and self.ratio == "token"),
            "dual_clip: bounds the ratio of a token under surrogate clip; set 0",
        )
        require(
            self.ratio == "token" or self.advantages in COMPARING,
            f"ratio: sequence needs one advantage per response; set advantages to one of {', '.join(COMPARING)}",
        )
        require(
            self.advantages != "grpo_steps" or self.pays_steps,
            "advantages: grpo_steps compares rewards of steps, and rewards names none; add model_steps or steps:module:function",
        )
        require(
            self.advantages != "grpo_steps" or not self.kl_coef,
            "kl_coef: grpo_steps compares what is paid where steps end, and this KL is paid at every token; set 0 and use kl_loss_coef",
        )
        require(
            self.loss_mean == "token" or not self.shares_trunk,
            "loss_mean: the value loss of a shared trunk is a mean over tokens; set token",
        )

    def _check_sampling(self) -> None:
        require(
            not self.sampling.greedy,
            "sampling.temperature: a policy gradient needs a temperature of at least 1e-5",
        )
        require(
            not self.sampling.top_k and self.sampling.top_p == 1 and not self.sampling.min_p,
            "sampling.top_k: top_k, top_p and min_p must be off: the loss does not model the truncated distribution",
        )
        require(
            not self.sampling.penalizes,
            "sampling.repetition_penalty: penalties must be off: the loss does not model them",
        )
        require(
            all(self.stop_strings),
            "stop_strings: an empty string would end every response at once; remove it",
        )

    def _check_rewards(self) -> None:
        names = [source.source for source in self.rewards]
        for name in names:
            require(names.count(name) == 1, f"rewards: {name} is given twice; add up the weights")
            if name.startswith(OVERLONG):
                self._check_buffer(name.removeprefix(OVERLONG))

        require(bool(self.step_marker), "step_marker: an empty text ends no step; name one")
        require(
            not self.pays_steps or not (self.normalize_scores or self.score_clip),
            "normalize_scores: it and score_clip shape the score of a whole response; set both off beside rewards of steps",
        )

    def _check_buffer(self, buffer: str) -> None:
        longest = self.sampling.max_new_tokens
        require(
            buffer.isascii() and buffer.isdigit() and 1 <= int(buffer) <= longest,
            f"rewards: {OVERLONG}{buffer} needs a number of tokens from 1 to max_new_tokens {longest}",
        )

    def _check_teachers(self) -> None:
        require(
            bool(self.rewards or self.teachers),
            "rewards: name at least one source, or teachers to learn from",
        )
        require(
            bool(self.rewards) or not self.kl_coef,
            "kl_coef: the KL is weighed against rewards, and there are none; set 0",
        )
        require(
            bool(self.rewards) or self.sampling_rounds == 1,
            "sampling_rounds: without rewards no group has a spread; set 1",
        )
        places = [teacher.stage_dir for teacher in self.teachers]
        for place in places:
            require(places.count(place) == 1, f"teachers: {place or 'ppo'} is given twice")

    def _check_meshes(self) -> None:
        roles = [mesh.role for mesh in self.meshes]
        require(len(set(roles)) == len(roles), "meshes: a role can have one mesh only")
        require(
            self.has_critic or "critic" not in roles,
            "meshes: there is no separate critic; remove the role critic",
        )
        require(
            bool(self.teachers) or "teacher" not in roles,
            "meshes: there is no teacher; remove the role teacher",
        )
        require(
            self.sampler == "engine" or "rollout" not in roles,
            "sampler: trainer samples on the mesh of the policy; remove the role rollout from meshes",
        )

    @property
    def has_values(self) -> bool:
        """Whether advantages come from values, of a critic of either kind."""
        return bool(self.rewards) and self.advantages == "gae"

    @property
    def has_critic(self) -> bool:
        """Whether the critic has its own weights."""
        return self.has_values and self.critic_trunk == "separate"

    @property
    def shares_trunk(self) -> bool:
        """Whether the critic is a value head on the policy's trunk."""
        return self.has_values and self.critic_trunk == "shared"

    @property
    def normalizes_advantages(self) -> bool:
        """Whether advantages are normalized over the batch: REINFORCE++ is defined by it."""
        return self.whiten_advantages or self.advantages == "reinforce_pp"

    @property
    def has_reward_model(self) -> bool:
        """Whether a term of the score, or of its steps, is the reward model's."""
        return any(source.source in ("model", "model_steps") for source in self.rewards)

    @property
    def pays_steps(self) -> bool:
        """Whether a term of the score is a reward for each step."""
        return any(source.pays_steps for source in self.rewards)

    @property
    def scores_responses(self) -> bool:
        """Whether a term of the score is of the whole response."""
        return any(not source.pays_steps for source in self.rewards)

    @property
    def num_prompts(self) -> int:
        """Prompts per update."""
        return self.batch_size // self.num_responses

    @property
    def minibatch_size(self) -> int:
        """Responses per minibatch."""
        return self.batch_size // self.num_minibatches

    @property
    def updates_per_step(self) -> int:
        """Minibatches per update, which is optimizer updates unless the update ends early."""
        return self.num_epochs * self.num_minibatches


# Ahmadian et al. 2024: the whole response is one action, with its KL in the reward, and one step per batch.
RLOO = PPOConfig(
    advantages="rloo",
    num_responses=4,
    num_epochs=1,
    num_minibatches=1,
    whiten_advantages=False,
)
# Shao et al. 2024: scores normalized within a prompt's responses, with the k3 estimate in the loss.
GRPO = dataclasses.replace(
    RLOO,
    advantages="grpo",
    num_responses=8,
    kl_coef=0.0,
    kl_loss_coef=0.04,
)
# Agarwal et al. 2024, on-policy: the student's own responses, each learned from once, and no reward.
DISTILL = PPOConfig(
    rewards=(),
    teachers=(TeacherConfig(),),
    kl_coef=0.0,
    num_epochs=1,
    num_minibatches=1,
)
