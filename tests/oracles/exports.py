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

from jaxllm.generate import SamplingConfig, complete
from jaxllm.model_store import load_model
from jaxllm.models import scalar
from jaxllm.pretrained.convert import export_model, import_model
from jaxllm.runtime.mesh import MeshConfig, make_mesh
from tests.oracles.families import tokens
from tests.pretrained.test_convert import save_stage
from tests.pretrained.test_families import RECORD, load
from tests.pretrained.test_gguf_files import write_gguf

PEER = """
import json, sys, torch, transformers
found = {}
for case, kind, folder, prompts in json.load(open(sys.argv[1])):
    auto = transformers.AutoModelForSequenceClassification if kind == "reward" else transformers.AutoModelForCausalLM
    more = {"gguf_file": "m.gguf"} if kind == "gguf" else {}
    model, info = auto.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype="float32", **more
    )
    keys = {name: sorted(info[name]) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    with torch.no_grad():
        if kind == "reward":
            out = [float(model(torch.tensor([p])).logits[0, 0]) for p in prompts]
        else:
            out = [model.generate(torch.tensor([p]), max_new_tokens=24, do_sample=False, eos_token_id=None)[0, len(p):].tolist()
                   for p in prompts]
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", required=True)
    args = parser.parse_args()
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    settings = {
        "sampling": SamplingConfig(24, 0.0),
        "stop_ids": (64,),
        "pad_id": 0,
        "mesh": mesh,
        "seed": 0,
    }
    jobs, ours = [], {}
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        root = Path(folder)
        for case in RECORD:
            model, _, params = load(case)
            (root / case).mkdir()
            save_stage(root / case, params, model, "policy")
            export_model(str(root / case), str(root / f"{case}-out"), "float32")
            ours[case] = [drawn[0].ids for drawn in complete(params, model, PROMPTS, **settings)]
            jobs.append((case, "policy", str(root / f"{case}-out"), PROMPTS))
        model, _, trunk = load("qwen3")
        params = scalar.init(trunk, dataclasses.replace(model), jax.random.key(0))
        (root / "reward").mkdir()
        save_stage(root / "reward", params, model, "reward")
        export_model(str(root / "reward"), str(root / "reward-out"), "float32")
        ours["reward"] = [float(scalar.score_rows(params, model, [p])[0]) for p in PROMPTS]
        jobs.append(("reward", "reward", str(root / "reward-out"), PROMPTS))
        for case in (
            "llama2",
            "qwen2",
        ):  # of the others the peer takes sizes or scales from elsewhere
            (root / f"{case}-gguf").mkdir()
            write_gguf(root / f"{case}-gguf" / "m.gguf", case, tokens=some_tokens)
            import_model(str(root / f"{case}-gguf" / "m.gguf"), str(root / f"{case}-imported"))
            params, model = load_model(root / f"{case}-imported", mesh)
            drawn = complete(
                params, dataclasses.replace(model, dtype="float32"), PROMPTS, **settings
            )
            ours[f"{case}.gguf"] = [each[0].ids for each in drawn]
            jobs.append((f"{case}.gguf", "gguf", str(root / f"{case}-gguf"), PROMPTS))
        (root / "jobs.json").write_text(json.dumps(jobs))
        subprocess.run([args.peer, "-c", PEER, root / "jobs.json", root / "found.json"], check=True)
        found = json.loads((root / "found.json").read_text())
    wrong = 0
    for case, (keys, theirs) in found.items():
        same = (
            bool(np.allclose(theirs, ours[case], atol=1e-4))
            if case == "reward"
            else theirs == ours[case]
        )
        bad = [f"{name} {value[:3]}" for name, value in keys.items() if value]
        wrong += (not same) or bool(bad)
        print(
            f"{case:18} keys: {'; '.join(bad) or 'all'}   same {'scores' if case == 'reward' else 'greedy tokens'}: {same}"
        )
    sys.exit(wrong and 1)


if __name__ == "__main__":
    main()
