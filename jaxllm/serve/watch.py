"""What the Watch page asks: the status, curves, responses and report of runs, read from their directories as they grow.

    GET /api/runs                                              the status of each run
    GET /api/runs/NAME/curves?stage=STAGE&since=BYTES&mark=M   what metrics.jsonl got since the last time
    GET /api/runs/NAME/samples?stage=STAGE                     the newest responses
    GET /api/runs/NAME/report                                  the report, as a page

Names of runs are keys of a mapping, and names of stages are rows of the table: no part of a request becomes a path.
"""

import json
import math
import os
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from jaxllm import stages
from jaxllm.config import InputError
from jaxllm.data.messages import prompt_text
from jaxllm.report.status import read_status
from jaxllm.runtime.files import read_json, read_jsonl_tail
from jaxllm.web.errors import ApiError

# (step, value); None where the value is not a finite number, which JSON cannot hold.
type Point = tuple[int, float | None]

MOST_POINTS = 2000
"""Points of a metric in one answer."""
# `_telling` keeps at most four points of a bucket.
_NUM_BUCKETS = MOST_POINTS // 4

MOST_RESPONSES = 20
"""Responses in one answer."""
# Of a file of responses: far more than the newest ones need.
_TAIL_BYTES = 2**19
# At least one line of metrics, with its time: no two files have the same one.
_MARK_BYTES = 2**12

# The report is one file, with its styles and images in it. Nothing in it may run.
_REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; sandbox"
)


def routes(runs: Mapping[str, str | os.PathLike[str]]) -> list[Route]:
    """The routes, for an application that answers an `ApiError` with its response.

    Args:
      runs: {name: run directory}, local folders. It may change while the server runs.
    """

    def folder_of(request: Request) -> Path:
        name = request.path_params["name"]
        if name not in runs:
            known = ", ".join(runs) or "none"
            raise ApiError(404, f"run {name!r:.80} is unknown; known: {known}", "name")
        return Path(runs[name])

    # Starlette runs functions that are not `async` in threads: reading a slow disk keeps nobody else waiting.
    def list_runs(_: Request) -> Response:
        return _answer({"runs": [_summary(name, Path(folder)) for name, folder in runs.items()]})

    def curves(request: Request) -> Response:
        return _answer(_curves(folder_of(request), request.query_params))

    def samples(request: Request) -> Response:
        return _answer(_samples(folder_of(request), request.query_params))

    def report(request: Request) -> Response:
        path = folder_of(request) / "report.html"
        if not path.is_file():
            raise ApiError(404, "this run has no report yet; its evaluate stage writes it")
        headers = {"Content-Security-Policy": _REPORT_POLICY, "Cache-Control": "no-cache"}
        return FileResponse(path, media_type="text/html", headers=headers)

    return [
        Route("/api/runs", list_runs),
        Route("/api/runs/{name:path}/curves", curves),
        Route("/api/runs/{name:path}/samples", samples),
        Route("/api/runs/{name:path}/report", report),
    ]


def _answer(content: Mapping[str, Any]) -> Response:
    # What a run wrote a second ago is old.
    return JSONResponse(content, headers={"Cache-Control": "no-store"})


def _stage_of(query: Mapping[str, str]) -> str:
    """The stage that is asked for; empty: none."""
    stage = query.get("stage", "")
    if stage and stage not in stages.names():
        known = ", ".join(stages.names())
        raise ApiError(404, f"stage {stage!r:.80} is unknown; known: {known}", "stage")
    return stage


def _finite(value: Any) -> Any:
    """The value with None for each number in it that is not finite."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parsed(line: bytes) -> dict[str, Any]:
    """The JSON object of a line; empty if a power cut has left something else there."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# --- Status.


def _summary(name: str, folder: Path) -> dict[str, Any]:
    """{"name", "report": whether it has one, ...} and the run's status, or one line that says why there is none."""
    common = {"name": name, "report": (folder / "report.html").is_file()}
    try:
        return {**_finite(read_status(folder)), **common}
    except InputError as error:
        return {**common, "error": str(error)}
    except OSError as error:
        # A checkpoint that is too old is removed at any time, for example while it is looked at.
        text = f"{error.filename}: cannot be read ({error.strerror}); it is tried again"
        return {**common, "error": text}


# --- Curves.


def _curves(folder: Path, query: Mapping[str, str]) -> dict[str, Any]:
    """The answer about curves; without a stage in the query that of the newest stage."""
    present = [name for name in stages.names() if (folder / name / "metrics.jsonl").is_file()]
    stage = _stage_of(query) or (present[-1] if present else "")
    since = query.get("since", "0")
    # isdecimal() is true of digits of other scripts, which int() reads as well.
    if not since.isdecimal() or len(since) > 18:
        raise ApiError(400, "since: must be the 'next' of an earlier answer, or 0", "since")
    # Without a stage this is a file that no run has.
    path = folder / stage / "metrics.jsonl"
    read = read_curves(path, int(since), query.get("mark"))
    return {"stages": present, "stage": stage or None, **read}


def read_curves(path: Path, since: int = 0, mark: str | None = None) -> dict[str, Any]:
    """The numbers in a metrics.jsonl from an offset on, up to its last complete line.

    A run that resumes rewrites the file. Where it is no longer the one that was read before, everything is read.

    Args:
      path: the file; one that does not exist is empty.
      since: bytes that were read before.
      mark: what the answer to that read had; None: only the length of the file tells whether it was rewritten.

    Returns:
      {"next": bytes read in all, "mark": text, "reset": whether everything was read again,
      "points": {metric: [(step, value), ...]}}, at most `MOST_POINTS` of each (`thinned`).
    """
    points: dict[str, list[Point]] = defaultdict(list)
    try:
        file = path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        return {"next": 0, "mark": "", "reset": since > 0, "points": {}}
    with file:
        start = since if _is_continued(file, since, mark) else 0
        end = file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):  # still being written
                break
            end += len(line)
            _add_points(points, _parsed(line))
        return {
            "next": end,
            "mark": _mark(file, end),
            "reset": start < since,
            "points": {name: thinned(values) for name, values in points.items()},
        }


def _is_continued(file: BinaryIO, since: int, mark: str | None) -> bool:
    """Whether the first `since` bytes are those that were read before."""
    if os.fstat(file.fileno()).st_size < since:
        return False
    # It may have been rewritten and grown past the old length since.
    return mark is None or mark == _mark(file, since)


def _mark(file: BinaryIO, offset: int) -> str:
    """A digest of the bytes before an offset; empty at the beginning."""
    begin = max(0, offset - _MARK_BYTES)
    file.seek(begin)
    return f"{zlib.crc32(file.read(offset - begin)):08x}" if offset else ""


def _add_points(points: dict[str, list[Point]], line: Mapping[str, Any]) -> None:
    step = line.get("step")
    if type(step) is not int:
        return
    for name, value in line.items():
        # Not isinstance(value, int), which holds for a bool as well.
        if name not in ("step", "time") and type(value) in (int, float):
            points[name].append((step, _finite(value)))


def thinned(points: Sequence[Point]) -> Sequence[Point]:
    """At most `MOST_POINTS` of a metric's points, evenly over its steps.

    The steps are divided into buckets of one width. Of each bucket the lowest, the highest and the newest value are
    kept, and the first that is not a number: neither a spike, nor a gap, nor the newest value is ever left out.
    """
    if len(points) <= MOST_POINTS:
        return points
    first = min(step for step, _ in points)
    width = max(step for step, _ in points) - first + 1
    buckets: dict[int, list[Point]] = defaultdict(list)
    for point in points:
        buckets[(point[0] - first) * _NUM_BUCKETS // width].append(point)
    return [point for bucket in buckets.values() for point in _telling(bucket)]


def _telling(bucket: Sequence[Point]) -> Iterable[Point]:
    """The points of a bucket that are kept, in their order."""
    kept = {len(bucket) - 1}
    numbers = {i: value for i, (_, value) in enumerate(bucket) if value is not None}
    if numbers:
        kept |= {min(numbers, key=numbers.__getitem__), max(numbers, key=numbers.__getitem__)}
    if len(numbers) < len(bucket):
        kept.add(next(i for i in range(len(bucket)) if i not in numbers))
    return (bucket[i] for i in sorted(kept))


# --- Responses.


def _samples(folder: Path, query: Mapping[str, str]) -> dict[str, Any]:
    """The answer about responses; without a stage in the query those that were written last."""
    asked = _stage_of(query)
    found: dict[str, list[dict[str, Any]]] = {}
    written: dict[str, float] = {}
    for stage in stages.names():
        path, responses = _responses(folder / stage)
        if responses:
            found[stage] = responses
            written[stage] = path.stat().st_mtime
    stage = asked or max(written, key=written.__getitem__, default="")
    return {"stages": [*found], "stage": stage or None, "samples": found.get(stage, [])}


def _responses(directory: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The newest responses that a stage has kept, and the file that holds them.

    Each is {"step", "prompt", "response", "score", "model"}, where what does not apply is null.
    """
    for name, read in _RESPONSE_FILES.items():
        path = directory / name
        if path.is_file():
            return path, _finite(read(path)[:MOST_RESPONSES])
    return directory, []


def _rollouts(path: Path) -> list[dict[str, Any]]:
    """Of reinforcement learning: those of the newest update first."""
    lines = [
        line
        for line in read_jsonl_tail(path, _TAIL_BYTES)[-MOST_RESPONSES:]
        if {"step", "prompt", "response"} <= line.keys()
    ]
    lines.sort(key=lambda line: -line["step"])
    return [
        _response(line["prompt"], line["response"], line["step"], line.get("score"))
        for line in lines
    ]


def _sampled(path: Path) -> list[dict[str, Any]]:
    """Of the sample stage: all responses to the newest prompt first."""
    found = []
    for line in reversed(read_jsonl_tail(path, _TAIL_BYTES)[-MOST_RESPONSES:]):
        if {"messages", "responses"} <= line.keys():
            prompt = prompt_text(line["messages"])
            found += [_response(prompt, response) for response in line["responses"]]
    return found


def _side_by_side(path: Path) -> list[dict[str, Any]]:
    """Of the evaluation: the answers of all models to each prompt."""
    try:
        samples = (read_json(path) or {}).get("samples") or []
    except InputError as error:
        raise ApiError(500, str(error)) from None
    return [
        _response(sample["prompt"], answer, model=model)
        for sample in samples
        for model, answer in sample["answers"].items()
    ]


# Most stages have a result without responses; the files that have them come first.
_RESPONSE_FILES: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    "rollouts.jsonl": _rollouts,
    "samples.jsonl": _sampled,
    "result.json": _side_by_side,
}


def _response(
    prompt: str,
    response: str,
    step: int | None = None,
    score: float | None = None,
    model: str | None = None,
) -> dict[str, Any]:
    return {"step": step, "prompt": prompt, "response": response, "score": score, "model": model}
