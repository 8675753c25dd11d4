"""What jaxllm exports, loaded by `transformers`: no missing and no unexpected key, the same greedy text.

    python tests/oracles/exports.py --peer PYTHON        PYTHON: an interpreter with torch and transformers

Every recorded family is imported, exported again from a checkpoint of ours (so that config.json is written by us), and
loaded by the peer with its own check of the keys; both continue the same prompts greedily, in float32. A reward model
is loaded as a sequence classifier, and its scores are compared. GGUF files (PYTHON needs the gguf package) are read by
both: the same greedy text again.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from jaxllm.engine.config import SamplingConfig
from jaxllm.engine.responses import complete
from jaxllm.model_store import load_model
from jaxllm.models import scalar
from jaxllm.models.config import ModelConfig
from jaxllm.pretrained.convert import export_model, import_model
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from tests.oracles.families import tokens
from tests.pretrained.test_convert import save_stage
from tests.pretrained.test_families import RECORD, load
from tests.pretrained.test_gguf_files import write_gguf

PEER = """
import json, sys, torch, transformers
found = {}
for case, kind, folder, prompts in json.load(open(sys.argv[1])):
    auto = transformers.AutoModelForCausalLM
    if kind == "reward":
        auto = transformers.AutoModelForSequenceClassification
    more = {"gguf_file": "m.gguf"} if kind == "gguf" else {}
    model, info = auto.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype="float32", **more
    )
    keys = {name: sorted(info[name]) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    with torch.no_grad():
        if kind == "reward":
            out = [float(model(torch.tensor([p])).logits[0, 0]) for p in prompts]
        else:
            settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
            out = [model.generate(torch.tensor([p]), **settings)[0, len(p):].tolist() for p in prompts]
    found[case] = [keys, out]
json.dump(found, open(sys.argv[2], "w"))
"""
PROMPTS = [tokens(50 + i, 1)[0, : 6 + 3 * i].tolist() for i in range(4)]


def some_tokens(writer) -> None:
    """A vocabulary of the right size, which the peer takes the model's from."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(256 + i) for i in range(64)])
    writer.add_token_merges([])
    writer.add_eos_token_id(0)


def greedy(params, model: ModelConfig, mesh) -> list[list[int]]:
    """24 tokens after each prompt."""
    sampling = SamplingConfig(24, 0.0)
    # 64 is not a token: nothing ends a response early.
    responses = complete(
        params, model, PROMPTS, sampling=sampling, stop_ids=(64,), mesh=mesh, seed=0
    )
    return [response[0].ids for response in responses]


def export_stage(root: Path, name: str, params, model: ModelConfig, kind: str) -> str:
    """Save a stage, export it, and return the folder of the export."""
    (root / name).mkdir()
    save_stage(root / name, params, model, kind)
    export_model(str(root / name), str(root / f"{name}-out"), "float32")
    return str(root / f"{name}-out")


def make_jobs(root: Path, mesh) -> tuple[list, dict]:
    """([(case, kind, folder, prompts)] for the peer, {case: our own results})."""
    jobs = []
    ours = {}
    for case in RECORD:
        model, _, params = load(case)
        jobs.append((case, "policy", export_stage(root, case, params, model, "policy"), PROMPTS))
        ours[case] = greedy(params, model, mesh)
    model, _, trunk = load("qwen3")
    params = scalar.init(trunk, model, jax.random.key(0))
    folder = export_stage(root, "reward", params, model, "reward")
    jobs.append(("reward", "reward", folder, PROMPTS))
    ours["reward"] = [float(scalar.score_rows(params, model, [p])[0]) for p in PROMPTS]
    # Of the other families the peer takes sizes or scales from somewhere else than the file.
    for case in ("llama2", "qwen2"):
        folder = root / f"{case}-gguf"
        folder.mkdir()
        write_gguf(folder / "m.gguf", case, tokens=some_tokens)
        import_model(str(folder / "m.gguf"), str(root / f"{case}-imported"))
        params, model = load_model(root / f"{case}-imported", mesh)
        jobs.append((f"{case}.gguf", "gguf", str(folder), PROMPTS))
        ours[f"{case}.gguf"] = greedy(params, dataclasses.replace(model, dtype="float32"), mesh)
    return jobs, ours


def compare(case: str, keys: dict, peers, ours) -> bool:
    """Print a line, and return whether nothing differs."""
    is_reward = case == "reward"
    same = bool(np.allclose(peers, ours, atol=1e-4)) if is_reward else peers == ours
    wrong_keys = [f"{name} {value[:3]}" for name, value in keys.items() if value]
    what = "scores" if is_reward else "greedy tokens"
    print(f"{case:18} keys: {'; '.join(wrong_keys) or 'all'}   same {what}: {same}")
    return same and not wrong_keys


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", required=True)
    args = parser.parse_args()
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        root = Path(folder)
        jobs, ours = make_jobs(root, mesh)
        (root / "jobs.json").write_text(json.dumps(jobs))
        subprocess.run([args.peer, "-c", PEER, root / "jobs.json", root / "found.json"], check=True)
        found = json.loads((root / "found.json").read_text())
    equal = [compare(case, keys, peers, ours[case]) for case, (keys, peers) in found.items()]
    sys.exit(0 if all(equal) else 1)


if __name__ == "__main__":
    main()
