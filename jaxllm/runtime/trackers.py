"""Experiment trackers beside metrics.jsonl: Weights & Biases, SwanLab, MLflow, trackio.

Each is an extra, and configured by its own environment variables (WANDB_MODE, SWANLAB_MODE, MLFLOW_TRACKING_URI,
TRACKIO_DIR, ...). A stage that resumes continues its curves. A tracker that fails is said once and left alone: it never
stops a run.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.config import InputError
from jaxllm.runtime.console import console

# (step, {name of a metric: value})
type Write = Callable[[int, Mapping[str, float]], None]


class Writer(NamedTuple):
    """A destination of metrics."""

    write: Write
    close: Callable[[], None]


def open_trackers(
    names: Sequence[str], project: str, run_name: str, directory: Path
) -> list[Writer]:
    """A writer for each tracker.

    Args:
        names: of the trackers, keys of `_OPEN`.
        project: in which the run appears.
        run_name: the same name continues the same curves.
        directory: for files of trackers that keep them with the run.

    Raises:
        InputError: a tracker is not installed.
    """
    return [_guarded(name, project, run_name, directory) for name in names]


def _guarded(name: str, project: str, run_name: str, directory: Path) -> Writer:
    """A tracker whose failures are said once; after the first one it gets nothing more."""
    broken = False

    def attempt(run: Callable[[], Any]) -> Any:
        nonlocal broken
        if broken:
            return None
        try:
            return run()
        except ImportError as error:
            if (error.name or "").partition(".")[0] != name:
                raise
            raise InputError(
                f"logging.trackers: needs {name}; pip install 'jaxllm[{name}]', or leave it out"
            ) from None
        except Exception as error:  # whatever a tracker raises
            broken = True
            text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            console.print(
                f"warning: {name} failed ({text}); training goes on without it", soft_wrap=True
            )
            return None

    writer: Writer | None = attempt(lambda: _OPEN[name](project, run_name, directory))
    if writer is None:
        return Writer(lambda step, values: None, lambda: None)
    return Writer(
        lambda step, values: attempt(lambda: writer.write(step, values)),
        lambda: attempt(writer.close),
    )


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    """Without values that trackers refuse; metrics.jsonl has them."""
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def _wandb(project: str, name: str, directory: Path) -> Writer:
    import wandb  # pyright: ignore[reportMissingImports] - an extra

    # The id makes a resumed run continue the same curves.
    run = wandb.init(project=project, name=name, id=name, dir=str(directory), resume="allow")
    return Writer(lambda step, values: run.log(dict(values), step=step), run.finish)


def _swanlab(project: str, name: str, directory: Path) -> Writer:
    import swanlab  # pyright: ignore[reportMissingImports] - an extra

    run = swanlab.init(
        project=project, name=name, id=name, log_dir=str(directory / "swanlab"), resume="allow"
    )
    return Writer(lambda step, values: run.log(_finite(values), step=step), run.finish)


def _mlflow(project: str, name: str, directory: Path) -> Writer:
    import mlflow  # pyright: ignore[reportMissingImports] - an extra

    del directory  # MLFLOW_TRACKING_URI says where
    client = mlflow.MlflowClient()
    experiment = mlflow.set_experiment(project).experiment_id
    wanted = name.replace("'", "_")
    earlier = client.search_runs([experiment], f"attributes.run_name = '{wanted}'", max_results=1)
    run = earlier[0] if earlier else client.create_run(experiment, run_name=wanted)
    run_id = run.info.run_id
    client.update_run(run_id, status="RUNNING")

    def write(step: int, values: Mapping[str, float]) -> None:
        mlflow.log_metrics(_finite(values), step=step, run_id=run_id)

    return Writer(write, lambda: client.set_terminated(run_id))


def _trackio(project: str, name: str, directory: Path) -> Writer:
    import trackio  # pyright: ignore[reportMissingImports] - an extra

    del directory  # TRACKIO_DIR says where
    run = trackio.init(project, name=name, resume="allow", embed=False)
    return Writer(lambda step, values: run.log(_finite(values), step=step), run.finish)


_OPEN: dict[str, Callable[[str, str, Path], Writer]] = {
    "wandb": _wandb,
    "swanlab": _swanlab,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
