"""The options of `jaxllm status`."""

import dataclasses
from typing import Annotated

import tyro

from jaxllm.config.ranges import PositiveSeconds


@dataclasses.dataclass(frozen=True)
class StatusArgs:
    """Where a run is: stage, step, speed, newest numbers, last save. It only reads."""

    run_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Run directory: a folder, gs://BUCKET/PATH or s3://BUCKET/PATH."""
    watch: bool = False
    """Show it again and again, until the run is finished."""
    every: PositiveSeconds = 5
    """Seconds between two looks."""
    json: bool = False
    """Print a JSON object, with --watch one a line, instead of a table."""
