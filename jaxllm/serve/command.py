"""`jaxllm serve`: loads the models, says where they are, and serves until a signal."""

import os
from pathlib import Path

from jaxllm.runtime.console import console
from jaxllm.serve.app import make_app
from jaxllm.serve.config import ServeArgs
from jaxllm.serve.driver import Driver
from jaxllm.serve.endpoint import Endpoint
from jaxllm.serve.metrics import Metrics
from jaxllm.serve.ratings import Ratings
from jaxllm.serve.served import Found, find, load, load_tokenizers
from jaxllm.web.guard import Rules
from jaxllm.web.server import address_of, bind, check_key, public_address, serve, with_key


def command(args: ServeArgs) -> None:
    """Serves until a signal.

    Raises:
      InputError: a directory has no model, or the address cannot be had.
    """
    found = find(args.directories)
    api_key = os.environ.get("JAXLLM_API_KEY", "")
    check_key(args.host, api_key)
    # Before the models are loaded, which may take minutes.
    with bind(args.host, args.port) as bound:
        tokenizers = load_tokenizers(args.tokenizers)
        served = load(args, found.stages)
        driver = Driver([each.engine for each in served], args.max_waiting)
        endpoint = Endpoint(served, driver, Metrics(), args.timeout, tokenizers)
        rules = Rules(args.host, api_key, args.allowed_hosts, args.max_body_kib * 1024)
        app = make_app(endpoint, rules, found.runs, _ratings(found))
        address = public_address(bound)
        page = with_key("/", api_key)
        names = ", ".join(found.stages) or "no model yet"
        console.print(f"serve: {names} at {address}/v1; pages at {address}{page}", soft_wrap=True)
        serve(app, bound, browse=f"{address_of(bound)}{page}" if args.browser else "")


def _ratings(found: Found) -> Ratings | None:
    """Where ratings are kept: in the run of the first model; None: it is not on this machine."""
    first = next(iter(found.stages.values()), "")
    if not first or "://" in first:
        return None
    return Ratings(Path(first).expanduser().resolve().parent / "ratings" / "rankings.jsonl")
