"""Rollouts against `transformers` generate: the same weights, prompts and machine, in one run.

    python tests/benchmarks/rollout.py --peer PYTHON      PYTHON: an interpreter with torch and transformers

A 14M-parameter decoder (d 384, 6 layers, 6 heads, vocabulary 8,192) draws 128 tokens to each of 64 prompts of 8 to 32
tokens at temperature 1, nothing ending early. First both must give the same greedy tokens (float32). Prints new
tokens/s of each and the ratios.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from jaxllm.generation.config import SamplingConfig
from jaxllm.generation.generate import jitted, left_pad
from jaxllm.models import transformer
from jaxllm.models.config import ModelConfig
from jaxllm.run import set_cpu_devices
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.sharding import activation, replicated

MODEL = ModelConfig(
    vocab_size=8192,
    max_length=256,
    num_layers=6,
    embed_dim=384,
    num_heads=6,
    mlp_dim=1024,
    dtype="float32",
)
NEW, ROUNDS = 128, 3

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


def ours(params, tokens, mask, mesh, dtype: str, temperature: float) -> tuple[np.ndarray, float]:
    """(tokens drawn, seconds of the fastest round)."""
    model = ModelConfig(**{**MODEL.__dict__, "dtype": dtype})
    run = jitted(
        model, SamplingConfig(NEW, temperature), (8192,), 0, 1
    )  # 8192 is no token: nothing ends early
    place = lambda x: jax.device_put(x, activation(mesh, "batch", *[None] * (x.ndim - 1)))
    batch, index = (place(tokens), place(mask)), place(np.arange(len(tokens), dtype=np.int32))
    seconds, rollout = [], None
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        rollout = jax.block_until_ready(run(params, *batch, jax.random.key(0), index))
        seconds.append(time.perf_counter() - began)
    assert rollout is not None
    return np.asarray(rollout.tokens)[:, tokens.shape[1] :], min(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", default="", help="an interpreter with torch and transformers")
    parser.add_argument("--devices", type=int, default=1, help="virtual CPU devices")
    args = parser.parse_args()
    set_cpu_devices(args.devices)
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        params = jax.jit(
            lambda: transformer.init(MODEL, jax.random.key(0)), out_shardings=replicated(mesh)
        )()
        rng = np.random.default_rng(0)
        tokens, mask = left_pad(
            [rng.integers(3, 8192, n).tolist() for n in rng.integers(8, 33, 64)], 32, 0
        )
        greedy, _ = ours(params, tokens, mask, mesh, "float32", 0.0)
        speed = {
            d: 64 * NEW / ours(params, tokens, mask, mesh, d, 1.0)[1]
            for d in ("float32", "bfloat16")
        }
        print(
            f"jaxllm: {speed['float32']:,.0f} new tokens/s in float32, {speed['bfloat16']:,.0f} in bfloat16"
        )
        if not args.peer:
            return
        np.savez(f"{folder}/in.npz", tokens=tokens, mask=mask, **peer_weights(params))
        command = [args.peer, "-c", PEER, folder, str(len(jax.devices())), str(ROUNDS)]
        found = json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[
                -1
            ]
        )
        same = (np.load(Path(folder) / "greedy.npy") == greedy).mean()
        peer = 64 * NEW / found["seconds"]
        print(
            f"transformers {found['transformers']} (torch {found['torch']}): {peer:,.0f} new tokens/s in float32"
        )
        print(
            f"ratio: {speed['float32'] / peer:.2f} in float32, {speed['bfloat16'] / peer:.2f} in bfloat16"
        )
        print(f"greedy tokens that are the same: {same:.1%}")
        if same < 0.99:
            sys.exit("the two do not compute the same")


if __name__ == "__main__":
    main()
