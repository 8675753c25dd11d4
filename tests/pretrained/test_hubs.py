"""hf://ORG/NAME against a hub of ours, through the hub's own client: each import is a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from jaxllm import config, run
from jaxllm.config import InputError
from jaxllm.life import Config
from jaxllm.pretrained import hub_stages
from jaxllm.runtime.hubs import names
from tests.conftest import ROOT
from tests.fake_hub import COMMIT, Hub, serve
from tests.pretrained.test_convert import hf_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The files of a small published model, and some that nobody needs."""
    folder, _ = hf_folder(tmp_path_factory.mktemp("hub") / "model", "llama3", shards=2)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | {"original/model-0.safetensors": b"a copy", "pytorch_model.bin": b"pickled"}


@pytest.fixture
def hub(model):
    served = Hub()
    served.files = {"org/small": dict(model)}
    with serve(served) as address:
        served.address = address
        yield served


def command(hub, tmp_path, *words, **environment):
    """(exit code, what was printed) of a command."""
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "MODELSCOPE_ENDPOINT": hub.address,
        "MODELSCOPE_CACHE": str(tmp_path / "cache"),
        "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "2",
        "JAX_PLATFORMS": "cpu",
        **environment,
    }
    line = [sys.executable, "-m", "jaxllm", *words]
    run = subprocess.run(line, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    return run.returncode, run.stdout + run.stderr


def imported(hub, tmp_path, source, **environment):
    """(exit code, what was printed) of an import."""
    return command(hub, tmp_path, "import", source, str(tmp_path / "stage"), **environment)


def test_a_tokenizer_is_fetched_without_the_weights(hub, tmp_path):
    code = (
        "from jaxllm.serve.served import load_tokenizers; "
        "[(name, found)] = load_tokenizers(['hf://org/small']).items(); "
        "print(name, len(found.encode('the soup')))"
    )
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
    }
    line = [sys.executable, "-c", code]
    run = subprocess.run(line, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    name, count = run.stdout.split()
    assert name == "small" and int(count) > 0
    assert not [*(tmp_path / "cache").rglob("*.safetensors")]


def test_a_model_is_fetched_once_and_its_commit_recorded(hub, tmp_path):
    hub.failures = 1  # which passes
    code, log = imported(hub, tmp_path, "hf://org/small@main")
    assert code == 0, log
    result = json.loads((tmp_path / "stage" / "result.json").read_text())
    assert result["source"] == f"hf://org/small@{COMMIT}"
    weights = (tmp_path / "stage" / "checkpoints" / "0" / "model-0.safetensors").read_bytes()
    assert weights == hub.files["org/small"]["model-0.safetensors"]
    fetched = [path for path in hub.asked if "/resolve/" in path]
    assert not [path for path in fetched if "original" in path or "bin" in path]
    # Again, without the network: from the cache.
    (tmp_path / "stage").rename(tmp_path / "first")
    hub.asked.clear()
    code, log = imported(hub, tmp_path, f"hf://org/small@{COMMIT}", HF_HUB_OFFLINE="1")
    assert code == 0 and "offline" in log and not hub.asked, log


@pytest.mark.life
@pytest.mark.parametrize("name", ["model-1.safetensors", "config.json"])
def test_what_is_not_the_hubs_is_fetched_again(hub, tmp_path, name):
    hub.broken = {name: 1}
    code, log = imported(hub, tmp_path, "hf://org/small")
    assert code == 0 and f"{name}: is not what the hub has" in log, log


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("hf://org/gated", "is gated"),
        ("hf://org/missing", "has no such repository"),
        ("hf://org/small@v9", "has no such revision"),
        ("modelscope://org/gated", "does not show it to this user"),
        ("modelscope://org/missing", "has no such repository"),
        ("modelscope://org/small@v9", "has no such repository or revision"),
    ],
)
def test_what_cannot_be_had_is_one_line_with_what_to_do(hub, tmp_path, source, what):
    hub.files["org/gated"], hub.gated = hub.files["org/small"], {"org/gated"}
    code, log = imported(hub, tmp_path, source)
    assert code == 2 and what in log and "Traceback" not in log, log
    assert not (tmp_path / "stage").exists()


@pytest.mark.life
def test_files_that_stay_wrong_are_refused(hub, tmp_path):
    hub.broken = {"model-1.safetensors": 100}
    code, log = imported(hub, tmp_path, "hf://org/small")
    assert code == 2 and "fetched twice" in log and not (tmp_path / "stage").exists(), log


def test_a_hub_that_is_away_is_one_line(hub, tmp_path):
    code, log = imported(hub, tmp_path, "hf://org/small", HF_HUB_OFFLINE="1")
    assert code == 2 and "is not in the cache" in log and "Traceback" not in log, log


@pytest.mark.parametrize("source", ["hf://", "hf://name", "hf://a/b/c", "hf://a/b@"])
def test_other_names_are_refused(source):
    with pytest.raises(InputError, match="must be hf://ORG/NAME"):
        names.fetch(source)
    with pytest.raises(InputError, match="must be hf://datasets/ORG/NAME/PATH"):
        names.fetch_files(source)


def test_a_name_that_always_means_the_same_is_pinned():
    assert names.is_pinned(f"hf://org/small@{COMMIT}")
    assert names.is_pinned("modelscope://org/small@master:0123456789ab")
    assert not names.is_pinned("hf://org/small@main") and not names.is_pinned("modelscope://o/s")


# --- ModelScope.


def test_a_model_of_modelscope_is_named_by_its_content(hub, tmp_path):
    code, log = imported(hub, tmp_path, "modelscope://org/small")
    assert code == 0, log
    source = json.loads((tmp_path / "stage" / "result.json").read_text())["source"]
    assert source.startswith("modelscope://org/small@master:")
    weights = (tmp_path / "stage" / "checkpoints" / "0" / "model-1.safetensors").read_bytes()
    assert weights == hub.files["org/small"]["model-1.safetensors"]
    (tmp_path / "stage").rename(tmp_path / "first")
    code, log = imported(hub, tmp_path, source, HF_HUB_OFFLINE="1")
    assert code == 0, log
    (tmp_path / "stage").rename(tmp_path / "second")
    hub.files["org/small"]["config.json"] += b" "
    code, log = imported(hub, tmp_path, source)
    assert code == 2 and "has other files there now" in log, log


@pytest.mark.life
def test_files_of_modelscope_that_stay_wrong_are_refused(hub, tmp_path):
    hub.broken = {"model-1.safetensors": 100}
    code, log = imported(hub, tmp_path, "modelscope://org/small")
    assert code == 2 and "Traceback" not in log and not (tmp_path / "stage").exists(), log


# --- A run from hubs, and back to one.

TEXTS = "".join(json.dumps({"text": f"a line with the number {n}"}) + "\n" for n in range(400))


@pytest.mark.parametrize("scheme", ["hf", pytest.param("modelscope", marks=pytest.mark.life)])
def test_a_stage_begins_from_a_model_and_data_on_a_hub(hub, tmp_path, scheme):
    hub.files["datasets/org/texts"] = {
        "data/one.jsonl": TEXTS.encode(),
        "data/two.jsonl": TEXTS.replace("line", "word").encode(),
        "other.jsonl": b"not JSON",
    }
    config = tmp_path / "config.yaml"
    config.write_text(f"""
name: from-a-hub
stages: [tokenizer, pretrain]
logging: {{tensorboard: false}}
tokenizer: {{init_from: '{scheme}://org/small'}}
pretrain:
  init_from: '{scheme}://org/small'
  num_steps: 2
  batch_size: 4
  length: 16
  eval_batches: 1
  data: {{sources: [{{path: '{scheme}://datasets/org/texts/data/*.jsonl'}}]}}
""")
    words = ("run", str(config), "--run-dir", str(tmp_path / "run"))
    environment = {"JAXLLM_CACHE": str(tmp_path / "kept"), "MODELSCOPE_CACHE": str(tmp_path / "ms")}
    code, log = command(hub, tmp_path, *words, **environment)
    assert code == 0, log
    recorded = json.loads((tmp_path / "run/pretrain/config.json").read_text())
    pinned = {"hf": f"hf://org/small@{COMMIT}", "modelscope": "modelscope://org/small@master:"}
    assert recorded["pretrain"]["init_from"].startswith(pinned[scheme])
    assert recorded["tokenizer"]["init_from"] == recorded["pretrain"]["init_from"]
    fetched = [path for path in hub.asked if "other.jsonl" in path and "resolve" in path]
    assert not fetched
    # Again without the network: everything is here.
    code, log = command(hub, tmp_path, *words, HF_HUB_OFFLINE="1", **environment)
    assert code == 0 and "Nothing to do" in log, log


def test_every_model_of_a_stage_is_named_for_good(monkeypatch):
    """Policy, reward model and teachers; a name that is none of a hub stays."""
    monkeypatch.setattr(hub_stages, "pinned", lambda source: f"{source}@commit")
    hub = "hf://org/"
    life = config.build(
        Config,
        {
            "sft": {"teacher": {"stage_dir": f"{hub}large"}},
            "ppo": {
                "init_from": f"{hub}policy",
                "reward_from": f"{hub}reward",
                "teachers": [{"stage_dir": "runs/a/sft"}, {"stage_dir": f"{hub}b", "weight": 2.0}],
            },
        },
        name="test",
    )
    found = run._with_pinned_models(life, ["sft", "ppo"])
    assert found.sft.teacher.stage_dir == f"{hub}large@commit"
    assert (found.ppo.init_from, found.ppo.reward_from) == (
        f"{hub}policy@commit",
        f"{hub}reward@commit",
    )
    assert [each.stage_dir for each in found.ppo.teachers] == ["runs/a/sft", f"{hub}b@commit"]
    assert found.ppo.teachers[1].weight == 2.0
    # Nothing else has changed, and a stage that does not run keeps its names.
    assert found.ppo.sampling == life.ppo.sampling and found.grpo is life.grpo
    assert run._with_pinned_models(life, ["sft"]).ppo == life.ppo


def test_a_model_is_exported_to_a_hub_with_a_card(hub, tmp_path):
    code, log = imported(hub, tmp_path, "hf://org/small")
    assert code == 0, log
    code, log = command(
        hub, tmp_path, "export", str(tmp_path / "stage"), "hf://me/mine", HF_TOKEN="hf_secret"
    )
    assert code == 0 and "uploaded: " in log and "hf_secret" not in log, log
    mine = hub.files["me/mine"]
    assert {"config.json", "README.md", "tokenizer.json"} <= set(mine)
    card = mine["README.md"].decode()
    assert card.startswith("---\n") and "- jaxllm" in card and f"hf://org/small@{COMMIT}" in card
    # What comes back is what was there.
    (tmp_path / "stage").rename(tmp_path / "first")
    code, log = imported(hub, tmp_path, "hf://me/mine", HF_HOME=str(tmp_path / "other cache"))
    assert code == 0, log


@pytest.mark.life
def test_an_upload_that_is_refused_is_one_line(hub, tmp_path):
    imported(hub, tmp_path, "hf://org/small")
    hub.files["me/other"], hub.gated = {}, {"me/other"}
    code, log = command(hub, tmp_path, "export", str(tmp_path / "stage"), "hf://me/other")
    assert code == 2 and "Traceback" not in log and "hf://me/other" in log, log
    code, log = command(hub, tmp_path, "export", str(tmp_path / "stage"), "modelscope://me/other")
    assert code == 2 and "only hf:// takes uploads" in log, log
