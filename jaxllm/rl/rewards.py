"""Rewards that are functions: verifiable ones for arithmetic and format, patterns, length; and how they are summed.

A reward function is (prompt, response, answer) -> float, answer being the record's reply or its `answer` field; one
of two parameters, as annotators are, gets prompt and response. Fractions stay fractions.
"""

import ast
import dataclasses
import inspect
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import numpy as np

from jaxllm.config import InputError, require
from jaxllm.config.functions import FunctionName, resolve_function
from jaxllm.config.ranges import AnyFloat
from jaxllm.rl import numerals
from jaxllm.rl.score_functions import check_scores, score_all
from jaxllm.runtime.console import console

_OPERAND = numerals.UNSIGNED
_EXPRESSION = re.compile(rf"[-+(\s]*{_OPERAND}(?:[)\s]*[-+*/][-+(\s]*{_OPERAND})+[)\s]*")
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclasses.dataclass(frozen=True)
class RewardSource:
    """One term of a response's score."""

    source: FunctionName = "model"
    """model: the reward model's score; module:function of (prompt, response, answer); regex:PATTERN: 1 where the whole response matches; length: its tokens over max_new_tokens."""
    weight: AnyFloat = 1.0
    """The score is the sum of weight x term; negative for a penalty."""

    def __post_init__(self) -> None:
        kind, _, rest = self.source.partition(":")
        known = self.source in ("model", "length") or (kind and rest)
        require(bool(known), "source: give model, length, regex:PATTERN or module:function")

    @property
    def name(self) -> str:
        """How its mean is called in the metrics, where no other term is called so."""
        return self.source.rsplit(":", 1)[-1] if not self.source.startswith("regex:") else "regex"


def metric_names(sources: Sequence[RewardSource]) -> list[str]:
    """A name for each term's mean; terms that would share a name are numbered: regex, regex_2."""
    names: list[str] = []
    for source in sources:
        number, name = 1, source.name
        while name in names:
            number += 1
            name = f"{source.name}_{number}"
        names.append(name)
    return names


def check_answers(sources: Sequence[RewardSource], answers: Sequence[str], field: str) -> None:
    """Raise InputError where a term compares with an answer and a prompt has none: an empty response would be right."""
    missing = sum(not answer.strip() for answer in answers)
    given_answers = [source.source for source in sources if _takes_answer(source, field)]
    if missing == len(answers) and given_answers:
        console.print(
            f"note: no prompt has an answer; {given_answers[0]} gets an empty one", soft_wrap=True
        )
    needing = [source.source for source in sources if source.source in NEED_ANSWERS]
    if needing and missing:
        raise InputError(
            f"{field}: {needing[0]} compares with the right answer, and {missing} of {len(answers)} prompts have none; "
            'give each record an "answer" or a reply'
        )


def _takes_answer(source: RewardSource, field: str) -> bool:
    """Whether a term is a user's function of prompt, response and answer."""
    named = source.source not in ("model", "length") and not source.source.startswith(
        ("regex:", f"{__name__}:")
    )
    return named and len(inspect.signature(resolve_function(source.source, field)).parameters) == 3


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
        return lambda prompts, responses, _: np.array(
            [bool(compiled.fullmatch(r)) for r in responses], np.float64
        )
    function = resolve_function(source.source, field)
    count = len(inspect.signature(function).parameters)
    if count == 2:
        return lambda prompts, responses, _: score_all(function, prompts, responses)
    if count != 3:
        raise InputError(
            f"{field} {source.source!r}: takes {count} parameters; a reward takes prompt, response, answer"
        )

    def terms(
        prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str]
    ) -> np.ndarray:
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
    found, wanted = numerals.last(response), numerals.last(answer)
    return float(found is not None and wanted is not None and numerals.equal(found, wanted))


NEED_ANSWERS = tuple(f"{__name__}:{function.__name__}" for function in (exact_match, last_number))


def arithmetic(prompt: str, response: str, answer: str) -> float:
    """1 where the last number of the response is the value of the prompt's first expression in + - * / ( ).

    An expression has at least one operator between two numbers: in "Question 3: 4+5=" it is 4+5. The answer is computed
    here, so the data needs none; the reward is 0 where the prompt holds no expression that has a value.
    A value with endless decimals, such as that of 1/3, may be rounded: to 1e-6 of its size, and to 0.005 at most.
    """
    del answer
    expression, found = _EXPRESSION.search(numerals.plain(prompt)), numerals.last(response)
    if expression is None or found is None:
        return 0.0
    try:
        value = evaluate(expression[0])
    except (
        SyntaxError,
        ZeroDivisionError,
        RecursionError,
        MemoryError,
    ):  # the parser's limits are a kind of no value
        return 0.0
    return float(abs(found.value - value) <= _rounding(value))


def one_number(prompt: str, response: str, answer: str) -> float:
    """1 where the response is a number and nothing else: a reward for the format alone."""
    del prompt, answer
    return float(numerals.is_number(response))


def evaluate(expression: str) -> Fraction:
    """The exact value of an expression in + - * / ( ) and unsigned numbers of any size.

    Raises SyntaxError where it is not one, ZeroDivisionError, and RecursionError or MemoryError where it is too deep.
    """
    values: dict[str, Fraction] = {}

    def name(operand: re.Match[str]) -> str:
        values[new := f"n{len(values)}"] = numerals.value_of(operand[0])
        return new

    # Names stand for the numbers: Python would refuse leading zeros, and more than 4,300 digits.
    named = re.sub(_OPERAND, name, _balanced(expression.strip()))
    return _value(ast.parse(named, mode="eval").body, values)


def _balanced(expression: str) -> str:
    """Without the brackets at its ends that belong to the text around it."""
    surplus = expression.count("(") - expression.count(")")
    while surplus > 0 and expression.startswith("("):
        expression, surplus = expression[1:].lstrip(), surplus - 1
    while surplus < 0 and expression.endswith(")"):
        expression, surplus = expression[:-1].rstrip(), surplus + 1
    return expression


def _rounding(value: Fraction) -> Fraction:
    """How far from the value its decimals may be: 0 where it has a last decimal."""
    odd = value.denominator
    for prime in (2, 5):
        while odd % prime == 0:
            odd //= prime
    return Fraction(0) if odd == 1 else min(max(Fraction(1), abs(value)) / 10**6, Fraction(1, 200))


def _value(node: ast.expr, values: Mapping[str, Fraction]) -> Fraction:
    """The value of a parsed expression; calls, powers and other names are a SyntaxError, so nothing is executed."""
    if isinstance(node, ast.Name) and node.id in values:
        return values[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        operand = _value(node.operand, values)
        return -operand if isinstance(node.op, ast.USub) else operand
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, values), _value(node.right, values))
    raise SyntaxError(f"not arithmetic: {ast.dump(node)}")
