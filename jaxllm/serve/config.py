"""Options of `jaxllm serve`."""

import dataclasses
from typing import Annotated

import tyro
from annotated_types import Ge, Le

from jaxllm.config.ranges import NOT_BOOL, NonNegativeFloat, PositiveInt, PositiveSeconds


@dataclasses.dataclass(frozen=True)
class ServeArgs:
    """Serve stages' models over HTTP in OpenAI's protocol, with pages to chat, compare, look at tokens and watch
    runs."""

    directories: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR")] = ()
    """Directories of stages, for example runs/quickstart/ppo, or of runs: then all of their models."""
    host: str = "127.0.0.1"
    """Address to listen on. For others than this machine, set JAXLLM_API_KEY to the key that clients must send."""
    port: Annotated[int, NOT_BOOL, Ge(0), Le(65535)] = 8000
    """Port to listen on; 0: a free one."""
    browser: bool = False
    """Open the pages in a browser."""
    allowed_hosts: tuple[str, ...] = ()
    """Further names that clients may use for this machine, in the Host header."""
    tokenizers: tuple[str, ...] = ()
    """Tokenizers that the tokens page compares with: folders of published models, or hf://ORG/NAME, such as
    hf://openai-community/gpt2."""
    slots: PositiveInt = 64
    """Responses of each model that are decoded at the same time."""
    cache_gib: NonNegativeFloat = 0.0
    """Memory for keys and values of each model, in GiB; 0: enough for 16 responses at full length."""
    tensor: PositiveInt = 1
    """Devices over which each model is split."""
    max_waiting: PositiveInt = 256
    """Responses that may wait for a slot; further requests are refused with status 429."""
    max_body_kib: PositiveInt = 1024
    """Largest request, in KiB."""
    timeout: PositiveSeconds = 600
    """Longest time for a response, in seconds."""
