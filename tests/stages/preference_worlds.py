"""Worlds for stage dpo: two prompts whose every response can be listed, and rankings of them by known utilities."""

import functools

import jax
import numpy as np

from jaxllm import train
from jaxllm.data.loader import RankedExample, make_ranked_batch_at
from jaxllm.models import transformer
from jaxllm.models.config import ModelConfig
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.sharding import activation, param_shardings
from jaxllm.stages import preference
from jaxllm.stages.config import DPOConfig
from tests.stages.worlds import PROMPTS, Responses


class PreferenceWorld:
    """Responses of each prompt have utilities u; a ranking draws them one after another by exp(u) (Plackett-Luce).

    Of any two responses i is then ranked above j with probability 1 / (1 + exp(u_j - u_i)), whichever others there are:
    all pairs of a ranking have the probabilities of Bradley and Terry.

    labeled: instead of rankings there are single responses, each desirable with probability 1 / (1 + exp(-u)).
    """

    def __init__(
        self, config: DPOConfig, seed: int, vocab=3, length=3, layers=1, scale=0.7, K=0, count=64,
        labeled=False,
    ):  # fmt: skip
        self.config = config
        self.seed = seed
        self.mesh = make_mesh(MeshConfig())
        self.model = ModelConfig(
            vocab_size=vocab, max_length=16, num_layers=layers, embed_dim=64, num_heads=4, dtype="float32",
            init_std=0.1, tie_embeddings=False, position="learned",
        )  # fmt: skip
        self.space = Responses(vocab, length)
        self.lengths = self.space.mask.sum(1).astype(np.float64)
        rng = np.random.default_rng(seed)
        N = len(self.lengths)
        self.utilities = [scale * rng.normal(size=N) for _ in PROMPTS]
        self.choices = []  # of each prompt: which responses are ranked, int[count, K]
        self.ranks = []  # and their ranks, int[count, K]
        for utility in self.utilities:
            chosen = rng.permuted(np.tile(np.arange(N), (count, 1)), axis=1)[:, : K or N]
            # The order of u + Gumbel noise is a draw from Plackett-Luce.
            noisy = utility[chosen] + rng.gumbel(size=chosen.shape)
            self.choices.append(chosen)
            self.ranks.append(1 + (-noisy).argsort(1).argsort(1))
        self.labels = []  # of each prompt, if there are any: bool[count, K]
        if labeled:
            odds = [
                np.exp(u[chosen]) for u, chosen in zip(self.utilities, self.choices, strict=True)
            ]
            self.labels = [rng.random(x.shape) < x / (1 + x) for x in odds]
        shardings = param_shardings(
            self.mesh, transformer.abstract(self.model), transformer.axes(self.model)
        )
        self.ref = jax.device_put(transformer.init(self.model, jax.random.key(seed)), shardings)

    def examples(self) -> list[RankedExample]:
        """The rankings, prompts in turn; or the labeled responses, one by one."""
        made = []
        for index in range(len(self.choices[0])):
            for number, prompt in enumerate(PROMPTS):
                rows = [[*prompt, *self.space.rows[i]] for i in self.choices[number][index]]
                if self.labels:
                    labels = zip(rows, self.labels[number][index].tolist(), strict=True)
                    made += [
                        RankedExample([row], [1], len(prompt), labels=(label,))
                        for row, label in labels
                    ]
                else:
                    ranks = self.ranks[number][index].tolist()
                    made.append(RankedExample(rows, ranks, len(prompt)))
        return made

    def train(self):
        """The policy's parameters after the real stage's steps."""
        config, model, num_steps = self.config, self.model, self.config.num_steps
        with jax.set_mesh(self.mesh):
            step, _, layout = preference._program(
                self.mesh, "dpo", config, model, num_steps, self.seed
            )
            frozen = preference._frozen_params("dpo", config, self.ref)
            start = preference._initial_params("dpo", config, model, self.ref, seed=self.seed)
            batch_at = make_ranked_batch_at(
                self.examples(),
                batch_size=config.batch_size,
                seed=self.seed,
                sharding=activation(self.mesh, "batch", None, None),
            )
            run = train.Run(
                layout.init(start), functools.partial(step, **frozen), batch_at, num_steps, []
            )
            return jax.device_get(train.fit(run).params)

    def logprobs(self, params, prompt):
        """log pi(response | prompt) float64[N] of all responses."""
        return self.space.logprobs(params, self.model, prompt, 1.0)
