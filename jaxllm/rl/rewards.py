"""Rewards that are functions: exact answers, arithmetic, format, patterns, length; and the terms that a score sums.

A reward function is (prompt, response, answer) -> float, where answer is the record's reply or its `answer` field. A
function of two parameters, as annotators are, gets prompt and response.
"""

import ast
import inspect
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import numpy as np

from jaxllm.config import InputError
from jaxllm.config.functions import resolve_function
from jaxllm.rl import numerals
from jaxllm.rl.reward_config import REGEX, STEPS, RewardSource
from jaxllm.rl.score_functions import check_scores, score_all
from jaxllm.runtime.console import console

# (prompts, steps of each response, answers) -> float64[its number of steps] of each response.
StepTerms = Callable[[Sequence[str], Sequence[list[str]], Sequence[str]], list[np.ndarray]]
# (prompts, responses, answers) -> float64[N], the terms of N responses.
Terms = Callable[[Sequence[str], Sequence[str], Sequence[str]], np.ndarray]

_OPERAND = numerals.UNSIGNED
# At least one operator between two numbers. Brackets need not match here: those at the ends may belong to the text.
_EXPRESSION = re.compile(rf"[-+(\s]*{_OPERAND}(?:[)\s]*[-+*/][-+(\s]*{_OPERAND})+[)\s]*")
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def metric_names(sources: Sequence[RewardSource]) -> list[str]:
    """A name for each term's mean; terms that would share a name are numbered: regex, regex_2."""
    names: list[str] = []
    for source in sources:
        number = 1
        name = source.name
        # Not a count of equal names: a function may be called "length_2".
        while name in names:
            number += 1
            name = f"{source.name}_{number}"
        names.append(name)
    return names


def check_answers(sources: Sequence[RewardSource], answers: Sequence[str], field: str) -> None:
    """Check that terms which compare with an answer have one for each prompt; field: the config's, for errors.

    A user's function of three parameters may do without; a note says that it gets no answers.

    Raises:
        InputError: a prompt has no answer. An empty response would be right.
    """
    missing = sum(not answer.strip() for answer in answers)
    # The usual case: functions are then not looked up here.
    if not missing:
        return
    for source in sources:
        if source.source in NEED_ANSWERS:
            lacking = f"{missing} of {len(answers)} prompts have none"
            raise InputError(
                f"{field}: {source.source} compares with the right answer, and {lacking}; "
                'give each record an "answer" or a reply'
            )
        if missing == len(answers) and _takes_answer(source, field):
            console.print(
                f"note: no prompt has an answer; {source.source} gets an empty one", soft_wrap=True
            )


def _takes_answer(source: RewardSource, field: str) -> bool:
    """Whether a term is a user's function of prompt, response and answer."""
    if source.source.startswith(STEPS):
        return True
    if not source.reads_text or source.source.startswith((REGEX, f"{__name__}:")):
        return False
    return _num_parameters(resolve_function(source.source, field)) == 3


def _num_parameters(function: Callable[..., float]) -> int:
    return len(inspect.signature(function).parameters)


def resolve(source: RewardSource, field: str) -> Terms:
    """(prompts, responses, answers) -> float64[N] for a source that looks at texts; field: the config's, for errors.

    Raises:
        InputError: the function does not exist or takes other parameters, or the pattern is not valid.
    """
    if source.source.startswith(REGEX):
        return _pattern_terms(source.source.removeprefix(REGEX), field)
    function = resolve_function(source.source, field)
    count = _num_parameters(function)
    if count == 2:
        return lambda prompts, responses, answers: score_all(function, prompts, responses)
    if count != 3:
        takes = f"takes {count} parameters; a reward takes prompt, response, answer"
        raise InputError(f"{field} {source.source!r}: {takes}")

    def terms(
        prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str]
    ) -> np.ndarray:
        rows = zip(prompts, responses, answers, strict=True)
        scores = [function(*row) for row in rows]
        return check_scores(scores, responses, f"{field} {source.source}")

    return terms


def resolve_steps(source: RewardSource, field: str) -> StepTerms:
    """(prompts, steps of each response, answers) -> a reward for each step, for a source `steps:module:function`.

    Raises:
        InputError: the function does not exist or takes other parameters.
    """
    function = resolve_function(source.source.removeprefix(STEPS), field)
    count = _num_parameters(function)
    if count != 3:
        takes = f"takes {count} parameters; a reward of steps takes prompt, steps, answer"
        raise InputError(f"{field} {source.source!r}: {takes}")

    def terms(
        prompts: Sequence[str], steps: Sequence[list[str]], answers: Sequence[str]
    ) -> list[np.ndarray]:
        rows = zip(prompts, steps, answers, strict=True)
        name = f"{field} {source.source}"
        return [check_scores(function(*row), row[1], name, "step") for row in rows]

    return terms


def _pattern_terms(pattern: str, field: str) -> Terms:
    """1 for each response that matches the pattern as a whole."""
    try:
        # A response may have several lines, which "." should match.
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        fault = f"not a regular expression ({error}); correct the pattern"
        raise InputError(f"{field} {pattern!r}: {fault}") from None

    def terms(
        prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str]
    ) -> np.ndarray:
        del prompts, answers
        matches = map(compiled.fullmatch, responses)
        return np.array([match is not None for match in matches], np.float64)

    return terms


def exact_match(prompt: str, response: str, answer: str) -> float:
    """1 if the response is the answer, outer spaces aside."""
    del prompt
    return float(response.strip() == answer.strip())


def last_number(prompt: str, response: str, answer: str) -> float:
    """1 if the last number of the response equals the last one of the answer, however both are written."""
    del prompt
    given = numerals.last(response)
    wanted = numerals.last(answer)
    return float(given is not None and wanted is not None and numerals.equal(given, wanted))


# Functions for which an empty answer would make an empty response right.
NEED_ANSWERS = (f"{__name__}:exact_match", f"{__name__}:last_number")


def arithmetic(prompt: str, response: str, answer: str) -> float:
    """1 if the last number of the response is the value of the prompt's first expression in + - * / ( ).

    An expression has at least one operator between two numbers: in "Question 3: 4+5=" it is 4+5. The answer is computed
    here, so the data needs none; the reward is 0 if the prompt holds no expression that has a value. A value with endless
    decimals, such as that of 1/3, may be rounded: to 1e-6 of its size, and to 0.005 at most.
    """
    del answer
    expression = _EXPRESSION.search(numerals.plain(prompt))
    given = numerals.last(response)
    if expression is None or given is None:
        return 0.0
    try:
        value = evaluate(expression[0])
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        # The last two are Python's limits on nested brackets: such an expression has no value here.
        return 0.0
    return float(abs(given.value - value) <= _rounding(value))


def one_number(prompt: str, response: str, answer: str) -> float:
    """1 if the response is a number and nothing else: a reward for the format alone."""
    del prompt, answer
    return float(numerals.is_number(response))


def evaluate(expression: str) -> Fraction:
    """The exact value of an expression in + - * / ( ) and unsigned numbers of any size.

    Raises:
        SyntaxError: it is not such an expression.
        ZeroDivisionError: it divides by zero.
        RecursionError, MemoryError: its brackets are nested too deeply.
    """
    values: dict[str, Fraction] = {}

    def name(operand: re.Match[str]) -> str:
        """A new name for a number, by which `values` has it."""
        new = f"n{len(values)}"
        values[new] = numerals.value_of(operand[0])
        return new

    # Python's parser would refuse leading zeros and more than 4,300 digits, so it gets names: 07+(1,000-5) is
    # parsed as n0+(n1-n2).
    named = re.sub(_OPERAND, name, _balanced(expression.strip()))
    return _value(ast.parse(named, mode="eval").body, values)


def _balanced(expression: str) -> str:
    """The expression without the brackets at its ends that belong to the text around it.

    "(What is 3+4)?" gives the expression "3+4)", and this "3+4".
    """
    surplus = expression.count("(") - expression.count(")")
    while surplus > 0 and expression.startswith("("):
        expression = expression[1:].lstrip()
        surplus -= 1
    while surplus < 0 and expression.endswith(")"):
        expression = expression[:-1].rstrip()
        surplus += 1
    return expression


def _rounding(value: Fraction) -> Fraction:
    """The largest accepted distance from the value: 0 if it has a last decimal."""
    # A fraction in lowest terms has a last decimal if its denominator has no prime factors but those of 10.
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest == 1:
        return Fraction(0)
    return min(max(Fraction(1), abs(value)) / 10**6, Fraction(1, 200))


def _value(node: ast.expr, values: Mapping[str, Fraction]) -> Fraction:
    """The value of a parsed expression. Nothing is executed: calls, powers and other names are a SyntaxError."""
    if isinstance(node, ast.Name) and node.id in values:
        return values[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        operand = _value(node.operand, values)
        return -operand if isinstance(node.op, ast.USub) else operand
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, values), _value(node.right, values))
    raise SyntaxError(f"not arithmetic: {ast.dump(node)}")
