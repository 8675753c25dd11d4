"""The decoder as functions of plain nested dicts: `init`, `apply`, `head`; `models.decode` has the cached forward pass.

Parameters:

    embed         {"tokens" [V, D], "positions" [max_length, D] if learned}
    dense_layers  first layers, if they have a dense MLP and the others experts: `layers.Block`, stacked [L, ...]
    layers        the other layers, stacked
    norm          the final norm
    head          {"tokens" [V, D]}, if not tied to the embedding
    mtp           `layers.MTPModule`, stacked, if there are any

Layers are always stacked, so there is one checkpoint layout. NNX is used inside this package only: a module is split
into a graph definition (cached per config) and a dict of arrays, and merged where it is called.

Shapes: B rows, T positions, D model width, V vocabulary, L layers of a stack.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxllm.models import lora, moe, scaling
from jaxllm.models.attention import ATTENDED
from jaxllm.models.config import ModelConfig
from jaxllm.models.layers import Block, MTPModule
from jaxllm.models.norm import Norm
from jaxllm.models.parameters import Axes, table
from jaxllm.models.pipeline import staged
from jaxllm.sharding import constrain_residual, constrain_weights, undo_zigzag, zigzag_order

Params = dict[str, Any]

# (name in the parameters, config of its blocks, numbers of its layers in the model)
Stack = tuple[str, ModelConfig, range]

# The name under which `jax.checkpoint` policies know the input of a block.
_INPUT = "block_input"


class Embedding(nnx.Module):
    """Tables of token embeddings and, if they are learned, of positions."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width = config.embed_dim
        scale = scaling.of_table(config)
        self.tokens = table(rngs, config, scale, vocab=config.vocab_size, embed=width)
        if config.position == "learned":
            # They are added after the token's embedding is multiplied (`embed`).
            scale = scale._replace(folded=1.0)
            self.positions = table(rngs, config, scale, positions=config.max_length, embed=width)


class Head(nnx.Module):
    """The output matrix, where it is not the embedding table."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        scale = scaling.of_head(config)
        self.tokens = table(rngs, config, scale, vocab=config.vocab_size, embed=config.embed_dim)


class FinalNorm(nnx.Module):
    """The norm after the last layer."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        del rngs
        self.norm = Norm(config, scale=scaling.of_final_norm(config))


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters, the same on every mesh (jit it with out_shardings to create them sharded)."""
    embed_key, head_key, layers_key = jax.random.split(key, 3)
    # One key per layer of the model, so that the stacks do not change a layer's parameters.
    layer_keys = jax.random.split(layers_key, config.num_layers)
    # The final norm has no random numbers, so it can share the key of the head.
    params: Params = {
        "embed": _init(Embedding, config, embed_key),
        "norm": _init(FinalNorm, config, head_key),
    }
    for name, block, numbers in stacks(config):
        # vmap stacks the layers along a new first dimension.
        init_block = functools.partial(_init, Block, block)
        params[name] = jax.vmap(init_block)(layer_keys[numbers.start : numbers.stop])
    if not config.tie_embeddings:
        params["head"] = _init(Head, config, head_key)
    if config.mtp_modules:
        keys = jax.random.split(jax.random.fold_in(layers_key, 1), config.mtp_modules)
        params["mtp"] = jax.vmap(functools.partial(_init, MTPModule, config))(keys)
    return params


def axes(config: ModelConfig) -> Params:
    """The `parameters.Axes` of every parameter, a tree like that of `init`."""
    tree = {"embed": _axes(Embedding, config), "norm": _axes(FinalNorm, config)}
    for name, block, _ in stacks(config):
        tree[name] = _stacked(_axes(Block, block), "layers")
    if config.mtp_modules:
        tree["mtp"] = _stacked(_axes(MTPModule, config), "modules")
    if not config.tie_embeddings:
        tree["head"] = _axes(Head, config)
    return tree


def _stacked(tree: Params, name: str) -> Params:
    return jax.tree.map(lambda axes: axes.stacked(name), tree)


def stacks(config: ModelConfig) -> list[Stack]:
    """The stacks of layers, first to last: one, or two where the first layers have a dense MLP and the others experts."""
    first_dense = config.moe.first_dense
    dense = dataclasses.replace(config, moe=moe.MoEConfig())
    # Without experts first_dense is 0, and the first stack is empty.
    candidates = [
        ("dense_layers", dense, range(first_dense)),
        ("layers", config, range(first_dense, config.num_layers)),
    ]
    return [stack for stack in candidates if stack[2]]


def abstract(config: ModelConfig) -> Params:
    """Shapes and dtypes of the parameters, without computing them."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


@functools.cache  # a search asks for it hundreds of times
def num_params(config: ModelConfig) -> int:
    """Number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config)))


def apply(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
) -> jax.Array:
    """Token ids -> hidden states [B, T, D] after the final norm, in config.dtype.

    Args:
      params: of the decoder; adapters among them (`lora.join`) are added layer by layer.
      config: of the decoder.
      tokens: int32[B, T].
      segment_ids: int32[B, T], the number of each token's document in its row, 0 for padding; None: one document.
      positions: int32[B, T], restarting in each document; None: 0 to T - 1.
    """
    return apply_routed(params, config, tokens, segment_ids, positions)[0]


def apply_routed(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """`apply`, together with the routers' `moe.Load`: of arrays [L, ...], or {} without experts."""
    if segment_ids is None:
        segment_ids = jnp.ones_like(tokens)
    if positions is None:
        row = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        positions = jnp.broadcast_to(row[None], tokens.shape)
    # With context parallelism, positions are permuted for balance until the last layer; see `sharding.zigzag_order`.
    order = zigzag_order(tokens.shape[1])
    if order is not None:
        tokens = tokens[:, order]
        segment_ids = segment_ids[:, order]
        positions = positions[:, order]
    x = embed(params, config, tokens, positions)
    load: Any = {}
    for stack in stacks(config):
        # The last stack is the one with experts.
        x, load = _apply_stack(params, config, stack, x, positions, segment_ids, order)
    if order is not None:
        x = constrain_residual(undo_zigzag(x))
    return final_norm(params, config, x), load


def _apply_stack(
    params: Params,
    config: ModelConfig,
    stack: Stack,
    x: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    order: np.ndarray | None,
) -> tuple[jax.Array, Any]:
    """Scans over the layers of a stack, in pipeline stages if the mesh has them; returns x and their `moe.Load`."""
    name, block, numbers = stack
    adapters = params.get("lora", {})
    windowed = [config.windowed(i) for i in numbers]

    def run(layers: Any, x: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> Any:
        def body(x: jax.Array, layer: tuple[Any, ...]) -> tuple[jax.Array, Any]:
            weights, layer_adapters, layer_windowed = layer
            weights = lora.add(weights, layer_adapters, adapters.get("scale"))
            module = merge_module(Block, block, weights)
            # If it is the same for all layers it is a constant, and the mask is compiled for it.
            use_window = windowed[0] if len(set(windowed)) == 1 else layer_windowed
            return module(checkpoint_name(x, _INPUT), positions, segment_ids, use_window, order)

        return jax.lax.scan(_remat(body, config), x, layers, unroll=config.scan_unroll)

    # Each leaf is [L, ...]; the scan takes one layer of each at a time.
    layers = (params[name], adapters.get(name, {}), jnp.array(windowed))
    return staged(run, layers, x, positions, segment_ids)


def apply_mtp(
    params: Params,
    config: ModelConfig,
    hidden: jax.Array,
    tokens: jax.Array,
    segment_ids: jax.Array,
    positions: jax.Array,
) -> tuple[list[jax.Array], Any]:
    """Runs the modules for multi-token prediction (DeepSeek-V3, section 2.2).

    Module k = 1, 2, ... sees token t + k at position t and predicts token t + k + 1. With the row a b c d e:

        position             0 1 2 3 4
        decoder predicts     b c d e -
        module 1 embeds      b c d e -      and predicts   c d e - -
        module 2 embeds      c d e - -      and predicts   d e - - -

    Near the end of a segment the embedded token belongs to the next segment. Hidden states there predict nothing, and no
    earlier position sees them.

    Args:
      params: of the decoder.
      config: of the decoder.
      hidden: [B, T, D], as `apply` returns.
      tokens: int32[B, T].
      segment_ids: int32[B, T].
      positions: int32[B, T].

    Returns:
      (hidden states [B, T, D] of each module, the `moe.Load` of their experts with arrays [M, ...] or {}).
    """

    def run(module: Params, hidden: jax.Array, embedded: jax.Array) -> tuple[jax.Array, Any]:
        layer = merge_module(MTPModule, config, module)
        return layer(hidden, embedded, positions, segment_ids)

    run = _remat(run, config)
    states = []
    loads = []
    for k in range(config.mtp_modules):
        # a b c d e -> b c d e 0: one token further for each module.
        tokens = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
        module = jax.tree.map(lambda w, k=k: w[k], params["mtp"])
        hidden, load = run(module, hidden, embed(params, config, tokens, positions))
        states.append(hidden)
        loads.append(load)
    return states, jax.tree.map(lambda *x: jnp.stack(x), *loads)


def routing_loss(
    layers: Params, config: ModelConfig, load: moe.Load
) -> tuple[jax.Array, dict[str, Any]]:
    """The routers' part of the loss, and metrics of their balance.

    Args:
      layers: parameters of the layers with experts, stacked.
      config: of the decoder.
      load: of these layers.

    Returns:
      (float32[], to add to the mean loss of a token; {metric: (sum, weight)}).
    """
    # These metrics are means over layers already, so each microbatch weighs the same.
    weight = jnp.ones(())
    pairs = jnp.maximum(load.load.sum(-1), 1.0)  # of a token and an expert, [L]
    total = moe.balance(load, layers["mlp"].get("router_bias"), config.moe)
    # The share of the busiest expert over that at perfect balance, a mean over layers.
    busiest = (load.load.max(-1) * config.moe.num_experts / pairs).mean()
    idle = (load.load == 0).astype(jnp.float32).mean()
    metrics = {
        "router/balance_loss": (jax.lax.stop_gradient(total), weight),
        "router/busiest_expert": (jax.lax.stop_gradient(busiest), weight),
        "router/idle_experts": (jax.lax.stop_gradient(idle), weight),
        "router/dropped": (load.dropped.sum(), load.load.sum()),
    }
    return total, metrics


def head(params: Params) -> jax.Array:
    """The output matrix float32[V, D]: hidden @ head.T are the logits."""
    return params["head"]["tokens"] if "head" in params else params["embed"]["tokens"]


def grow_vocab(params: Params, vocab_size: int) -> Params:
    """Parameters with at least `vocab_size` rows in embedding and head; a new row is the mean of the old ones."""

    def grow(table: jax.Array) -> jax.Array:
        missing = max(vocab_size - table.shape[0], 0)
        rows = jnp.broadcast_to(table.mean(0, keepdims=True), (missing, table.shape[1]))
        return jnp.concatenate([table, rows])

    # Until it is trained, a new token is like the average one.
    grown = dict(params)
    for name in ("embed", "head"):
        if name in params:
            grown[name] = {**params[name], "tokens": grow(params[name]["tokens"])}
    return grown


def flops_per_token(config: ModelConfig, length: int, *, scored: bool = True) -> float:
    """Training FLOPs per token in rows of `length`; a third of them are in the forward pass.

    They are 6 per matrix parameter that the token is multiplied by, and 6 N H T per layer for causal attention with N heads
    of size H (PaLM, Chowdhery et al. 2022, appendix B, counts 12 L N H T for full attention; a causal mask needs
    half). A window leaves out what is beyond it. scored: count the output head, which a model with a scalar head lacks.
    """
    c = config
    num_heads = scored + c.mtp_modules  # each a product with the output matrix
    matrices = num_heads * c.vocab_size * c.embed_dim
    for _, block, numbers in stacks(c):
        matrices += len(numbers) * _matrix_parameters(block)
    # A module projects 2 D to D before its block.
    matrices += c.mtp_modules * (_matrix_parameters(c) + 2 * c.embed_dim**2)
    # Sizes of a key and of a value, which scores and their product with the values need.
    sizes = 2 * c.head_dim
    if c.mla.kv_rank:
        sizes = c.mla.nope_dim + c.mla.rope_dim + c.mla.value_dim

    def seen(layer: int) -> float:
        """Twice the mean number of keys that a query of the layer sees."""
        if not c.windowed(layer) or c.window >= length:
            return length
        return length - (length - c.window) ** 2 / length

    keys = sum(map(seen, range(c.num_layers + c.mtp_modules)))
    return 6.0 * matrices + 3.0 * c.num_heads * sizes * keys


@functools.cache
def _matrix_parameters(block: ModelConfig) -> float:
    """Number of matrix parameters of a layer that one token is multiplied by."""
    shapes = jax.eval_shape(lambda: _init(Block, block, jax.random.key(0)))
    used = block.moe.per_token / block.moe.num_experts if block.moe.num_experts else 1.0
    total = 0.0
    for leaf, axes in zip(
        jax.tree.leaves(shapes), jax.tree.leaves(_axes(Block, block)), strict=True
    ):
        if axes.decays:  # matrices only: norms and biases do not
            total += math.prod(leaf.shape) * (used if "experts" in axes else 1.0)
    return total


def embed(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    decoding: bool = False,
) -> jax.Array:
    """Embeddings [B, T, D] of tokens int32[B, T], in config.dtype; positions int32[B, T] are used if they are learned.

    decoding: the tables are sharded over their columns (`decode.unstack`).
    """

    def table(name: str, rows: str) -> jax.Array:
        # Gathered explicitly, in the narrow type: left to XLA, a lookup in a table sharded over its columns ends in
        # "involuntary full rematerialization". When decoding the lookup is in whole columns, since XLA would gather
        # sharded rows for each token.
        weights = params["embed"][name].astype(config.compute_dtype)
        if decoding:
            return constrain_weights(weights, None, "columns")
        return constrain_weights(weights, rows, None)

    x = table("tokens", "vocab")[tokens]  # [B, T, D]
    if config.scale_embeddings:
        # Rounded to x's type first, as in Gemma's code.
        x = x * jnp.asarray(config.embed_dim**0.5, x.dtype)
    if config.position == "learned":
        x = x + table("positions", "positions")[positions]
    return constrain_residual(x)


def final_norm(params: Params, config: ModelConfig, x: jax.Array) -> jax.Array:
    """The norm after the last layer, [B, T, D] -> [B, T, D]."""
    return merge_module(FinalNorm, config, params["norm"]).norm(x)


def _remat(body: Callable[..., Any], config: ModelConfig) -> Callable[..., Any]:
    """A layer that recomputes in the backward pass what config.remat says."""
    policies = jax.checkpoint_policies
    if config.remat == "none":
        return body
    policy = {
        "dots": policies.dots_with_no_batch_dims_saveable,
        "offload_dots": policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
        "attention": policies.save_only_these_names(ATTENDED),
        "full": None,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[config.remat]
    # Inside a scan XLA cannot merge the recomputation with the forward pass, so it need not be prevented.
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def _init(module: type, config: ModelConfig, key: jax.Array) -> Params:
    return nnx.to_pure_dict(nnx.split(module(config, rngs=nnx.Rngs(params=key)))[1])


@functools.cache
def _definition(module: type, config: ModelConfig) -> Any:
    """The graph definition and the abstract state of a module."""
    return nnx.split(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(params=0))))


def merge_module(module: type, config: ModelConfig, params: Params) -> Any:
    """The NNX module with these parameters; costs tracing time only."""
    graph, state = _definition(module, config)
    state = jax.tree.map(lambda leaf: leaf, state)  # a copy: the next line writes into it
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def _axes(module: type, config: ModelConfig) -> Params:
    """The `Axes` of a module's parameters."""

    def read(variable: nnx.Variable) -> Axes:
        return variable.get_metadata()["axes"]

    _, state = _definition(module, config)
    # Of a state, whose leaves would be arrays, the variables around them are wanted.
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)
    return nnx.to_pure_dict(jax.tree.map(read, state, is_leaf=is_variable))
