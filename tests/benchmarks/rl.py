"""An iteration of PPO and of GRPO beside Tunix's learners: the same shape, precision and machine, taking turns in one run.

    python tests/benchmarks/rl.py [--peer PYTHON] [--rounds 2]      PYTHON: an interpreter with google-tunix

A Llama of 16.9M parameters (d 384, 6 layers, 6 heads, vocabulary 8,192, head of its own) samples 64 responses of 128
tokens to prompts of 32, none ending early; a function scores them. One pass, one optimizer update, AdamW. PPO has a
critic of the same size and the KL in its rewards; GRPO has 4 responses to each of 16 prompts and the KL in its loss.
Both have the reference's log-probabilities, and both compute the old ones again before they learn.

Each measurement is a process of its own with glibc's huge pages and one CPU device. Prints the median seconds of an
iteration over all rounds, and ratios; of ours also how they are spent.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict

RESPONSES, GROUP, PROMPT, NEW, VOCAB, STEPS = 64, 4, 32, 128, 8192, 3

# Runs in the other interpreter.
PEER = """
import json, sys, time
import jax, jax.numpy as jnp, numpy as np, optax
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.rl import rl_cluster, utils
from tunix.rl.grpo import grpo_learner
from tunix.rl.ppo import ppo_learner
from tunix.rl.rollout import base_rollout
algorithm, dtype, responses, group, prompt, new, vocab, steps = *sys.argv[1:3], *map(int, sys.argv[3:])

class Numbers:  # a text is its token ids; neither padding nor the end is ever sampled
    def encode(self, text, **_): return list(map(int, text.split()))
    def decode(self, ids, **_): return " ".join(map(str, ids))
    def bos_id(self): return 0  # adds none
    def eos_id(self): return vocab + 1
    def pad_id(self): return vocab + 2

class Critic(llama.Llama3):  # the learner passes it segment_ids, which the model does not take
    def __call__(self, *args, segment_ids=None, **kwargs): return super().__call__(*args, **kwargs)

config = llama.ModelConfig(
    num_layers=6, vocab_size=vocab, embed_dim=384, hidden_dim=1024, num_heads=6, head_dim=64, num_kv_heads=6,
    rope_theta=10000, norm_eps=1e-5)
def model(cls=llama.Llama3):
    made = cls(config, rngs=nnx.Rngs(0))
    graph, state = nnx.split(made)
    return nnx.merge(graph, jax.tree.map(lambda x: (x * 0.02 if x.ndim > 1 else x).astype(dtype), state))
mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
role = rl_cluster.Role
roles = [role.ACTOR, role.CRITIC, role.REFERENCE, role.ROLLOUT]
is_ppo = algorithm == "ppo"
cluster_config = rl_cluster.ClusterConfig(
    role_to_mesh={each: mesh for each in (roles if is_ppo else roles[:1] + roles[2:])},
    training_config=rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.adamw(1e-5), critic_optimizer=optax.adamw(1e-5) if is_ppo else None,
        eval_every_n_steps=10**6, max_steps=steps + 2, mini_batch_size=responses if is_ppo else responses // group),
    rollout_config=base_rollout.RolloutConfig(
        max_tokens_to_generate=new, max_prompt_length=prompt, kv_cache_size=prompt + new + 8, temperature=1.0, top_p=None,
        eos_tokens=[vocab + 1]))
times = []
def reward(prompts, completions, **_):
    times.append(time.perf_counter())
    return [int(text.split()[0]) % 2 for text in completions]
rng = np.random.default_rng(0)
count = responses if is_ppo else responses // group
texts = [" ".join(map(str, rng.integers(1, vocab, prompt))) for _ in range(count * (steps + 2))]
batches = [{"prompts": np.array(texts[i : i + count])} for i in range(0, len(texts), count)]
with mesh:
    actor = model()
    critic = utils.create_critic_model(model(Critic)) if is_ppo else None
    cluster = rl_cluster.RLCluster(
        actor=actor, critic=critic, reference=model(), tokenizer=Numbers(), cluster_config=cluster_config)
    if is_ppo:
        learner = ppo_learner.PPOLearner(cluster, ppo_learner.PPOConfig(beta=0.05), reward_fns=reward)
    else:
        learner = grpo_learner.GRPOLearner(
            cluster, algo_config=grpo_learner.GRPOConfig(num_generations=group, beta=0.04), reward_fns=reward)
    learner.train(batches)
seconds = np.diff(times).tolist()
print(json.dumps({"seconds": seconds[1:], "parts": {}}))
"""


def reward(prompt: str, response: str) -> float:
    """Scores a response by its first token."""
    del prompt
    return float(int(response.split()[0]) % 2)


class Numbers:
    """A tokenizer whose texts are token ids; its end is never sampled."""

    pad_id = 0
    stop_ids = (-1, -1)

    @staticmethod
    def decode(ids) -> str:
        """The ids, with spaces between them."""
        return " ".join(map(str, ids))


def measure_ours(algorithm: str, dtype: str) -> None:
    """Times our iterations in this process and prints the seconds as JSON."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxllm.data.loader import PromptExample, make_prompt_batch_at
    from jaxllm.engine.config import SamplingConfig
    from jaxllm.models import transformer
    from jaxllm.models.config import preset
    from jaxllm.rl.config import GRPO, PPOConfig
    from jaxllm.rl.layouts import role_meshes
    from jaxllm.rl.programs import build_programs
    from jaxllm.rl.reward_config import RewardSource
    from jaxllm.rl.roles import FrozenModels, RunSpec, initial_critic, initial_state
    from jaxllm.rl.scoring import make_scorer
    from jaxllm.rl.update import HostWork, make_step
    from jaxllm.run import set_cpu_devices
    from jaxllm.runtime.config import MeshConfig
    from jaxllm.runtime.cpu import keep_pages
    from jaxllm.runtime.mesh import make_mesh
    from jaxllm.sharding import activation
    from jaxllm.stages import reinforce

    set_cpu_devices(1)
    mesh = make_mesh(MeshConfig())
    keep_pages()
    base = PPOConfig() if algorithm == "ppo" else GRPO
    config = dataclasses.replace(
        base,
        batch_size=RESPONSES,
        num_responses=1 if algorithm == "ppo" else GROUP,
        num_epochs=1,
        num_minibatches=1,
        max_prompt_length=PROMPT,
        sampling=SamplingConfig(max_new_tokens=NEW),
        rewards=(RewardSource(source="benchmarks.rl:reward"),),
    )
    model = preset(
        "small-14m",
        vocab_size=VOCAB,
        max_length=PROMPT + NEW,
        dtype=dtype,
        tie_embeddings=False,
        scan_unroll=6,
    )
    spec = RunSpec(config, model, model, Numbers.stop_ids, Numbers.pad_id, seed=0)
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, VOCAB, (RESPONSES * (STEPS + 2), PROMPT)).tolist()
    examples = [PromptExample([{"role": "user", "content": "x"}], ids) for ids in prompts]
    with jax.set_mesh(mesh):
        programs, layouts = build_programs(spec, role_meshes(config, mesh))
        ref = jax.jit(lambda: transformer.init(model, jax.random.key(0)))()
        copied = jax.tree.map(jnp.copy, ref)
        critic = (
            initial_critic(config, jax.tree.map(jnp.copy, ref), {}, model)
            if config.has_critic
            else {}
        )
        frozen = FrozenModels(ref, {}, {}, {})
        state = initial_state(layouts, config, mesh, copied, critic)
        host = HostWork(
            prompts_of=lambda batch: reinforce.prompts_of_rows(
                batch, examples, config.num_responses
            ),
            more_prompts=None,
            score=make_scorer(spec, programs, frozen, Numbers.decode, mesh, "rewards"),
            end_responses=lambda rollout: rollout,
            ptx_rows_at=None,
            ends_early=lambda metrics: False,
            log=None,
        )
        step = make_step(spec, programs, frozen, host, algorithm)
        batch_at = make_prompt_batch_at(
            examples,
            batch_size=config.num_prompts,
            seed=0,
            length=PROMPT,
            pad_id=Numbers.pad_id,
            sharding=activation(mesh, "batch", None),
        )
        seconds = []
        for number in range(2 + STEPS):
            began = time.perf_counter()
            state, metrics = jax.block_until_ready(step(state, batch_at(number)))
            seconds.append(time.perf_counter() - began)
        tokens, weight = metrics[f"{algorithm}/response_length"]
        assert float(tokens) / float(weight) == NEW, "a response ended early"
        parts = time_parts(programs, frozen, host, state, batch_at(0), spec)
    print(json.dumps({"seconds": seconds[2:], "parts": parts}))


def time_parts(programs, frozen, host, state, batch, spec) -> dict[str, float]:
    """Seconds of each program of one more iteration."""
    import jax

    from jaxllm.rl.update import collect, key_words, minibatch_rows, optimize

    parts: dict[str, float] = defaultdict(float)

    def run(program, *arguments, **resident):
        began = time.perf_counter()
        result = jax.block_until_ready(program(*arguments, **resident))
        parts[program.name] += time.perf_counter() - began
        return result

    began = time.perf_counter()
    key_of = lambda _: key_words(0, 0)
    experience, *_ = collect(spec.config, run, programs, frozen, host, state, batch, key_of)
    rows = minibatch_rows(spec, 0)
    optimize(run, programs, frozen, host, state.actor, state.critic, experience, rows)
    parts["host"] = time.perf_counter() - began - sum(parts.values())
    return {name: round(value, 3) for name, value in parts.items()}


def measured(command: list[str]) -> dict:
    """What a process reports."""
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.pathsep.join([os.path.dirname(folder), folder])
    env = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "JAX_PLATFORMS": "cpu"}
    if command[0] == sys.executable:
        env["PYTHONPATH"] = path
    run = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", default="", help="an interpreter with google-tunix")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--algorithms", nargs="*", default=["ppo", "grpo"])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--ours", nargs=2, help=argparse.SUPPRESS)  # in this process
    args = parser.parse_args()
    if args.ours:
        return measure_ours(*args.ours)
    for algorithm in args.algorithms:
        for dtype in args.dtypes:
            compare(algorithm, dtype, args.peer, args.rounds)


def compare(algorithm: str, dtype: str, peer: str, rounds: int) -> None:
    """Prints the seconds of an iteration of both, and their ratio."""
    runs = {"jaxllm": [sys.executable, __file__, "--ours", algorithm, dtype]}
    if peer:
        numbers = [str(n) for n in (RESPONSES, GROUP, PROMPT, NEW, VOCAB, STEPS)]
        runs["tunix"] = [peer, "-c", PEER, algorithm, dtype, *numbers]
    seconds = defaultdict(list)
    parts = {}
    for _ in range(rounds):
        for name, command in runs.items():
            found = measured(command)
            seconds[name] += found["seconds"]
            parts[name] = found["parts"]
    ours = statistics.median(seconds["jaxllm"])
    for name, found in seconds.items():
        median = statistics.median(found)
        print(
            f"{algorithm:5s} {dtype:9s} {name:7s} {median:6.2f} s an iteration ({min(found):.2f} to {max(found):.2f})  "
            f"jaxllm is {median / ours:.2f} times as fast"
        )
    print(f"      of jaxllm's: {parts['jaxllm']}", flush=True)


if __name__ == "__main__":
    main()
