"""The training step beside PyTorch's: the same shape, batch, precision and machine, taking turns in one run.

    python tests/benchmarks/training.py --peer PYTHON [--maxtext PYTHON] [--rounds 3]

--peer is an interpreter with torch and transformers, --maxtext one with MaxText (`plan.py` makes it); both are optional.

A Llama of 13.8M parameters (d 384, 6 layers, 6 heads, vocabulary 8,192, tied), 16 rows of 256 tokens, AdamW, gradients
clipped to norm 1. Ours trains on packed rows of three documents and skips updates that are not finite; the peer on
whole rows. Parameters are float32 in both, activations and products bfloat16 (torch: autocast) or float32.

MaxText trains its own decoder of this shape with its own optimizer, on random rows, and keeps what its policy "minimal"
keeps, without flash attention, which it has for TPUs and GPUs.

Each measurement is a process of its own, since the allocator is part of what is measured: glibc's as it comes, which is
how people run torch, and with huge pages. Ours sets its own. Prints tokens/s, the median of the rounds, and ratios.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict

ROWS, LENGTH, VOCAB, STEPS = 16, 256, 8192, 8

# Runs in the other interpreter.
PEER = """
import json, sys, time, torch, transformers
how, dtype, rows, length, vocab, steps = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=vocab, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
    max_position_embeddings=length, tie_word_embeddings=True, use_cache=False, attn_implementation="sdpa")
model = transformers.LlamaForCausalLM(config).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
run = torch.compile(model) if how == "compile" else model
tokens = torch.randint(0, vocab, (rows, length))
def step():
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = run(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()
seconds = []
for _ in range(3 + steps):
    began = time.perf_counter()
    step()
    seconds.append(time.perf_counter() - began)
print(json.dumps({"seconds": seconds[3:], "version": torch.__version__}))
"""


# MaxText's own trainer as a program; it logs the seconds of every step.
MAXTEXT = """
import json, pathlib, re, subprocess, sys, tempfile, importlib.metadata, maxtext
dtype, rows, length, vocab, steps = sys.argv[1], *map(int, sys.argv[2:])
settings = dict(
    run_name="step", base_output_directory=tempfile.mkdtemp(), hardware="cpu", dataset_type="synthetic",
    enable_checkpointing=False, skip_jax_distributed_system=True, enable_goodput_recording=False,
    monitor_goodput=False, steps=2 + steps, per_device_batch_size=rows, max_target_length=length,
    vocab_size=vocab, base_emb_dim=384, base_num_query_heads=6, base_num_kv_heads=6, head_dim=64,
    base_mlp_dim=1024, base_num_decoder_layers=6, decoder_block="llama2", mlp_activations="['silu','linear']",
    logits_via_embedding=True, attention="dot_product", dtype=dtype, weight_dtype="float32", remat_policy="minimal")
base = pathlib.Path(maxtext.__file__).parent / "configs" / "base.yml"
command = [sys.executable, "-m", "maxtext.trainers.pre_train.train", str(base)]
command += [f"{name}={value}" for name, value in settings.items()]
run = subprocess.run(command, capture_output=True, text=True)
seconds = [float(found) for found in re.findall(r"completed step: \\d+, seconds: ([\\d.]+)", run.stdout + run.stderr)]
if run.returncode or len(seconds) < 3:
    sys.exit(f"MaxText ended with {run.returncode}: {run.stderr[-2000:]}")
print(json.dumps({"seconds": seconds[2:], "version": importlib.metadata.version("maxtext")}))
"""


def measure_ours(dtype: str) -> None:
    """Times our step in this process and prints the seconds as JSON."""
    import jax
    import numpy as np

    from jaxllm import train
    from jaxllm.models import next_token, transformer
    from jaxllm.models.config import preset
    from jaxllm.optim import make_optimizer
    from jaxllm.optim_config import OptimConfig
    from jaxllm.run import set_cpu_devices
    from jaxllm.runtime.config import MeshConfig
    from jaxllm.runtime.cpu import keep_pages
    from jaxllm.runtime.mesh import make_mesh
    from jaxllm.sharding import activation

    set_cpu_devices(1)
    mesh = make_mesh(MeshConfig())
    keep_pages()
    model = preset("small-14m", vocab_size=VOCAB, max_length=LENGTH, dtype=dtype, scan_unroll=6)
    axes = transformer.axes(model)
    with jax.set_mesh(mesh):
        tx = make_optimizer(OptimConfig(), 1000, axes)
        layout = train.state_layout(mesh, transformer.abstract(model), axes, tx)
        make = jax.jit(
            lambda: transformer.init(model, jax.random.key(0)),
            out_shardings=layout.shardings.params,
        )
        state = layout.init(make())
        loss = lambda params, batch, key: next_token.loss(params, batch, key, {}, model=model)
        step = train.make_step(loss, tx, state_shardings=layout.shardings)
        place = lambda x: jax.device_put(
            np.broadcast_to(x, (ROWS, LENGTH)), activation(mesh, "batch", None)
        )
        ends = [80, 200, LENGTH]  # of the documents in a row
        segments = 1 + np.searchsorted(ends, np.arange(LENGTH), side="right")
        starts = np.array([0, *ends])[segments - 1]
        batch = {
            "tokens": place(np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH))),
            "segment_ids": place(segments.astype(np.int32)),
            "positions": place((np.arange(LENGTH) - starts).astype(np.int32)),
            "loss_mask": place(np.ones(LENGTH, bool)),
        }
        batch["tokens"] = batch["tokens"].astype("int32")
        seconds = []
        for _ in range(2 + STEPS):
            began = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, batch))
            seconds.append(time.perf_counter() - began)
    print(json.dumps({"seconds": seconds[2:], "version": jax.__version__}))


def measured(command: list[str], huge_pages: bool) -> tuple[float, str]:
    """(tokens/s, version) that a process reports: of its median step."""
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | {"JAX_PLATFORMS": "cpu"}
    if huge_pages:
        env["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    run = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(run.stdout.splitlines()[-1])
    return ROWS * LENGTH / statistics.median(found["seconds"]), found["version"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", default="", help="an interpreter with torch and transformers")
    parser.add_argument("--maxtext", default="", help="an interpreter with MaxText")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ours", default="", help=argparse.SUPPRESS)  # dtype: in this process
    args = parser.parse_args()
    if args.ours:
        return measure_ours(args.ours)
    rates = defaultdict(list)
    versions = {}
    for dtype in ("bfloat16", "float32"):
        for _ in range(args.rounds):
            runs = {"jaxllm": ([sys.executable, __file__, "--ours", dtype], True)}
            if args.peer:
                numbers = [str(n) for n in (ROWS, LENGTH, VOCAB, STEPS)]
                compiled = [args.peer, "-c", PEER, "compile", dtype, *numbers]
                runs["torch.compile"] = (compiled, False)
                runs["torch.compile, huge pages"] = (compiled, True)
                runs["torch, eager"] = ([args.peer, "-c", PEER, "eager", dtype, *numbers], False)
            if args.maxtext:
                numbers = [str(n) for n in (ROWS, LENGTH, VOCAB, STEPS // 2)]
                runs["MaxText"] = ([args.maxtext, "-c", MAXTEXT, dtype, *numbers], False)
            for name, (command, huge_pages) in runs.items():
                rate, versions[name] = measured(command, huge_pages)
                rates[dtype, name].append(rate)
    for (dtype, name), found in rates.items():
        rate = statistics.median(found)
        ratio = statistics.median(rates[dtype, "jaxllm"]) / rate
        spread = f"{min(found):,.0f} to {max(found):,.0f}"
        print(
            f"{dtype}  {name:26s} {versions[name]:12s} {rate:7,.0f} tokens/s ({spread})  "
            f"jaxllm is {ratio:.2f} times as fast"
        )


if __name__ == "__main__":
    main()
