"""The rollout engine against `transformers` generate: the same weights, prompts and machine, in one run.

    python tests/benchmarks/rollout.py --peer PYTHON      PYTHON: an interpreter with torch and transformers

A 14M-parameter decoder (d 384, 6 layers, 6 heads, vocabulary 8,192), temperature 1. Prints

- new tokens/s for 64 prompts of 8 to 32 tokens with 128 tokens each, and the ratio to the peer's, which must draw the
  same greedy tokens (float32): in turns, the fastest of five;
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
NEW, ROUNDS, SLOTS = 128, 5, 64

# Runs in the other interpreter: reads the weights and prompts, writes its greedy tokens, and samples once for each line
# that it reads.
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
np.save(sys.argv[1] + "/greedy.npy", run(do_sample=False)[:, ids.shape[1]:].numpy())
versions = f"transformers {transformers.__version__} (torch {torch.__version__})"
for line in sys.stdin:
    began = time.perf_counter()
    run(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    print(json.dumps({"seconds": time.perf_counter() - began, "versions": versions}), flush=True)
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


def seconds_of(run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def fastest(run) -> float:
    """Seconds of a run, after one that compiles."""
    run()
    return seconds_of(run)


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
    together = fastest(lambda: drawn(engine, requests))
    return tokens / together, tokens / fastest(batches)


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


class Peer:
    """The peer in a process of its own; it waits for its turns."""

    def __init__(self, python: str, folder: str, params, prompts):
        tokens, mask = left_pad(prompts, 32, 0)
        np.savez(f"{folder}/in.npz", tokens=tokens, mask=mask, **peer_weights(params))
        self.greedy = Path(folder) / "greedy.npy"
        self.versions = ""
        self.process = subprocess.Popen(
            [python, "-c", PEER, folder, str(os.cpu_count())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def seconds(self) -> float:
        """Of one run in float32."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found = json.loads(self.process.stdout.readline())
        self.versions = found["versions"]
        return found["seconds"]


def against_peer(python: str, params, mesh, engines: dict[str, Engine], prompts) -> None:
    """Prints everyone's new tokens/s, in turns, and the ratios."""
    requests = requests_for(prompts, [NEW] * SLOTS)
    turns = {
        name: lambda e=engine: seconds_of(lambda: drawn(e, requests))
        for name, engine in engines.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(python, folder, params, prompts) if python else None
        if peer:
            turns["peer"] = peer.seconds
        # The first turn compiles.
        rounds = [{name: turn() for name, turn in turns.items()} for _ in range(ROUNDS + 1)]
        if peer:
            peer.process.stdin.close()
            peer.process.wait()
            greedy = engine_for(params, mesh, "float32", 160)
            ours = drawn(greedy, requests_for(prompts, [NEW] * SLOTS, 0.0))
            same = (np.load(peer.greedy) == np.array(ours)).mean()
            print(
                f"the peer is {peer.versions}, in float32; {same:.1%} of its greedy tokens are the same"
            )
    speed = {name: SLOTS * NEW / min(each[name] for each in rounds[1:]) for name in turns}
    for name, found in speed.items():
        ratio = f", {found / speed['peer']:.2f} times the peer" if peer else ""
        print(f"{name}: {found:,.0f} new tokens/s{ratio}", flush=True)


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
        dtypes = ("float32", "bfloat16")
        engines = {dtype: engine_for(params, mesh, dtype, 160) for dtype in dtypes}
        against_peer(args.peer, params, mesh, engines, prompts)
        for dtype in dtypes:
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
