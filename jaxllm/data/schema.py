"""The schema of records: what the messages, tools and rankings in them must look like.

Pydantic checks the types. What it finds, and the checks across fields, become one line: "file:line: field: what is
wrong; what is needed". Nulls are removed before (`records.present`), so an absent field is not in the mapping.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Required, TypedDict, get_args

import pydantic
from annotated_types import Ge, Le, MinLen

from jaxllm.config import InputError

Messages = list[dict[str, Any]]
Role = Literal["system", "user", "assistant", "tool"]
# Scores become float32, whose largest value is a little above this.
_LARGEST = 3.4e38
# strict: "1" is not a number and true is not 1. Fields that are not in a schema are left out.
_STRICT = pydantic.ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


@pydantic.with_config(_STRICT)
class Message(TypedDict, total=False):
    """A message of a conversation. Its chat template decides which fields a model is shown."""

    role: Required[Role]
    content: str
    reasoning_content: str
    # Functions and arguments, which chat templates read in different forms.
    tool_calls: list[dict[str, Any]]
    tool_call_id: str
    name: str


@pydantic.with_config(_STRICT)
class Ranking(TypedDict, total=False):
    """Responses to a prompt, and their ranks, scores or labels, one for each."""

    responses: Required[Annotated[list[str], MinLen(1)]]
    ranks: list[Annotated[int, Ge(1), Le(2**31 - 1)]]  # 1 is the best, equal ranks are a tie
    scores: list[Annotated[int | float, Ge(-_LARGEST), Le(_LARGEST)]]
    labels: list[bool]  # whether each is desirable by itself


_MESSAGES = pydantic.TypeAdapter(list[Message])
_TOOLS = pydantic.TypeAdapter(list[dict[str, Any]], config=_STRICT)
_RANKING = pydantic.TypeAdapter(Ranking)
_LABEL = pydantic.TypeAdapter(bool, config=pydantic.ConfigDict(strict=True))
_MESSAGE_NEEDS = f"a message needs a role ({', '.join(get_args(Role))}) and content (a string)"
_RANKING_NEEDS = (
    'a ranking needs "responses", a list of at least 2 strings, and for each of them one of "ranks" '
    '(integers, 1 is the best), "scores" (finite numbers) or "labels" (true or false; 1 response is enough)'
)


def check_messages(messages: Any, origin: str) -> Messages:
    """Returns messages with the fields of `Message` only, in its order.

    Raises:
        InputError: these are not messages, or the last one is an empty reply.
    """
    checked: Any = _checked(_MESSAGES, messages, origin, _MESSAGE_NEEDS, "messages")
    # A message that calls functions may say nothing.
    for number, message in enumerate(checked):
        calls = message["role"] == "assistant" and message.get("tool_calls")
        if "content" not in message and not calls:
            raise InputError(f"{origin}: messages.{number}: has no content; {_MESSAGE_NEEDS}")
    if checked and _is_empty_reply(checked[-1]):
        raise InputError(
            f"{origin}: the last reply is empty, so there is nothing to learn; remove the record"
        )
    return checked


def known_parts(messages: Sequence[Mapping[str, Any]]) -> Messages:
    """Checked messages with the fields of `Message` only, in its order."""
    known = []
    for message in messages:
        names = filter(message.__contains__, Message.__annotations__)
        known.append({name: message[name] for name in names})
    return known


def check_tools(tools: Any, origin: str) -> list[dict[str, Any]]:
    """Returns the descriptions of functions that may be called. Raises InputError if they are not objects."""
    return _checked(_TOOLS, tools, origin, "tools are a list of objects", "tools")


def check_ranking(fields: Mapping[str, Any], origin: str) -> Ranking:
    """Returns a record's ranking with all fields of `Ranking`: [] for scores and labels that it does not have.

    Ranks that are not given follow from scores, or else from labels.

    Raises:
        InputError: a field has the wrong type, or there is not one rank, score or label for each response.
    """
    ranking: Any = _checked(_RANKING, dict(fields), origin, _RANKING_NEEDS)
    responses = ranking["responses"]
    scores = ranking.get("scores", [])
    labels = ranking.get("labels", [])
    if len(responses) < 2 and not labels:
        raise InputError(f"{origin}: {len(responses)} response without a label; {_RANKING_NEEDS}")
    ranks = ranking.get("ranks") or _ranks_of(scores or labels)
    # Absent scores and labels are as good as one for each.
    given = {
        "scores": ranking.get("scores", responses),
        "labels": ranking.get("labels", responses),
        "ranks": ranks,
    }
    for name, values in given.items():
        if len(values) != len(responses):
            counts = f"{len(values)} {name} for {len(responses)} responses"
            raise InputError(f"{origin}: {counts}; {_RANKING_NEEDS}")
    return {"responses": responses, "ranks": ranks, "scores": scores, "labels": labels}


def check_label(label: Any, origin: str) -> bool:
    """Returns whether a single response is desirable. Raises InputError if the label is neither true nor false."""
    return _checked(_LABEL, label, origin, "a label is true (desirable) or false", "label")


def _checked(
    schema: pydantic.TypeAdapter, value: Any, origin: str, needs: str, field: str = ""
) -> Any:
    """Returns the value as the schema has it; field: the one that holds the value, "" for a whole record."""
    try:
        return schema.validate_python(value)
    except pydantic.ValidationError as error:
        # One is enough for a line; the next run finds the next.
        first = error.errors(include_url=False)[0]
    # Two steps into a value name the field. A third is the index of a call, or an alternative of a type.
    path = ".".join(str(step) for step in (field, *first["loc"][:2]) if step != "")
    if first["type"] == "missing":
        wrong = "is missing"
    else:
        wrong = first["msg"].replace("Input should", "must").replace("dictionary", "object")
        wrong += f", not {first['input']!r:.60}"
    raise InputError(f"{origin}: {path}: {wrong}; {needs}")


def _is_empty_reply(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and not (
        message.get("content") or message.get("tool_calls")
    )


def _ranks_of(scores: Sequence[float | bool]) -> list[int]:
    """1 + the number of better scores: equal scores are a tie."""
    # The index of the first equal score is the number of better ones.
    best_first = sorted(scores, reverse=True)
    return [1 + best_first.index(score) for score in scores]
