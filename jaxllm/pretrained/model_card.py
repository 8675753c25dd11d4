"""The page of an exported model on a hub: what it was made from, its figures and its config."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from etils import epath

from jaxllm.runtime.files import read_json

_CARD = """\
---
library_name: transformers
tags:
- jaxllm
- {stage}
---

# {name}: {stage}

{about} with jaxllm ({code}).{simulated}

## Data

{data}

## Figures

| figure | value |
|---|---|
{figures}

## Config

```yaml
{config}```
"""
_SIMULATED = """

**The figures of the annotator are SIMULATED**: a program stood for the person who ranks or answers."""


def text(stage_dir: epath.PathLike) -> str:
    """The card of a stage's model, as Markdown with the fields that hubs read."""
    stage = Path(stage_dir)
    result = read_json(stage / "result.json") or {}
    config = read_json(stage / "config.json") or {}
    provenance = read_json(stage / "provenance.json") or {}
    section = config.get(stage.name, {})
    source = result.get("source") or section.get("init_from", "")
    simulated = result.get("simulated") or result.get("annotator_simulated")
    parts = {name: config[name] for name in ("model", stage.name) if name in config}
    return _CARD.format(
        stage=stage.name,
        name=config.get("name") or stage.parent.name or stage.name,
        about=" ".join(_about(result, source)),
        code=provenance.get("code", "an imported model"),
        simulated=_SIMULATED if simulated else "",
        data="\n".join(_data(config)) or "Not recorded.",
        figures="\n".join(f"| {name} | {value} |" for name, value in _figures(result)),
        config=yaml.safe_dump(parts, sort_keys=False, allow_unicode=True, width=100),
    )


def _about(result: Mapping[str, Any], source: str) -> Iterator[str]:
    if "parameters" in result:
        yield f"{result['parameters']:,} parameters."
    yield f"Begun from `{source}`, and made" if source else "Made"


def _data(config: Mapping[str, Any]) -> Iterator[str]:
    """A line for each source of each stage of the run."""
    for stage in config.get("stages", ()):
        data = config.get(stage, {}).get("data") or {}
        for source in data.get("sources", ()):
            yield f"- {stage}: `{source['path']}`"


def _figures(result: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The numbers of a result, nested ones with dotted names."""
    for name, value in result.items():
        if isinstance(value, Mapping):
            yield from _figures(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            yield prefix + name, f"{value:.4g}"
        elif isinstance(value, int) and not isinstance(value, bool):
            yield prefix + name, f"{value:,}"
