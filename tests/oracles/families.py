"""What `transformers` computes for a tiny model of every family, recorded for tests/pretrained/test_families.py.

    PYTHON tests/oracles/families.py        PYTHON: an interpreter with torch and transformers

Writes tests/oracles/families.{json,npz}. Weights are not recorded: `weight` makes them from a tensor's name. float32,
eager attention, 40 tokens: past the windows and past the lengths at which rotary scaling sets in.
"""

import json
import sys
import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
LENGTH = 40
VOCAB = 64
STEPS = 50
BATCH = 4
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "rope_theta": 10000.0,
}
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "dtype": "float32",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "num_key_value_heads": 4,
}
FULL = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
SLIDING = {"rope_type": "default", "rope_theta": 1e4}

CASES = {
    "gpt2": ("gpt2", {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "dtype": "float32",
                      "bos_token_id": 1, "eos_token_id": 2}),
    "llama2": ("llama", {**COMMON, "num_key_value_heads": 4}),
    "llama3": ("llama", {**COMMON, "rope_parameters": LLAMA3}),
    "smollm2": ("llama", {**COMMON, "tie_word_embeddings": True, "rope_theta": 100_000.0}),
    "mistral": ("mistral", {**COMMON, "sliding_window": 8}),
    "qwen2": ("qwen2", {**COMMON}),
    "qwen3": ("qwen3", {**COMMON, "head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {**COMMON, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24}),
    "gemma3": ("gemma3_text", {**COMMON, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24,
                               "num_hidden_layers": 7, "sliding_window_pattern": 6,
                               "rope_parameters": {"full_attention": FULL, "sliding_attention": SLIDING}}),
    "olmo2": ("olmo2", {**COMMON}),
    "mixtral": ("mixtral", {**COMMON, "num_local_experts": 4, "sliding_window": None}),
    "qwen3_moe": ("qwen3_moe", {**COMMON, "head_dim": 16, "moe_intermediate_size": 24, "num_experts": 8,
                                "num_experts_per_tok": 3, "norm_topk_prob": True}),
    "deepseek_v2": ("deepseek_v2", {**COMMON, **LATENT, "topk_method": "group_limited_greedy",
                                    "routed_scaling_factor": 2.0}),
    "deepseek_v2_lite": ("deepseek_v2", {**COMMON, **LATENT, "q_lora_rank": None}),
    "deepseek_v3": ("deepseek_v3", {**COMMON, **LATENT, "rope_parameters": YARN, "routed_scaling_factor": 2.5}),
}  # fmt: skip
TRAINED = ("llama3", "mixtral")  # a dense and a sparse family


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of a tensor, from its name in the file."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape).astype(np.float32)
    is_norm = "norm" in name or "ln_" in name
    # Scales are around 1, as in a trained model.
    mean = 1.0 if is_norm and not name.endswith("bias") else 0.0
    return (0.2 * noise + mean).astype(np.float32)


def tokens(seed: int, rows: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCAB, (rows, LENGTH)).astype(np.int32)


def probe(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """What a gradient is multiplied by, so that one number of it is recorded."""
    return (
        np.random.default_rng(zlib.crc32(name.encode()) + 1).normal(size=shape).astype(np.float32)
    )


def make(kind: str, settings: dict):
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(kind, **settings)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).float()
    import tempfile

    import safetensors.torch

    with (
        tempfile.TemporaryDirectory() as folder
    ):  # the names are those of the files, not those of the modules
        model.save_pretrained(folder)
        names = safetensors.torch.load_file(f"{folder}/model.safetensors")
        values = {k: torch.tensor(weight(k, tuple(v.shape))) for k, v in names.items()}
        safetensors.torch.save_file(
            values, f"{folder}/model.safetensors", metadata={"format": "pt"}
        )
        saved = json.loads(Path(f"{folder}/config.json").read_text())
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype="float32"
        )
    return model.eval(), saved, {k: tuple(v.shape) for k, v in values.items()}


def file_gradients(model, names: dict) -> dict[str, float]:
    """Each file tensor's gradient times its probe."""
    # The model saves its gradients instead of its weights, so that they get the names in files.
    import tempfile

    import safetensors.torch
    import torch

    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.grad if p.grad is not None else torch.zeros_like(p))
        for buffer in model.buffers():  # the routers' biases, which have no gradient
            buffer.zero_()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found = safetensors.torch.load_file(f"{folder}/model.safetensors")
    return {
        k: float((found[k].numpy().astype(np.float64) * probe(k, names[k])).sum()) for k in names
    }


def record(case: str, kind: str, settings: dict, arrays: dict) -> dict:
    import torch

    model, saved, names = make(kind, settings)
    ids = torch.tensor(tokens(0, 1)).long()
    out = model(ids, output_hidden_states=True, labels=ids)
    arrays[f"{case}/logits"] = out.logits[0].detach().numpy()
    mix = np.random.default_rng(7).normal(size=(32, 6)).astype(np.float32)
    arrays[f"{case}/hidden"] = np.stack([h[0].detach().numpy() @ mix for h in out.hidden_states])
    greedy = model.generate(ids[:, :12], max_new_tokens=20, do_sample=False, eos_token_id=None)[
        0, 12:
    ]
    arrays[f"{case}/greedy"] = greedy.numpy().astype(np.int32)
    out.loss.backward()
    entry = {
        "config": saved,
        "tensors": {k: list(v) for k, v in names.items()},
        "loss": float(out.loss),
    }
    entry["gradients"] = file_gradients(model, names)
    if case in TRAINED:
        entry["curve"] = curve(kind, settings)
    return entry


def curve(kind: str, settings: dict) -> list[float]:
    """Losses of a plain loop: AdamW, decay on matrices, the gradient's norm clipped at 1."""
    import torch

    model = make(kind, settings)[0].train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(STEPS):
        ids = torch.tensor(tokens(100 + step, BATCH)).long()
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss))
    return losses


def main() -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    arrays: dict = {}
    found = {case: record(case, *settings, arrays) for case, settings in CASES.items()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (HERE / "families.json").write_text(
        json.dumps({"versions": versions, "cases": found}, indent=None) + "\n"
    )
    np.savez_compressed(HERE / "families.npz", **arrays)
    sizes = [(HERE / f"families.{x}").stat().st_size for x in ("json", "npz")]
    print(f"{len(found)} families, {versions}, {sum(sizes) / 1000:.0f} kB", file=sys.stderr)


if __name__ == "__main__":
    main()
