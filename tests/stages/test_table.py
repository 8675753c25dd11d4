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
from jaxllm.sharding import planned_mesh
from tests.conftest import ROOT
from tests.stages import toy


@pytest.fixture
def table(monkeypatch):
    """The table with one more row, and the config that has its section."""
    longer = (*stages.TABLE, toy.ROW)
    monkeypatch.setattr(stages, "TABLE", longer)
    monkeypatch.setattr(run, "Config", life.config_class(longer))
    monkeypatch.chdir(ROOT)


@pytest.fixture
def directory(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    return tmp_path / "run"


def do(directory, *flags):
    cli.main(["toy", "configs/tiny.yaml", "--run-dir", str(directory), *flags])
    return json.loads((directory / "toy" / "result.json").read_text())


def test_it_is_run_and_resumed_with_the_same_bits(table, directory, tmp_path, capsys):
    whole = do(directory)
    assert whole["distance"] < 0.3
    other = tmp_path / "other"
    shutil.copytree(directory, other, ignore=shutil.ignore_patterns("toy"))

    class Cut(Exception):
        pass

    fit = run.run_training

    def cut_after_20(directory, title, training, keeping, logging):
        def evaluate(step, state):
            if step == 20:
                raise Cut
            return training.evaluate(step, state)

        return fit(directory, title, training._replace(evaluate=evaluate), keeping, logging)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run_training", cut_after_20)
        with pytest.raises(Cut):
            do(other)
    assert (
        not (other / "toy" / "result.json").exists()
        and (other / "toy" / "checkpoints" / "10").exists()
    )
    resumed = do(other)
    assert resumed["at"] == whole["at"] and resumed["distance"] == whole["distance"]
    capsys.readouterr()
    do(other)
    assert "finished already" in capsys.readouterr().err


def test_another_config_of_it_is_refused(table, directory, capsys):
    do(directory)
    with pytest.raises(SystemExit):
        do(directory, "--toy.batch-size", "16")
    assert "toy.batch_size: 8 -> 16" in capsys.readouterr().err


def test_it_is_planned(table):
    config = load(run.Config, ROOT / "configs" / "tiny.yaml")
    (program,), held = planning.stage_programs(config, "toy", planned_mesh(config.mesh, 8))
    assert program.name == "step" and held.keys() == {"policy"}
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
    """No stage calls the loop: a stage is a record, and jaxllm.run runs it."""
    for file in (ROOT / "jaxllm" / "stages").glob("*.py"):
        assert "run_training" not in file.read_text() and "train.fit" not in file.read_text(), (
            file.name
        )


def test_every_row_names_what_is_there():
    for row in stages.TABLE:
        for spec in filter(None, (row.section, row.run, row.programs)):
            assert stages.load(spec) is not None
        assert row.trains == bool(row.programs) and bool(row.title) == (row.kind == "policy")


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
