"""PPO-ptx learns from documents and from conversations: of the latter the assistant's tokens are the targets."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from jaxllm.config import InputError
from jaxllm.data.config import DataConfig, Source
from jaxllm.models.config import ModelConfig
from jaxllm.rl.config import PPOConfig, PtxConfig
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.stages import reinforce
from jaxllm.tokenizers.trained import train
from tests.stages.worlds import run_spec
from tests.tokenizers.test_trained import CORPUS


@pytest.fixture(scope="module")
def tokenizer():
    return train(
        iter(CORPUS), vocab_size=400, model_type="bpe", character_coverage=0.9995, num_threads=1
    )


@pytest.fixture
def files(tmp_path):
    texts = [f"the quick fox {number}" for number in range(60)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    chats = [json.dumps({"prompt": f"{text}?", "response": f"yes {text}"}) for text in texts]
    (tmp_path / "chats.jsonl").write_text("\n".join(chats))
    return tmp_path


def rows_of(tokenizer, folder, *sources):
    data = DataConfig(tuple(Source(str(folder / name)) for name in sources))
    ptx = PtxConfig(coef=1.0, data=data, batch_size=8, length=48)
    model = ModelConfig(vocab_size=tokenizer.vocab_size, max_length=64)
    spec = run_spec(dataclasses.replace(PPOConfig(), ptx=ptx), model)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    workspace = types.SimpleNamespace(mesh=mesh, run_dir=folder / "run", seed=0)
    return reinforce._ptx_rows(workspace, spec, tokenizer, "ppo")


def test_of_documents_all_tokens_but_the_first_are_targets(tokenizer, files):
    batch = jax.device_get(rows_of(tokenizer, files, "texts.txt")(np.int32(0)))
    predicted = (batch["segment_ids"] > 0) & (batch["positions"] > 0)
    assert (batch["loss_mask"] == predicted).all()
    assert batch["tokens"].shape == (8, 48) and batch["loss_mask"].mean() > 0.5


def test_of_conversations_the_replies_and_their_ends_are_targets(tokenizer, files):
    rows_at = rows_of(tokenizer, files, "chats.jsonl")
    for step in range(3):
        batch = jax.device_get(rows_at(np.int32(step)))
        for tokens, mask in zip(batch["tokens"], batch["loss_mask"], strict=True):
            said = tokenizer.decode(tokens[mask].tolist())
            replies = said.split("yes ")[1:]
            assert replies and "?" not in said and all("fox" in reply for reply in replies)
            assert (tokens[mask] == tokenizer.end_id).sum() == len(replies)


def test_the_two_kinds_are_not_mixed(tokenizer, files):
    with pytest.raises(
        InputError, match=r"ppo\.ptx\.data\.sources: some give documents and others"
    ):
        rows_of(tokenizer, files, "texts.txt", "chats.jsonl")
