"""The reward model against known utilities: the real stage is trained on rankings sampled from a Plackett-Luce model.

    python -m pytest tests/stages/test_utilities.py -m slow -n 0 -s        with its figures: 15 minutes on 2 cores

A ranking of K responses is the order of their utilities plus Gumbel noise. Of any two responses the better one is then
ranked first with probability sigmoid(difference of utilities). The sign of the true difference is therefore right as
often as any model can be (the Bayes ceiling), and the true difference is calibrated.
"""

import json

import numpy as np
import pytest
import yaml

from jaxllm.data.config import DataConfig, Source
from jaxllm.data.splits import examples
from jaxllm.evaluation import measures
from tests.conftest import ROOT, jaxllm

pytestmark = pytest.mark.usefixtures("compiled_well")

WORDS = [
    "good", "bad", "room", "food", "staff", "view", "door", "lamp",
    "soup", "rain", "chair", "phone", "light", "music", "bread", "wine",
]  # fmt: skip
TIMES = ["morning", "night"]


def utilities(prompt: str, responses: list[str], weights: np.ndarray) -> np.ndarray:
    """Of each response, the sum of its words' weights float[2, words], which depend on the prompt's time of day.

    The time of day matters so that a model must read the prompt.
    """
    word_utilities = weights[TIMES.index(prompt.split()[-1])]
    sums = []
    for response in responses:
        sums.append(sum(word_utilities[WORDS.index(word)] for word in response.split()))
    return np.array(sums)


def records(rng: np.random.Generator, count: int, weights: np.ndarray):
    """Rankings of K = 2 to 9 responses of 1 to 4 words, in the order of utility plus Gumbel noise."""
    for i in range(count):
        prompt = f"{i} {rng.choice(TIMES)}"
        texts = [
            " ".join(rng.choice(WORDS, rng.integers(1, 5))) for _ in range(rng.integers(2, 10))
        ]
        different = list(dict.fromkeys(texts))
        # If all texts are the same one, a second is added.
        responses = [*different, "door lamp soup rain"][: max(2, len(different))]
        noisy = utilities(prompt, responses, weights) + rng.gumbel(size=len(responses))
        yield {
            "prompt": prompt,
            "responses": responses,
            "ranks": (1 + np.argsort(np.argsort(-noisy))).tolist(),
        }


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "seed"), [("pairwise", 0), ("plackett_luce", 1)])
def test_the_reward_model_recovers_the_utilities(tiny_run, tmp_path, loss, seed):
    rng = np.random.default_rng(seed)
    weights = rng.normal(0.0, 0.6, (2, len(WORDS)))
    file = tmp_path / "rankings.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records(rng, 16000, weights)))
    directory = tmp_path / "run"
    directory.mkdir()
    for name in ("tokenizer", "sft"):
        (directory / name).symlink_to(tiny_run / name)
    config = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    config["reward"] = {
        "data": {"held_out_fraction": 0.15, "sources": [{"path": str(file)}]},
        "loss": loss,
        "batch_size": 32,
        "num_epochs": 6,
        "eval_every": 1000,
        "optim": {"learning_rate": 2e-3, "warmup_steps": 50, "weight_decay": 0.0},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    process = jaxllm("reward", str(tmp_path / "config.yaml"), "--run-dir", str(directory))
    _, log = process.communicate(timeout=1800)
    assert process.returncode == 0, log
    result = json.loads((directory / "reward" / "result.json").read_text())

    true_margins = []  # of every held-out pair: utility of the one ranked better, minus the other's
    data = DataConfig(sources=(Source(str(file)),), held_out_fraction=0.15)
    for example in examples(data, "ranked", "held_out"):
        scores = utilities(example.messages[-1]["content"], example.responses, weights)
        true_margins.append(measures.pair_margins(scores[None], np.array([example.ranks])))
    margins = np.concatenate(true_margins)
    ceiling = (margins > 0).mean() + 0.5 * (margins == 0).mean()
    print(
        f"{loss}: accuracy {result['accuracy']:.4f}, Bayes ceiling {ceiling:.4f}, "
        f"expected calibration error {result['calibration_error']:.4f} "
        f"(true utilities: {measures.calibration_error(margins):.4f}), {len(margins)} pairs"
    )
    assert len(margins) == result["pairs"]
    assert ceiling - result["accuracy"] < 0.01
    assert result["calibration_error"] < 0.02
