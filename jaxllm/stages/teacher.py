"""The teacher of pretrain and sft: its soft targets for the packed rows, computed once before training.

The teacher makes one pass over the rows of both splits, on the stage's mesh. What it thinks of every target is kept in the
cache of the run directory (`data.soft_targets`), under a name made of the rows, the values of its weights and top_k: another
start finds it there. All processes compute it together. Process 0 writes it where they share a disk; in a store each writes
the whole into its own folder.
"""

import functools
import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.config import InputError
from jaxllm.data.batches import epoch
from jaxllm.data.cache import key_of
from jaxllm.data.mixture import Mixture
from jaxllm.data.rows import Rows
from jaxllm.data.soft_targets import KeptTargets
from jaxllm.model_store import load_model, read_model_card, weights_key
from jaxllm.models import lora, next_token
from jaxllm.models.config import ModelConfig
from jaxllm.rl.roles import check_vocabulary
from jaxllm.runtime.console import console
from jaxllm.runtime.processes import gather_json
from jaxllm.runtime.store.working import keeps, share
from jaxllm.runtime.transfer import fetch
from jaxllm.sharding import activation
from jaxllm.stages.config import LanguageModelConfig
from jaxllm.workspace import Workspace


class _Part(NamedTuple):
    """Some rows of a source, of which the teacher's thoughts are kept together."""

    rows: Rows
    kept: KeptTargets
    number: int


def check_top_k(config: LanguageModelConfig, model: ModelConfig, stage: str) -> None:
    """Raises InputError where more tokens are to be kept than there are."""
    top_k = config.teacher.top_k
    if config.teacher.stage_dir and model.vocab_size and top_k > model.vocab_size:
        raise InputError(
            f"{stage}.teacher.top_k: {top_k} tokens cannot be kept of a vocabulary of {model.vocab_size}; lower it"
        )


def with_soft_targets(
    workspace: Workspace,
    stage: str,
    config: LanguageModelConfig,
    model: ModelConfig,
    rows: Mapping[str, Mixture],
) -> dict[str, Mixture]:
    """The rows of each split, with the teacher's soft targets: {"train", "held_out"}. Computes what the cache lacks.

    Raises:
      InputError: the teacher has another vocabulary or a shorter context, or fewer tokens than top_k.
      Stopped: after a signal, between two parts.
    """
    check_top_k(config, model, stage)
    source = _source(workspace, stage, config, model, rows["train"][0][0].length)
    weights = weights_key(source)
    top_k = config.teacher.top_k
    cache = Path(workspace.run_dir / "cache")
    found: dict[str, Mixture] = {}
    parts = []
    for split, mixture in rows.items():
        with_kept = []
        for packed, weight in mixture:
            key = key_of(packed.fingerprint, weights, top_k)
            sizes = (packed.num_rows, packed.length, top_k, model.vocab_size)
            kept = KeptTargets(cache, key, *sizes)
            # A run that was begun with other soft targets is not resumed with these.
            with_kept.append((packed._replace(kept=kept, fingerprint=key), weight))
            parts += [_Part(packed, kept, number) for number in range(kept.num_parts)]
        found[split] = with_kept
    if missing := _missing(parts):
        _print_size(stage, source, parts, missing)
        _keep(workspace, stage, config, source, missing)
    return found


def _source(
    workspace: Workspace, stage: str, config: LanguageModelConfig, model: ModelConfig, length: int
) -> str:
    """The teacher's stage directory, if it can read the student's rows of `length` tokens."""
    field = f"{stage}.teacher.stage_dir"
    source = workspace.source(config.teacher.stage_dir, "", stage)
    # Before it is loaded: a wrong teacher should not take minutes to find.
    check_vocabulary(workspace, field, source, model)
    its_model, _ = read_model_card(source)
    its_model.row_length(length, f"{field}: {source}")
    return source


def _missing(parts: list[_Part]) -> list[_Part]:
    """The parts that one process or another lacks: all of them take part in computing them."""
    here = [index for index, part in enumerate(parts) if not part.kept.has(part.number)]
    return [parts[index] for index in sorted({*itertools.chain(*gather_json(here))})]


def _print_size(stage: str, source: str, parts: list[_Part], missing: list[_Part]) -> None:
    """Print how much is kept; the pass, which follows, may take hours."""
    num_targets = 0
    size = 0
    for part in parts:
        if part.number == 0:
            num_targets += part.rows.num_tokens
            size += part.rows.num_tokens * part.kept.top_k * part.kept.dtype.itemsize
    console.print(
        f"{stage}: {source} keeps {parts[0].kept.top_k} tokens of each of {num_targets:,} targets, "
        f"{size / 1e6:,.1f} MB in the cache; {len(missing)} of {len(parts)} parts are missing",
        soft_wrap=True,
    )


def _keep(
    workspace: Workspace,
    stage: str,
    config: LanguageModelConfig,
    source: str,
    missing: list[_Part],
) -> None:
    """Loads the teacher and lets it look at the rows of the missing parts."""
    began = time.monotonic()
    workspace.ledger.mark("start")
    params, model = load_model(source, workspace.mesh)
    program = functools.partial(
        jax.jit(
            functools.partial(next_token.soft_targets, model=model, top_k=config.teacher.top_k)
        ),
        lora.merge(params),
    )
    # As many rows as the student has at a time.
    batch_size = config.batch_size // config.num_micro
    with workspace.signals as signals:
        for done, part in enumerate(missing, start=1):
            _keep_part(workspace, part, program, batch_size)
            console.print(f"{stage}: teacher {done}/{len(missing)} parts")
            if signals.stop_after() and done < len(missing):
                raise signals.stopped(
                    f"{stage}: the teacher has seen {done} of {len(missing)} parts"
                )
    share(workspace.run_dir, f"soft targets of {stage}")
    workspace.ledger.mark("work")
    console.print(f"{stage}: kept in {time.monotonic() - began:,.1f} s")


def _keep_part(workspace: Workspace, part: _Part, program: Any, batch_size: int) -> None:
    """Computes the soft targets of a part and writes them; program: a batch -> `next_token.soft_targets`."""
    numbers = part.kept.numbers(part.number)
    sharding = activation(workspace.mesh, "batch", None)
    counts = []
    records = []
    for batch in epoch(numbers, part.rows.row, batch_size, sharding):
        ids, logprobs = fetch(program(batch))
        is_target = fetch(batch["loss_mask"])
        counts.append(is_target.sum(1))
        records.append(part.kept.records(ids[is_target], logprobs[is_target]))
        workspace.signals.alive()
    if keeps(workspace.run_dir):
        # Rows that fill the last batch have no targets.
        of_rows = np.concatenate(counts)[: len(numbers)]
        part.kept.write(part.number, of_rows, np.concatenate(records))
