"""The rollout engine against `transformers` generate: the same weights, prompts and machine, in one run.

    python tests/benchmarks/rollout.py --peer PYTHON      PYTHON: an interpreter with torch and transformers

A 14M-parameter decoder (d 384, 6 layers, 6 heads, vocabulary 8,192), temperature 1. Prints

- new tokens/s for 64 prompts of 8 to 32 tokens with 128 tokens each, and the ratio to the peer's, which must draw the
  same greedy tokens (float32);
- new tokens/s for 512 prompts whose responses have 8 to 512 tokens (lognormal), against the same requests in batches of
  64 that wait for their longest;
- seconds to the first token of a short prompt while 64 others decode.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from jaxllm.engine.config import EngineConfig, SamplingConfig
from jaxllm.engine.engine import Engine
from jaxllm.engine.request import Request
from jaxllm.engine.rollouts import left_pad
from jaxllm.models import transformer
from jaxllm.models.config import ModelConfig
from jaxllm.run import set_cpu_devices
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.sharding import batch_shards, replicated

MODEL = ModelConfig(
    vocab_size=8192,
    max_length=640,
    num_layers=6,
    embed_dim=384,
    num_heads=6,
    mlp_dim=1024,
    dtype="float32",
)
NEW, ROUNDS, SLOTS = 128, 3, 64

# Runs in the other interpreter: reads the weights and prompts, writes its greedy tokens and speed.
PEER = """
import json, sys, time
import numpy as np, torch, transformers
torch.set_num_threads(int(sys.argv[2]))
data = dict(np.load(sys.argv[1] + "/in.npz"))
config = transformers.LlamaConfig(
    vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
    max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=True, rope_theta=10000.0,
    bos_token_id=1, eos_token_id=None, pad_token_id=0)
model = transformers.LlamaForCausalLM(config).eval()
missing = model.load_state_dict({k: torch.tensor(v) for k, v in data.items() if "." in k}, strict=False)
assert missing.missing_keys in ([], ["lm_head.weight"]) and not missing.unexpected_keys, missing
ids, mask = torch.tensor(data["tokens"]).long(), torch.tensor(data["mask"]).long()
def run(**more):
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask, max_new_tokens=128, min_new_tokens=128, **more)
greedy = run(do_sample=False)[:, ids.shape[1]:].numpy()
seconds = []
for _ in range(int(sys.argv[3])):
    began = time.perf_counter()
    run(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    seconds.append(time.perf_counter() - began)
np.save(sys.argv[1] + "/greedy.npy", greedy)
print(json.dumps({"seconds": min(seconds), "torch": torch.__version__, "transformers": transformers.__version__}))
"""


def peer_weights(params) -> dict[str, np.ndarray]:
    """Our parameters under the peer's names; its projections are [out, in]."""
    flat = lambda w, inputs: np.asarray(w).reshape(inputs, -1).T
    names = {"q_proj": "q", "k_proj": "k", "v_proj": "v"}
    out = {
        "model.embed_tokens.weight": params["embed"]["tokens"],
        "model.norm.weight": params["norm"]["norm"]["scale"],
    }
    for i in range(MODEL.num_layers):
        layer = jax.tree.map(lambda x, i=i: np.asarray(x[i]), params["layers"])
        at = f"model.layers.{i}."
        out |= {
            f"{at}self_attn.{n}.weight": flat(layer["attention"][ours], 384)
            for n, ours in names.items()
        }
        out[f"{at}self_attn.o_proj.weight"] = layer["attention"]["out"].reshape(-1, 384).T
        out |= {f"{at}mlp.{n}_proj.weight": layer["mlp"][n].T for n in ("gate", "up", "down")}
        out[f"{at}input_layernorm.weight"] = layer["attention_norm"]["scale"]
        out[f"{at}post_attention_layernorm.weight"] = layer["mlp_norm"]["scale"]
    return {name: np.asarray(value) for name, value in out.items()}


def engine_for(params, mesh, dtype: str, longest: int, more: int = 0, **settings: int) -> Engine:
    """An engine with SLOTS + more slots over all devices."""
    slots = -(-(SLOTS + more) // batch_shards(mesh))
    return Engine(
        params,
        dataclasses.replace(MODEL, dtype=dtype),
        mesh,
        longest=longest,
        settings=EngineConfig(slots=slots, **settings),
    )


def requests_for(prompts, lengths, temperature: float = 1.0) -> list[Request]:
    """Requests that nothing ends early."""
    return [
        Request(prompt, SamplingConfig(int(length), temperature), (0, i))
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]


def drawn(engine: Engine, requests: list[Request]) -> list[list[int]]:
    found = dict(engine.run(requests))
    return [[draw.id for draw in found[i].draws] for i in range(len(requests))]


def fastest(run, rounds: int = ROUNDS) -> float:
    """Seconds of the fastest of some rounds, after one that compiles."""
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def long_tails(params, mesh, dtype: str) -> tuple[float, float]:
    """New tokens/s (all requests at once, batch by batch)."""
    rng = np.random.default_rng(1)
    lengths = np.clip(rng.lognormal(4.3, 0.9, 8 * SLOTS), 8, 512).astype(int)
    requests = requests_for(prompts_of(rng, len(lengths)), lengths)
    engine = engine_for(params, mesh, dtype, 544)

    def batches() -> None:
        for begin in range(0, len(requests), SLOTS):
            drawn(engine, requests[begin : begin + SLOTS])

    tokens = lengths.sum()
    together = fastest(lambda: drawn(engine, requests), 1)
    return tokens / together, tokens / fastest(batches, 1)


def first_token(params, mesh, dtype: str) -> float:
    """Seconds from a request to its first token, while all other slots decode: the median of several."""
    rng = np.random.default_rng(2)
    engine = engine_for(params, mesh, dtype, 544, more=1, steps=2)
    others = requests_for(prompts_of(rng, SLOTS), [256] * SLOTS)
    short = requests_for(prompts_of(rng, 1), [4])[0]
    seconds = []
    for request in others:
        engine.submit(request)
    while engine.num_unfinished:
        engine.step()
        if engine.num_unfinished < SLOTS:
            continue
        began = time.perf_counter()
        ticket = engine.submit(short)
        while not any(event.ticket == ticket for event in engine.step()):
            pass
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[2:]))


def prompts_of(rng, count: int) -> list[list[int]]:
    return [rng.integers(3, 8192, n).tolist() for n in rng.integers(8, 33, count)]


def peer_speed(python: str, params, prompts, greedy: list[list[int]]) -> tuple[float, str]:
    """The peer's new tokens/s in float32, and its versions; prints how many greedy tokens are the same."""
    tokens, mask = left_pad(prompts, 32, 0)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/in.npz", tokens=tokens, mask=mask, **peer_weights(params))
        command = [python, "-c", PEER, folder, str(os.cpu_count()), str(ROUNDS)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        same = (np.load(Path(folder) / "greedy.npy") == np.array(greedy)).mean()
    print(f"greedy tokens that are the same: {same:.1%}")
    return SLOTS * NEW / found["seconds"], f"{found['transformers']} (torch {found['torch']})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", default="", help="an interpreter with torch and transformers")
    parser.add_argument("--devices", type=int, default=2, help="virtual CPU devices")
    args = parser.parse_args()
    set_cpu_devices(args.devices)
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        params = jax.jit(
            lambda: transformer.init(MODEL, jax.random.key(0)), out_shardings=replicated(mesh)
        )()
        prompts = prompts_of(np.random.default_rng(0), SLOTS)
        speed = {}
        for dtype in ("float32", "bfloat16"):
            engine = engine_for(params, mesh, dtype, 160)
            requests = requests_for(prompts, [NEW] * SLOTS)
            speed[dtype] = SLOTS * NEW / fastest(lambda e=engine, r=requests: drawn(e, r))
            print(f"{dtype}: {speed[dtype]:,.0f} new tokens/s", flush=True)
        if args.peer:
            greedy = drawn(
                engine_for(params, mesh, "float32", 160), requests_for(prompts, [NEW] * SLOTS, 0.0)
            )
            peer, versions = peer_speed(args.peer, params, prompts, greedy)
            print(f"transformers {versions}: {peer:,.0f} new tokens/s in float32")
            for dtype, found in speed.items():
                print(f"ratio in {dtype}: {found / peer:.2f}")
        for dtype in speed:
            together, batches = long_tails(params, mesh, dtype)
            print(
                f"{dtype}, long tails: {together:,.0f} new tokens/s, {batches:,.0f} in batches of {SLOTS}: "
                f"{together / batches:.2f}"
            )
            print(
                f"{dtype}, first token beside {SLOTS} others: {1e3 * first_token(params, mesh, dtype):.0f} ms"
            )


if __name__ == "__main__":
    main()
