"""The blocks of the decoder in Flax NNX: MLP, experts, the residual block, and the module for multi-token prediction."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.models.attention import UseWindow
from jaxllm.models.block_cache import LayerBlocks, View
from jaxllm.models.config import ModelConfig
from jaxllm.models.linear import linear, swiglu
from jaxllm.models.moe import moe
from jaxllm.models.norm import Norm
from jaxllm.models.parameters import bias, expand_like, matrix
from jaxllm.models.self_attention import Attention, LatentAttention, SequenceOrder
from jaxllm.sharding import constrain, constrain_residual, in_blocks

# Fewest hidden units per block of the MLP, where whole layers are recomputed in the backward pass.
_MLP_BLOCK = 3072
_TILE = 128  # hidden units of a block are a multiple of it, as matrix units compute in tiles


class MLP(nnx.Module):
    """SwiGLU or GeGLU (Shazeer 2020, eq. 6), or GELU with the tanh approximation (Hendrycks and Gimpel 2016)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, size: int = 0):
        c = self.config = config
        size = size or c.mlp_dim
        embed = {"embed": c.embed_dim}
        hidden = {"mlp": size}
        self.gated = c.mlp != "gelu"
        if self.gated:
            self.gate = matrix(rngs, c, embed, hidden)
        self.up = matrix(rngs, c, embed, hidden)
        self.down = matrix(rngs, c, hidden, embed, place="last")
        if c.bias:
            self.up_bias = bias(c, hidden)
            self.down_bias = bias(c, {"norm": c.embed_dim}, place="last")
            if self.gated:
                self.gate_bias = bias(c, hidden)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        weights = {"up": self.up[...], "down": self.down[...]}
        if self.gated:
            weights["gate"] = self.gate[...]
        if self.config.bias:
            weights["up_bias"] = self.up_bias[...]
            if self.gated:
                weights["gate_bias"] = self.gate_bias[...]
        # Blocks save memory only where the activations are not kept anyway.
        count = _num_blocks(weights["up"].shape[1]) if self.config.recomputes else 1
        y = self._in_blocks(x, weights, count) if count > 1 else self._hidden_units(x, weights)
        return y + expand_like(self.down_bias[...], y) if self.config.bias else y

    def _hidden_units(self, x: jax.Array, weights: dict[str, jax.Array]) -> jax.Array:
        """x [B, T, D] through some of the F hidden units: gate, up [D, F], their biases [F], down [F, D]."""

        def project(name: str) -> jax.Array:
            y = linear(x, weights[name])
            bias = weights.get(f"{name}_bias")
            return y if bias is None else y + expand_like(bias, y)

        if self.config.mlp == "swiglu":
            hidden = swiglu(project("gate"), project("up"))
        elif self.gated:
            hidden = jax.nn.gelu(project("gate")) * project("up")
        else:
            hidden = jax.nn.gelu(project("up"))
        # [B, T, F], with F over the tensor axis; the product below sums over it.
        hidden = constrain(hidden, "batch", "seq", "mlp")
        return linear(hidden, weights["down"])

    def _in_blocks(self, x: jax.Array, weights: dict[str, jax.Array], count: int) -> jax.Array:
        """The hidden units in `count` blocks, so that only one block's activations and gathered weights are in memory.

        Each block is recomputed in the backward pass. That costs nothing more, since the layer is recomputed anyway.
        Sums over blocks are in float32: of the outputs, and of the gradients of x.
        """
        wide = x.astype(jnp.float32)
        narrow = jax.lax.stop_gradient(x)
        blocks = {
            # F is the first dimension of down, and the last of all others.
            name: in_blocks(leaf, 0 if name == "down" else leaf.ndim - 1, count)
            for name, leaf in weights.items()
        }

        def compute(block: dict[str, jax.Array]) -> jax.Array:
            return self._hidden_units(_with_wide_gradient(narrow, wide), block)

        compute = jax.checkpoint(compute, prevent_cse=False)

        def add(total: jax.Array, block: dict[str, jax.Array]) -> tuple[jax.Array, None]:
            return constrain_residual(total + compute(block).astype(jnp.float32)), None

        total, _ = jax.lax.scan(add, jnp.zeros(x.shape, jnp.float32), blocks)
        return total.astype(x.dtype)


@jax.custom_vjp
def _with_wide_gradient(x: jax.Array, wide: jax.Array) -> jax.Array:
    """x, whose gradient goes to `wide`, the same in float32, where gradients of several uses are added.

    `wide.astype(x.dtype)` would be the same, but it keeps and reads the array in float32.
    """
    del wide
    return x


def _same(x: jax.Array, wide: jax.Array) -> tuple[jax.Array, None]:
    del wide
    return x, None


def _widened(_: None, dy: jax.Array) -> tuple[None, jax.Array]:
    return None, dy.astype(jnp.float32)


_with_wide_gradient.defvjp(_same, _widened)


def _num_blocks(size: int) -> int:
    """The largest number of equal blocks of whole tiles with at least _MLP_BLOCK hidden units each."""
    tile = min(_TILE, _MLP_BLOCK)
    counts = range(size // _MLP_BLOCK, 0, -1)
    return next((n for n in counts if size % (n * tile) == 0), 1)


class Experts(nnx.Module):
    """A layer's routed experts with their router, and the shared experts that every token goes to."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c = self.config = config
        experts = c.moe.num_experts
        size = c.moe.mlp_dim or c.mlp_dim
        self.router = matrix(rngs, c, {"embed": c.embed_dim}, {"router": experts})
        if c.moe.router == "sigmoid":
            self.router_bias = bias(c, {"router": experts})
        stack, embed, hidden = {"experts": experts}, {"expert_embed": c.embed_dim}, {"mlp": size}
        self.experts = nnx.Dict(
            gate=matrix(rngs, c, embed, hidden, stack),
            up=matrix(rngs, c, embed, hidden, stack),
            down=matrix(rngs, c, hidden, embed, stack, place="last"),
        )
        if c.moe.num_shared:
            self.shared = MLP(c, rngs, c.moe.num_shared * size)

    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, Any]:
        """x [B, T, D], mask bool[B, T] (False: padding) -> ([B, T, D], the router's `moe.Load`)."""
        # The router stays float32: the choice of experts must not depend on rounding.
        weights: dict[str, Any] = {"router": self.router[...]}
        if self.config.moe.router == "sigmoid":
            # Its gradient comes from `moe.balance` alone.
            weights["router_bias"] = jax.lax.stop_gradient(self.router_bias[...])
        weights["experts"] = {name: w[...].astype(x.dtype) for name, w in self.experts.items()}
        y, load = moe(x, mask, weights, self.config.moe, in_parts=self.config.recomputes)
        return y + self.shared(x) if self.config.moe.num_shared else y, load


class Block(nnx.Module):
    """Residual block: x + attention(norm(x)), then x + mlp(norm(x)); norms before, after (OLMo 2) or both (Gemma 2)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.attention = (LatentAttention if config.mla.kv_rank else Attention)(config, rngs)
        self.mlp = Experts(config, rngs) if config.moe.num_experts else MLP(config, rngs)
        # Attribute names are names in checkpoints.
        if config.norm_place != "after":
            self.attention_norm = Norm(config)
            self.mlp_norm = Norm(config)
        if config.norm_place != "before":
            self.attention_post_norm = Norm(config, place="last")
            self.mlp_post_norm = Norm(config, place="last")

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        use_window: UseWindow,
        order: SequenceOrder = None,
    ) -> tuple[jax.Array, Any]:
        """One layer: x [B, T, D], positions and segment_ids int32[B, T] -> ([B, T, D], `moe.Load` or {}).

        order: the permutation of the T positions, if they are permuted (`sharding.zigzag_order`).
        """
        y = self.attention(self._before(x, "attention"), positions, segment_ids, use_window, order)
        return self._add_mlp(self._add(x, y, "attention"), segment_ids > 0)

    def in_blocks(
        self,
        x: jax.Array,
        view: View,
        cache: LayerBlocks,
        layer: jax.Array | None,
        use_window: UseWindow,
    ) -> tuple[jax.Array, LayerBlocks]:
        """The layer for new tokens; arguments and result as `Attention.in_blocks`."""
        before = self._before(x, "attention")
        y, cache = self.attention.in_blocks(before, view, cache, layer, use_window)
        # Padding goes through no expert.
        x, _ = self._add_mlp(self._add(x, y, "attention"), view.positions >= 0)
        return x, cache

    def _add_mlp(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, Any]:
        # Only experts must know the padding: elsewhere its results are ignored later.
        y = self._before(x, "mlp")
        if isinstance(self.mlp, Experts):
            y, load = self.mlp(y, mask)
        else:
            y, load = self.mlp(y), {}
        return self._add(x, y, "mlp"), load

    def _before(self, x: jax.Array, name: str) -> jax.Array:
        """The input of the attention or the MLP, gathered over the tensor axis."""
        if self.config.norm_place != "after":
            x = getattr(self, f"{name}_norm")(x)
        # Gathered explicitly: XLA would choose to gather the weights, which are larger.
        return constrain(x, "batch", "seq", "embed")

    def _add(self, x: jax.Array, y: jax.Array, name: str) -> jax.Array:
        """x plus the output y of the attention or the MLP, as the residual stream is sharded."""
        if self.config.norm_place != "before":
            y = getattr(self, f"{name}_post_norm")(y)
        return constrain_residual(x + y)


class MTPModule(nnx.Module):
    """Predicts one token further, from a hidden state and the next token (DeepSeek-V3, section 2.2, eq. 21 to 23)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.embed_norm = Norm(config)
        self.hidden_norm = Norm(config)
        self.norm = Norm(config)
        self.project = matrix(
            rngs, config, {"latent": 2 * config.embed_dim}, {"embed": config.embed_dim}
        )
        self.block = Block(config, rngs)

    def __call__(
        self, hidden: jax.Array, embedded: jax.Array, positions: jax.Array, segment_ids: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Normed hidden states [B, T, D] for the next module or the head, and the `moe.Load` or {}.

        Args:
          hidden: [B, T, D], of the decoder or of the module before.
          embedded: [B, T, D], embeddings of the tokens that `hidden` predicts.
          positions: int32[B, T].
          segment_ids: int32[B, T].
        """
        # Eq. 21, in the order of the published weights: the embedding first.
        both = jnp.concatenate([self.embed_norm(embedded), self.hidden_norm(hidden)], -1)
        x = constrain(linear(both, self.project[...]), "batch", "seq", "embed")
        # Without a window; the positions are in the order of the row.
        x, load = self.block(x, positions, segment_ids, False)
        return self.norm(x), load
