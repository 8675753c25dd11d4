"""Rewards that are functions: verifiable ones for arithmetic and format, patterns, length; and how they are summed.

A reward function is (prompt, response, answer) -> float, answer being the record's reply or its `answer` field; one
of two parameters, as annotators are, gets prompt and response. Fractions stay fractions.
"""

import ast
import dataclasses
import inspect
import operator
import re
from collections.abc import Callable, Sequence

import numpy as np

from jaxllm.annotators import check_scores, score_all
from jaxllm.config import InputError, resolve_function

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_EXPRESSION = re.compile(r"[-+*/().\d\s]*\d[-+*/().\d\s]*")
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


@dataclasses.dataclass(frozen=True)
class RewardSource:
    """One term of a response's score."""

    source: str = "model"
    """model: the reward model's score; module:function of (prompt, response, answer); regex:PATTERN: 1 where the whole response matches; length: its tokens over max_new_tokens."""
    weight: float = 1.0
    """The score is the sum of weight x term; negative for a penalty."""

    @property
    def name(self) -> str:
        """How its mean is called in the metrics."""
        return self.source.rsplit(":", 1)[-1] if not self.source.startswith("regex:") else "regex"


Terms = Callable[[Sequence[str], Sequence[str], Sequence[str]], np.ndarray]


def resolve(source: RewardSource, field: str) -> Terms:
    """(prompts, responses, answers) -> float64[N] for a source that looks at texts.

    Raises InputError where there is no such function, its parameters are others, or the pattern is not one.
    """
    if source.source.startswith("regex:"):
        pattern = source.source.removeprefix("regex:")
        try:
            compiled = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise InputError(f"{field} {pattern!r}: not a regular expression: {error}") from None
        return lambda prompts, responses, _: np.array([bool(compiled.fullmatch(r)) for r in responses], np.float64)
    function = resolve_function(source.source, field)
    count = len(inspect.signature(function).parameters)
    if count == 2:
        return lambda prompts, responses, _: score_all(function, prompts, responses)
    if count != 3:
        raise InputError(
            f"{field} {source.source!r}: takes {count} parameters; a reward takes prompt, response, answer"
        )

    def terms(prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        scores = [function(*row) for row in zip(prompts, responses, answers, strict=True)]
        return check_scores(scores, responses, f"{field} {source.source}")

    return terms


def exact_match(prompt: str, response: str, answer: str) -> float:
    """1 where the response is the answer, spaces around them aside."""
    del prompt
    return float(response.strip() == answer.strip())


def last_number(prompt: str, response: str, answer: str) -> float:
    """1 where the last number of the response equals the last one of the answer, however it is written."""
    del prompt
    found, wanted = _NUMBER.findall(response), _NUMBER.findall(answer)
    return float(bool(found) and bool(wanted) and float(found[-1]) == float(wanted[-1]))


def arithmetic(prompt: str, response: str, answer: str) -> float:
    """1 where the last number of the response is the value of the prompt's first expression in + - * / ( ).

    It computes the answer itself and needs none in the data; 0 where the prompt holds no expression that has a value.
    """
    del answer
    expression, found = _EXPRESSION.search(prompt), _NUMBER.findall(response)
    if expression is None or not found:
        return 0.0
    try:
        value = _value(ast.parse(expression[0].strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError):
        return 0.0
    return float(abs(float(found[-1]) - value) <= 1e-6 * max(1.0, abs(value)))


def one_number(prompt: str, response: str, answer: str) -> float:
    """1 where the response is a number and nothing else: a reward for the format alone."""
    del prompt, answer
    return float(_NUMBER.fullmatch(response.strip()) is not None)


def _value(node: ast.expr) -> float:
    """The value of a parsed expression; names, calls and powers are a SyntaxError, so nothing is executed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        return -_value(node.operand) if isinstance(node.op, ast.USub) else _value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise SyntaxError(f"not arithmetic: {ast.dump(node)}")
