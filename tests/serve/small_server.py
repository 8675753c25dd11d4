"""A server of two small untrained models, in this process."""

import contextlib
import dataclasses
import threading

import jax

from jaxllm.engine.config import EngineConfig
from jaxllm.engine.engine import Engine
from jaxllm.models import transformer
from jaxllm.models.config import ModelConfig
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.serve.app import make_app
from jaxllm.serve.driver import Driver
from jaxllm.serve.endpoint import Endpoint
from jaxllm.serve.metrics import Metrics
from jaxllm.serve.ratings import Ratings
from jaxllm.serve.served import Served
from jaxllm.tokenizers.trained import train
from jaxllm.web.guard import Rules
from jaxllm.web.server import address_of, bind, serve

TEXTS = [
    "the soup is good and the waiter was kind 汤很好喝，服务员很热情。\n",
    "one two three four\n",
]
LENGTH = 128


def make_tokenizer():
    return train(
        iter(TEXTS * 20),
        vocab_size=330,
        model_type="bpe",
        character_coverage=1.0,
        num_threads=1,
    )


def make_served(name="small", number=0, seed=0, tokenizer=None, slots=8, cache_gib=0.0):
    tokenizer = tokenizer or make_tokenizer()
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, max_length=LENGTH, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2,
        mlp_dim=48, dtype="float32", init_std=0.2,
    )  # fmt: skip
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    params = transformer.init(config, jax.random.key(seed))
    settings = EngineConfig(slots=slots, block=16, steps=4, cache_gib=cache_gib)
    engine = Engine(params, config, mesh, settings=settings, any_rules=True)
    return Served(name, number, config, tokenizer, engine, 1_000_000), params


@dataclasses.dataclass
class Running:
    """What a test needs of a server."""

    address: str
    served: list[Served]
    params: list
    endpoint: Endpoint


@contextlib.contextmanager
def running(
    rules=None,
    *,
    max_waiting=64,
    seconds=600.0,
    ratings=None,
    runs=None,
    slots=8,
    prepare=False,
    tokenizers=None,
):
    """A server on a free port, until the block is left.

    prepare: whether all programs are compiled first, as by the command, and not those alone that a test needs.
    """
    tokenizer = make_tokenizer()
    made = [
        make_served(name, number, number, tokenizer, slots)
        for number, name in enumerate(("small", "other"))
    ]
    served = [each for each, _ in made]
    for each in served if prepare else ():
        each.engine.prepare()
    driver = Driver([each.engine for each in served], max_waiting)
    endpoint = Endpoint(served, driver, Metrics(), seconds, tokenizers)
    kept = Ratings(ratings) if ratings else None
    app = make_app(endpoint, rules or Rules("127.0.0.1"), runs or {}, kept)
    bound = bind("127.0.0.1", 0)
    address = address_of(bound)
    done = threading.Event()
    # Uvicorn takes signals in the main thread alone.
    thread = threading.Thread(target=lambda: serve(app, bound, is_done=done.is_set))
    thread.start()
    try:
        yield Running(address, served, [params for _, params in made], endpoint)
    finally:
        done.set()
        thread.join()
