"""A stage is a module and a row: one from outside the package is run, resumed, planned and reported like any other."""

import inspect
import json
import shutil

import pytest

from jaxllm import __main__ as cli
from jaxllm import life, run, stages
from jaxllm.config import InputError, load
from jaxllm.models import transformer
from jaxllm.plan import planning
from jaxllm.report import report
from jaxllm.runtime.mesh import planned_mesh
from tests.conftest import ROOT
from tests.stages import toy


@pytest.fixture
def table(monkeypatch):
    """The table with one more row."""
    monkeypatch.setattr(stages, "TABLE", (*stages.TABLE, toy.ROW))
    monkeypatch.chdir(ROOT)


@pytest.fixture
def directory(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    return tmp_path / "run"


def do(directory, *flags):
    cli.main(["toy", "configs/tiny.yaml", "--run-dir", str(directory), *flags])
    return json.loads((directory / "toy" / "result.json").read_text())


def test_it_is_run_and_resumed_with_the_same_bits(table, directory, tmp_path, capsys):
    uninterrupted = do(directory)
    assert uninterrupted["distance"] < 0.3
    other = tmp_path / "other"
    shutil.copytree(directory, other, ignore=shutil.ignore_patterns("toy"))

    class Interrupted(Exception):
        pass

    run_training = run.run_training

    def interrupted_after_20(directory, title, training, *rest):
        def evaluate(step, state):
            if step == 20:
                raise Interrupted
            return training.evaluate(step, state)

        return run_training(directory, title, training._replace(evaluate=evaluate), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run_training", interrupted_after_20)
        with pytest.raises(Interrupted):
            do(other)
    assert not (other / "toy" / "result.json").exists()
    assert (other / "toy" / "checkpoints" / "10").exists()
    resumed = do(other)
    assert resumed["at"] == uninterrupted["at"]
    assert resumed["distance"] == uninterrupted["distance"]
    capsys.readouterr()
    do(other)
    assert "finished already" in capsys.readouterr().err


def test_another_config_of_it_is_refused(table, directory, capsys):
    do(directory)
    with pytest.raises(SystemExit):
        do(directory, "--toy.batch-size", "16")
    assert "toy.batch_size: 8 -> 16" in capsys.readouterr().err


def test_it_is_planned(table):
    config = load(life.config_class(stages.TABLE), ROOT / "configs" / "tiny.yaml")
    (program,), held = planning.stage_programs(config, "toy", planned_mesh(config.mesh, 8))
    assert program.name == "step"
    assert held.keys() == {"policy"}
    with pytest.raises(InputError, match=r"--stage rank: is not known; known: pretrain, .*, toy"):
        planning.plan(config, planning.PlanArgs("x", "v5p:2x2x1", stage="rank"))


def test_it_is_in_the_report_the_help_and_the_config(table, directory, capsys):
    do(directory)
    report.write_report(directory, stages.names())
    assert "distance" in (directory / "report.md").read_text()
    cli.main(["--help"])
    assert "jaxllm toy CONFIG" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"stages: 'nope' is unknown; known: .*, toy"):
        life.Life(stages=("nope",))


def test_only_run_trains():
    """No stage calls the loop: a stage returns a record, and jaxllm.run runs it."""
    for file in (ROOT / "jaxllm" / "stages").glob("*.py"):
        source = file.read_text()
        assert "run_training" not in source, file.name
        assert "train.fit" not in source, file.name


def test_every_row_names_what_exists():
    for row in stages.TABLE:
        for spec in filter(None, (row.section, row.run, row.programs)):
            assert stages.load(spec) is not None
        assert row.trains == bool(row.programs)
        assert bool(row.title) == (row.kind == "policy")


def test_the_readme_says_how_many_calls_it_is_to_the_forward_pass(directory, monkeypatch):
    shutil.rmtree(directory / "pretrain")
    monkeypatch.chdir(ROOT)
    package = str(ROOT / "jaxllm")

    class Reached(Exception):
        pass

    def forward(*_, **__):
        raise Reached(sum(frame.filename.startswith(package) for frame in inspect.stack()))

    monkeypatch.setattr(transformer, "apply_routed", forward)
    with pytest.raises(Reached) as reached:
        cli.main(["pretrain", "configs/tiny.yaml", "--run-dir", str(directory)])
    depth = reached.value.args[0]
    assert (
        f"From `main` to the model's forward pass it is {depth} calls."
        in (ROOT / "jaxllm" / "README.md").read_text()
    ), depth
