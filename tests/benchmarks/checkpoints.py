"""What saving costs: the step that saves against its neighbours, memory against the state, restoring with its checks.

    python tests/benchmarks/checkpoints.py [--layers 12] [--width 768] [--batch 8] [--length 512]

About 110 million parameters by default (1.3 GB of state with Adam), on the local disk, one virtual device per core.
"""

import argparse
import resource
import statistics
import tempfile
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import train
from jaxllm.models import transformer
from jaxllm.models.config import ModelConfig
from jaxllm.models.next_token import loss
from jaxllm.optim import make_optimizer
from jaxllm.optim_config import OptimConfig
from jaxllm.run import set_cpu_devices
from jaxllm.runtime import checkpoint, digest
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.sharding import activation


def rss() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


class Peak(threading.Thread):
    """The most memory seen while it runs."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.on = 0, True
        self.start()

    def run(self):
        while self.on:
            self.most = max(self.most, rss())
            time.sleep(0.005)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, default in (
        ("layers", 12),
        ("width", 768),
        ("batch", 8),
        ("length", 512),
        ("vocab", 32768),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    set_cpu_devices(1)
    mesh = make_mesh(
        MeshConfig(data=1, fsdp=-1)
    )  # each device has a part: the state is in memory once
    model = ModelConfig(
        vocab_size=args.vocab, max_length=args.length, num_layers=args.layers, embed_dim=args.width,
        num_heads=args.width // 64, mlp_dim=args.width * 4 * 2 // 3 // 64 * 64,
    )  # fmt: skip
    tx = make_optimizer(OptimConfig(), 100, transformer.axes(model))
    placed = train.state_layout(mesh, transformer.abstract(model), transformer.axes(model), tx)
    ones = jnp.ones((args.batch, args.length), jnp.int32)
    batch = {
        "tokens": ones,
        "segment_ids": ones,
        "positions": jnp.cumsum(ones, 1) - 1,
        "loss_mask": ones > 0,
    }
    batch = {name: jax.device_put(x, activation(mesh, "batch", None)) for name, x in batch.items()}
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as directory:
        make = jax.jit(
            lambda: transformer.init(model, jax.random.key(0)),
            out_shardings=placed.shardings.params,
        )
        state = placed.init(make())
        step = train.make_step(
            lambda p, b, key, base: loss(p, b, key, base, model=model, z_loss_coef=0.0), tx,
            state_shardings=placed.shardings,
        )  # fmt: skip
        saves = checkpoint.Checkpoints(directory, checkpoint.CheckpointConfig(keep_last=2))
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        times, blocked = {}, {}
        digest.digests(state)  # compiled
        peak, save_peak = Peak(), None
        for number in range(1, 15):
            if number == 6:
                peak.on = False
                without, save_peak = peak.most, Peak()
            began = time.perf_counter()
            state, _ = step(state, batch, base={})
            jax.block_until_ready(state)
            if number in (6, 10):
                before = time.perf_counter()
                saves.save(number, state, {})
                blocked[number] = time.perf_counter() - before
            times[number] = time.perf_counter() - began
        began = time.perf_counter()
        saves.close()
        waited = time.perf_counter() - began
        assert save_peak
        save_peak.on = False
        began = time.perf_counter()
        digest.digests(state)
        digested = time.perf_counter() - began
        began = time.perf_counter()
        restored, _ = checkpoint.Checkpoints(
            directory, checkpoint.CheckpointConfig()
        ).restore_or_init(placed.abstract, dict)
        restore_seconds = time.perf_counter() - began
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=False):
            assert np.shape(a) == np.shape(b)
    quiet = statistics.median(times[n] for n in (3, 4, 5))
    print(
        f"{transformer.num_params(model):,} parameters, state {size / 1e9:.2f} GB, steps {quiet:.2f} s without a save"
    )
    for number in (6, 10):
        after = ", ".join(f"{times[n] / quiet:.2f}" for n in range(number + 1, number + 4))
        print(
            f"step {number} saves: {times[number] / quiet:.3f} of a step (blocked {blocked[number]:.2f} s); next {after}"
        )
    print(
        f"memory: {without / size:.2f} states before a save, {save_peak.most / size:.2f} with saves"
    )
    print(
        f"digest of the state {digested:.2f} s; restore with all checks {restore_seconds:.2f} s; last wait {waited:.2f} s"
    )


if __name__ == "__main__":
    main()
