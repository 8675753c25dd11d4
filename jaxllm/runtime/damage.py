"""What is done about a damaged checkpoint: a warning, and out of the way with it."""

from etils import epath

from jaxllm.runtime.console import console
from jaxllm.runtime.processes import barrier
from jaxllm.runtime.seal import Damaged
from jaxllm.runtime.store.working import keeps


def warn_damaged(error: Damaged, then: str) -> None:
    """Warn that a checkpoint is damaged. then: what happens next, as the end of the sentence."""
    console.print(
        f"warning: {error.step_dir} is damaged ({error.what}); it is set aside, {then}",
        soft_wrap=True,
    )


def set_aside(step_dir: epath.Path) -> None:
    """Move a damaged checkpoint to STAGE/damaged/STEP for inspection; the one that was there before is removed."""
    if keeps(step_dir):
        damaged = step_dir.parent.parent / "damaged"
        # One at most is kept: a disk that damages files must not fill up with them.
        damaged.rmtree(missing_ok=True)
        damaged.mkdir()
        if step_dir.exists():
            step_dir.rename(damaged / step_dir.name)
    barrier("set aside")
