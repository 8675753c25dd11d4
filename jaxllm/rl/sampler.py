"""Samples the responses of an update with the engine, on the mesh of the role `rollout`."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.engine import programs
from jaxllm.engine.config import EngineConfig
from jaxllm.engine.engine import Engine
from jaxllm.engine.geometry import Geometry, geometry_for, weights_shapes
from jaxllm.engine.responses import in_order, requests_for, rollout_of, row_key_words
from jaxllm.engine.rollouts import Rollout
from jaxllm.rl.roles import RunSpec
from jaxllm.runtime.transfer import fetch, place
from jaxllm.sharding import activation, batch_shards, rows_like
from jaxllm.train import Program


class Sampler:
    """(weights, prompts, words of the random key) -> Rollout; among the programs of an update it is the one called "rollout".

    Weights are on the sampler's mesh. Prompts come from the home mesh, where the rollout goes.
    """

    name = "rollout"
    computes = True

    def __init__(self, spec: RunSpec, mesh: Any, home: Any, flops: float, response_flops: float):
        """flops: of an update's prompts and responses together; response_flops: of the responses alone."""
        self.mesh = mesh
        self._spec, self._home = spec, home
        self._flops, self._response_flops = flops, response_flops
        self._engine: Engine | None = None

    @property
    def _longest(self) -> int:
        config = self._spec.config
        return config.max_prompt_length + config.sampling.max_new_tokens

    @property
    def _settings(self) -> EngineConfig:
        """The engine's settings, with no more slots than an update has responses."""
        config = self._spec.config
        return config.engine.for_rows(config.batch_size, batch_shards(self.mesh))

    def __call__(self, weights: Any, prompts: Any, key_data: Any) -> Rollout:
        """prompts: {tokens int32[b, P], mask bool[b, P], index int32[b]}; key_data: uint32[2]."""
        config, spec = self._spec.config, self._spec
        host = fetch(prompts)
        ids = [row[mask].tolist() for row, mask in zip(host["tokens"], host["mask"], strict=True)]
        key = jax.random.wrap_key_data(jnp.asarray(key_data))
        keys = row_key_words(key, host["index"], config.num_responses)
        requests = requests_for(ids, keys, config.sampling, spec.stop_ids, config.num_responses)
        with jax.set_mesh(self.mesh):
            engine = self._started(weights)
            responses = [*in_order(engine, requests)]
            # While the policy learns, the memory is needed for something else.
            engine.rest()
        rollout = rollout_of(
            [request.prompt for request in requests],
            responses,
            config.max_prompt_length,
            config.sampling.max_new_tokens,
            spec.pad_id,
        )
        return place(rollout, activation(self._home, "batch"))

    def _started(self, weights: Any) -> Engine:
        if self._engine is None:
            self._engine = Engine(
                None, self._spec.model, self.mesh, longest=self._longest, settings=self._settings
            )
        self._engine.set_params(weights)
        return self._engine

    def planned(self, weights: Any) -> tuple[list[Program], Rollout]:
        """What a call runs, with shapes instead of arrays, and the shapes of its result."""
        del weights  # the engine has them in another form
        geometry = geometry_for(self._spec.model, self.mesh, self._settings, self._longest)
        with jax.set_mesh(self.mesh):
            params = weights_shapes(geometry.config, self.mesh)
            parts = [
                self._planned_prefill(geometry, params),
                self._planned_decode(geometry, params),
            ]
        return parts, rows_like(self._home, self._rollout_shapes())

    def _planned_prefill(self, geometry: Geometry, params: Any) -> Program:
        config, settings = self._spec.config, geometry.settings
        blocks = -(-config.max_prompt_length // settings.block)
        # Responses to a prompt share what is prefilled.
        own_prompts = -(-config.num_prompts // geometry.num_shards)
        cache = geometry.cache_shapes()
        width = geometry.width_for(blocks)
        rows = geometry.sizes[-1]
        times = -(-own_prompts * blocks // settings.prefill_blocks)
        return Program(
            "prefill",
            self._compiled(programs.prefill, geometry),
            (params, cache, geometry.chunks_shapes(rows, width), geometry.rows_shapes(rows, width)),
            {},
            flops=(self._flops - self._response_flops) / times,
            times=times,
            trips=blocks,
            mesh=self.mesh,
            copied=(params, cache),
        )

    def _planned_decode(self, geometry: Geometry, params: Any) -> Program:
        config, settings = self._spec.config, geometry.settings
        rows = geometry.sizes[-1]
        rounds = -(-config.batch_size // (rows * geometry.num_shards))
        cache = geometry.cache_shapes()
        count = jax.ShapeDtypeStruct((), jnp.int32)
        times = rounds * -(-config.sampling.max_new_tokens // settings.steps)
        return Program(
            "decode",
            self._compiled(programs.decode_steps, geometry),
            (
                params,
                cache,
                geometry.rows_shapes(rows, geometry.width_for(geometry.width)),
                geometry.owners_shapes(),
                count,
            ),
            {},
            flops=self._response_flops / times,
            times=times,
            trips=settings.steps,
            mesh=self.mesh,
            copied=(params, cache),
        )

    def _compiled(self, function: Any, geometry: Geometry) -> Any:
        common = programs.common_rules([self._spec.config.sampling])
        settings = programs.Settings(geometry.config, common, 0, geometry.settings.steps)
        return programs.compiled(function, settings, self.mesh)

    def _rollout_shapes(self) -> Rollout:
        config = self._spec.config
        rows, prompt, response = (
            config.batch_size,
            config.max_prompt_length,
            config.sampling.max_new_tokens,
        )
        shape = jax.ShapeDtypeStruct
        arrays: Any = (
            shape((rows, prompt + response), jnp.int32),
            shape((rows, prompt), jnp.bool_),
            shape((rows, response), jnp.bool_),
            shape((rows, response), jnp.float32),
            shape((rows,), jnp.bool_),
        )
        return Rollout(*arrays)
