"""A profile of chosen steps: it has them and no others, and says what PPO's roles do."""

import jax
import jax.numpy as jnp
import pytest
import yaml
from etils import epath

from jaxllm.config import InputError, build
from jaxllm.runtime.config import LoggingConfig
from jaxllm.runtime.profile import Profiler
from tests.conftest import jaxllm


def recorded(folder):
    """The content of all profiles in a folder."""
    return b"".join(file.read_bytes() for file in folder.rglob("*.xplane.pb"))


def run(folder, steps, begun=0, end=6):
    profiler = Profiler(epath.Path(folder), steps, begun)
    for step in range(begun + 1, end + 1):
        with jax.profiler.TraceAnnotation(f"step-number-{step}"):
            state = jnp.arange(8) + step
        profiler.after(step, state)
    profiler.close()


@pytest.mark.parametrize(
    ("steps", "begun", "end", "want"),
    [
        ((3, 4), 0, 6, {3, 4}),
        ((1, 1), 0, 3, {1}),
        ((3, 4), 2, 6, {3, 4}),  # a run that resumes just before
        ((3, 4), 3, 6, set()),  # in the middle: half a profile says nothing
        ((3, 9), 0, 4, {3, 4}),  # cut by the end of the run
        ((), 0, 4, set()),
    ],
)
def test_the_chosen_steps_are_recorded(tmp_path, steps, begun, end, want):
    run(tmp_path, steps, begun, end)
    content = recorded(tmp_path)
    assert {step for step in range(1, 10) if f"step-number-{step}".encode() in content} == want


@pytest.mark.parametrize("steps", [[3], [4, 3], [1, 2, 3], [0, 2]])
def test_steps_that_are_no_range_are_refused(steps):
    with pytest.raises(InputError, match="profile_steps"):
        build(LoggingConfig, {"profile_steps": steps}, name="logging")


@pytest.mark.life
def test_the_timeline_of_ppo_names_its_roles(tmp_path):
    config = {
        "extends": "tests/faults/life.yaml",
        "logging": {"tensorboard": False, "profile_steps": [2, 3]},
    }
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(config | {"extends": f"{epath.Path().resolve()}/tests/faults/life.yaml"})
    )
    process = jaxllm("run", str(path), "--run-dir", str(tmp_path / "run"))
    _, log = process.communicate(timeout=600)
    assert process.returncode == 0, log
    for stage in ("pretrain", "reward", "ppo"):
        assert recorded(tmp_path / "run" / stage / "profile"), stage
    content = recorded(tmp_path / "run" / "ppo" / "profile")
    for role in (b"rollout", b"reference", b"actor", b"critic"):
        assert role in content, role
