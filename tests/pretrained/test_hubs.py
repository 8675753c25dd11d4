"""hf://ORG/NAME against a hub of ours, through the hub's own client: each import is a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from jaxllm.config import InputError
from jaxllm.pretrained import hubs
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


def imported(hub, tmp_path, source, **environment):
    """(exit code, what was printed) of an import."""
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        **environment,
    }
    command = [sys.executable, "-m", "jaxllm", "import", source, str(tmp_path / "stage")]
    run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return run.returncode, run.stdout + run.stderr


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
        ("hf://org/missing", "has no such model"),
        ("hf://org/small@v9", "has no such revision"),
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
        hubs.fetch(source)
