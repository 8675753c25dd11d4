"""Speed of the training step and of generation, as ratios to this machine's own matrix-product peak.

    python tests/benchmarks/speed.py [--preset small-14m] [--vocab 8192] [--length 256] [--batch 16] [--seconds 10]

Prints tokens/s and MFU of training (bfloat16, data-parallel over all devices) and new tokens/s of generation in
bfloat16 and float32. Whole-process noise on shared machines is large: run it alone, and twice.
"""

import argparse
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import losses, output_layer, train
from jaxllm.engine.config import SamplingConfig
from jaxllm.engine.engine import Engine
from jaxllm.engine.request import Request
from jaxllm.metrics import peak_flops
from jaxllm.models import transformer
from jaxllm.models.config import preset
from jaxllm.optim import make_optimizer
from jaxllm.optim_config import OptimConfig
from jaxllm.run import set_cpu_devices
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.sharding import activation


def per_second(call, seconds: float) -> float:
    """Calls per second after one that compiles; `call` returns something to wait for."""
    jax.block_until_ready(call())
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        jax.block_until_ready(call())
        count += 1
    return count / (time.perf_counter() - began)


def training(model, mesh, args) -> float:
    def loss(params, tokens, key):
        del key
        hidden = transformer.apply(params, model, tokens)
        targets, mask = losses.next_token_targets(tokens, jnp.ones_like(tokens), tokens >= 0)
        return losses.language_model(
            output_layer.token_logprobs(hidden, transformer.head(params), targets), mask
        )

    tx = make_optimizer(OptimConfig(), 1000, transformer.axes(model))
    placed = train.state_layout(mesh, transformer.abstract(model), transformer.axes(model), tx)
    make = jax.jit(
        lambda: transformer.init(model, jax.random.key(0)), out_shardings=placed.shardings.params
    )
    state = placed.init(make())
    step = train.make_step(loss, tx, state_shardings=placed.shardings)
    tokens = (
        np.random.default_rng(0).integers(0, args.vocab, (args.batch, args.length)).astype(np.int32)
    )
    batch = jax.device_put(tokens, activation(mesh, "batch", None))

    def one():
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    return per_second(one, args.seconds) * args.batch * args.length


def generation(model, mesh, args, prompts: int = 64, new_tokens: int = 128) -> float:
    params = jax.jit(lambda: transformer.init(model, jax.random.key(0)))()
    engine = Engine(params, model, mesh, longest=32 + new_tokens)
    requests = [Request([1] * 32, SamplingConfig(new_tokens), (0, i)) for i in range(prompts)]
    return per_second(lambda: len([*engine.run(requests)]), args.seconds) * prompts * new_tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="small-14m")
    for name, value in (("vocab", 8192), ("length", 256), ("batch", 16), ("seconds", 10)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    set_cpu_devices(1)
    mesh = make_mesh(MeshConfig())
    model = preset(args.preset, vocab_size=args.vocab, max_length=args.length)
    with jax.set_mesh(mesh):
        peak = peak_flops(mesh)
        rate = training(model, mesh, args)
        used = rate * transformer.flops_per_token(model, args.length)
        print(
            f"{args.preset}: {transformer.num_params(model):,} parameters, {mesh.size} devices, {jax.__version__}"
        )
        print(
            f"training    {rate:,.0f} tokens/s, {used / 1e9:,.0f} GFLOP/s, MFU {used / peak:.1%} of {peak / 1e9:,.0f}"
        )
        for dtype in ("bfloat16", "float32"):
            rate = generation(dataclasses.replace(model, dtype=dtype), mesh, args)
            print(f"generation  {rate:,.0f} tokens/s in {dtype}, 64 prompts x 128 new tokens")


if __name__ == "__main__":
    main()
