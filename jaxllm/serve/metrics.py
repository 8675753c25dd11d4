"""Counters of a server, in the text format that Prometheus reads."""

import collections
from collections.abc import Mapping

# Upper ends of the buckets, in seconds.
_SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class Metrics:
    """What has been served so far. All methods are called in the event loop."""

    def __init__(self) -> None:
        self._requests: collections.Counter[tuple[str, int]] = collections.Counter()
        self._prompt_tokens: collections.Counter[str] = collections.Counter()
        self._generated: collections.Counter[str] = collections.Counter()
        self._first: collections.Counter[tuple[str, float]] = collections.Counter()
        self._first_seconds: collections.Counter[str] = collections.Counter()
        self._first_count: collections.Counter[str] = collections.Counter()

    def request(self, path: str, status: int) -> None:
        """A request has been answered."""
        self._requests[path, status] += 1

    def prompt(self, model: str, num_tokens: int) -> None:
        """A prompt came."""
        self._prompt_tokens[model] += num_tokens

    def generated(self, model: str, num_tokens: int) -> None:
        """Tokens were drawn."""
        self._generated[model] += num_tokens

    def first_token(self, model: str, seconds: float) -> None:
        """A request has got its first token after so many seconds."""
        self._first_seconds[model] += seconds  # pyright: ignore[reportArgumentType] - a sum
        self._first_count[model] += 1
        for end in _SECONDS:
            self._first[model, end] += seconds <= end

    def text(self, gauges: Mapping[str, Mapping[str, float]]) -> str:
        """All metrics; gauges: {name: {model: value now}}."""
        lines = ["# TYPE jaxllm_requests_total counter"]
        for (path, status), count in sorted(self._requests.items()):
            lines.append(f'jaxllm_requests_total{{path="{path}",status="{status}"}} {count}')
        lines += _by_model("jaxllm_prompt_tokens_total", "counter", self._prompt_tokens)
        lines += _by_model("jaxllm_generated_tokens_total", "counter", self._generated)
        for name, values in gauges.items():
            lines += _by_model(name, "gauge", values)
        return "\n".join([*lines, *self._histogram()]) + "\n"

    def _histogram(self) -> list[str]:
        name = "jaxllm_first_token_seconds"
        lines = [f"# TYPE {name} histogram"]
        for model, count in sorted(self._first_count.items()):
            label = _escaped(model)
            for end in _SECONDS:
                value = self._first[model, end]
                lines.append(f'{name}_bucket{{model="{label}",le="{end:g}"}} {value}')
            lines.append(f'{name}_bucket{{model="{label}",le="+Inf"}} {count}')
            lines.append(f'{name}_sum{{model="{label}"}} {self._first_seconds[model]:.6f}')
            lines.append(f'{name}_count{{model="{label}"}} {count}')
        return lines


def _by_model(name: str, kind: str, values: Mapping[str, float]) -> list[str]:
    lines = [f"# TYPE {name} {kind}"]
    for model, value in sorted(values.items()):
        lines.append(f'{name}{{model="{_escaped(model)}"}} {value}')
    return lines


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
