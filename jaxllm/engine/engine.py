"""Continuous batching: requests are admitted as others end, prompts are prefilled between decoding steps.

    engine = Engine(params, config, mesh, longest=512)
    with jax.set_mesh(mesh):
        for ticket, response in engine.run(requests): ...

or, where requests come and go, `submit`, `cancel` and `step`. A response depends on its request alone.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.config import InputError
from jaxllm.engine import inputs, programs, prompt_scores
from jaxllm.engine.config import EngineConfig
from jaxllm.engine.geometry import Level, geometry_for, unstacking
from jaxllm.engine.request import Draw, End, Event, Request
from jaxllm.engine.row_sampling import Asked, Drawn, draw_of
from jaxllm.engine.scheduler import Prefill, Row, Scheduler
from jaxllm.models.config import ModelConfig
from jaxllm.runtime.transfer import fetch, place
from jaxllm.sharding import activation, replicated

MOST_ALTERNATIVES = 20
"""Of a token, in an engine for any rules."""

# Steps that the pool stays larger than it must be: others may come.
_PATIENCE = 4


class Response(NamedTuple):
    """All of a response."""

    draws: tuple[Draw, ...]
    """Its tokens, the stop token included."""
    end: End


class Engine:
    """Rows in progress, and their cache. Use it under `jax.set_mesh(mesh)`; all processes of the mesh take the same steps."""

    def __init__(
        self,
        params: Any,
        config: ModelConfig,
        mesh: jax.sharding.Mesh,
        *,
        longest: int = 0,
        settings: EngineConfig | None = None,
        any_rules: bool = False,
    ):
        """The engine without requests.

        Args:
          params: of the decoder; None: `set_params` comes later.
          config: of the decoder.
          mesh: that rows, heads and weights are sharded over.
          longest: most tokens of a prompt with its response; 0: the model's context.
          settings: how much is decoded together.
          any_rules: requests have all kinds of rules, and nobody should wait for a compiler: programs are few and decide
            on the device what the rows need; `prepare` compiles all of them.

        Raises:
          InputError: the memory for the cache does not hold one row of this length.
        """
        self.mesh = mesh
        self._geometry = geometry = geometry_for(
            config, mesh, settings or EngineConfig(), longest, few=any_rules
        )
        self._scheduler = Scheduler(
            geometry.num_shards,
            geometry.settings.slots,
            geometry.num_blocks,
            geometry.settings.block,
            geometry.settings.prefill_blocks,
        )
        self._any_rules = any_rules
        self._rows: dict[int, Row] = {}
        self._tickets = itertools.count()
        self._params: Any = None
        self._cache: Any = None
        self._pool = 0  # blocks of a shard that the cache has room for
        self._too_large = 0  # steps since the pool could be smaller
        if params is not None:
            self.set_params(params)

    def set_params(self, params: Any) -> None:
        """Takes new weights and forgets what is cached of prompts; there must be no unfinished request."""
        with jax.set_mesh(self.mesh):
            self._params = unstacking(self._geometry.config, self.mesh)(params)
            if self._cache is None:
                self._pool = self._geometry.level_for(Level(0, 0, 0)).blocks
                self._cache = self._geometry.empty_cache(self._pool)
        self.forget_prompts()

    def rest(self) -> None:
        """Frees weights and cache until the next `set_params`."""
        self._params = self._cache = None

    def forget_prompts(self) -> None:
        """Forgets what is kept of prompts whose requests have ended."""
        for pool in self._scheduler.pools:
            pool.forget()

    # --- Requests.

    def submit(self, request: Request) -> int:
        """Queues a request; returns the ticket that its events carry.

        Raises:
          InputError: the prompt is empty, or too long with its response.
        """
        if not request.prompt:
            raise InputError("prompt: has no tokens; begin it with the tokenizer's start_id")
        if self._any_rules and request.num_alternatives > MOST_ALTERNATIVES:
            raise InputError(f"logprobs: at most {MOST_ALTERNATIVES} alternatives")
        length = len(request.prompt) + request.sampling.max_new_tokens
        if length > self._geometry.longest:
            raise InputError(
                f"prompt: {len(request.prompt)} tokens and max_new_tokens "
                f"{request.sampling.max_new_tokens} do not fit the context of "
                f"{self._geometry.longest}; shorten the prompt or lower max_new_tokens"
            )
        ticket = next(self._tickets)
        self._rows[ticket] = self._scheduler.submit(ticket, request)
        return ticket

    def cancel(self, ticket: int) -> None:
        """Ends a request; does nothing if it has ended."""
        row = self._rows.pop(ticket, None)
        if row is not None:
            self._scheduler.remove(row)

    @property
    def num_unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self._rows)

    @property
    def num_slots(self) -> int:
        """Requests that can be decoded at the same time."""
        return len(self._scheduler.pools) * self._geometry.settings.slots

    @property
    def num_used_blocks(self) -> int:
        """Blocks of the cache that requests use."""
        return sum(pool.num_used for pool in self._scheduler.pools)

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, Response]]:
        """Yields (number of the request, its response) as they end; requests are submitted first."""
        number_of = {self.submit(request): i for i, request in enumerate(requests)}
        draws: dict[int, list[Draw]] = {ticket: [] for ticket in number_of}
        while self._rows:
            for event in self.step():
                draws[event.ticket] += event.draws
                if event.end:
                    yield (
                        number_of[event.ticket],
                        Response(tuple(draws.pop(event.ticket)), event.end),
                    )

    def score(self, ids: Sequence[int], num_alternatives: int = 0) -> list[Draw]:
        """What the model says of every token but the first, given those before it, at temperature 1.

        Args:
          ids: tokens of a text, at least one.
          num_alternatives: how many of the likeliest tokens are reported for each.

        Raises:
          InputError: the text is longer than the context, of which the last token takes no room.
        """
        longest = self._geometry.config.max_length
        if not 0 < len(ids) <= longest + 1:
            raise InputError(
                f"prompt: {len(ids)} tokens, and the context holds 1 to {longest}; shorten it"
            )
        with jax.set_mesh(self.mesh):
            return prompt_scores.score(self._params, self._geometry, ids, num_alternatives)

    # --- Steps.

    def step(self, steps: int = 0) -> list[Event]:
        """Prefills what has been admitted, then decodes; returns what was drawn.

        steps: most tokens to decode, at most `settings.steps`; 0: that many.
        """
        if not any(self._scheduler.admitted()):
            self._too_large = _PATIENCE  # as if it had just been made: steps repeat exactly
        events = self._prefill()
        # Decoding a few rows costs almost as much as decoding all: the slots are filled first.
        while self._scheduler.has_room and (more := self._prefill()):
            events += more
        events += self._decode(
            min(steps or self._geometry.settings.steps, self._geometry.settings.steps)
        )
        return events

    def _prefill(self) -> list[Event]:
        plans = self._scheduler.plan_prefill()
        if not any(plan.chunks or plan.starts for plan in plans):
            return []
        starting = [[start.row for start in plan.starts] for plan in plans]
        level = self._level_for(starting, max(len(plan.chunks) for plan in plans))
        width = self._width_for([chunk.row for plan in plans for chunk in plan.chunks])
        drawn = self._run_prefill(plans, starting, level, width)
        copies = inputs.copies_of(plans, level.rows)
        if copies is not None:
            self._cache = programs.copy(self._cache, self._place(copies))
        drawn = jax.tree.map(lambda x: x[:, None], fetch(drawn))
        return self._events(starting, level.rows, drawn)

    def _run_prefill(
        self,
        plans: Sequence[Prefill],
        starting: Sequence[Sequence[Row]],
        level: Level,
        width: int,
    ) -> Drawn:
        block = self._geometry.settings.block
        chunks = inputs.chunks_of(plans, level.chunks, level.rows, block, width)
        # A row that starts has its last chunk here, or the prompt of a row that has: `width` holds its table.
        rows = self._rows_of(starting, level.rows, width)
        run = programs.compiled(programs.prefill, self._compiled_for(starting), self.mesh)
        drawn, self._cache = run(
            self._params,
            self._cache,
            self._place(chunks),
            self._place(rows),
            self._asked(starting),
        )
        return drawn

    def _decode(self, steps: int) -> list[Event]:
        if not self._scheduler.decoding:
            return []
        shards: list[list[Row]] = [[] for _ in self._scheduler.pools]
        for row in self._scheduler.decoding:
            shards[row.shard].append(row)
        left = (
            row.request.sampling.max_new_tokens - len(row.drawn) for row in self._scheduler.decoding
        )
        steps = min(steps, max(left))
        self._scheduler.extend(steps)
        level = self._level_for(shards)
        width = self._width_for(self._scheduler.decoding)
        drawn = fetch(self._run_decode(shards, level, width, steps))
        return self._events(shards, level.rows, jax.tree.map(lambda x: x[:, :steps], drawn))

    def _run_decode(
        self, shards: Sequence[Sequence[Row]], level: Level, width: int, steps: int
    ) -> Drawn:
        rows = self._rows_of(shards, level.rows, width)
        most_shared = level.rows * self._geometry.width if self._geometry.few else 0
        owners = inputs.owners_of(shards, level.rows, level.blocks, most_shared)
        run = programs.compiled(programs.decode_steps, self._compiled_for(shards), self.mesh)
        drawn, self._cache = run(
            self._params,
            self._cache,
            self._place(rows),
            self._place(owners),
            place(np.int32(steps), replicated(self.mesh)),
            self._asked(shards),
        )
        return drawn

    def prepare(self) -> None:
        """Compiles all programs of an engine for any rules. There must be no request."""
        levels = self._geometry.levels
        nobody: list[list[Row]] = [[] for _ in self._scheduler.pools]
        nothing = [Prefill() for _ in nobody]
        with jax.set_mesh(self.mesh):
            # The pool goes through all sizes, and from each to each.
            for level in [*levels, *levels[-2::-1], levels[-1], levels[0]]:
                self._resize(level.blocks)
                for width in self._geometry.widths:
                    self._run_prefill(nothing, nobody, level, width)
                    self._run_decode(nobody, level, width, steps=0)
                nowhere = np.full(level.rows * len(nobody), -1, np.int32)
                copies = programs.Copies(nowhere, nowhere)
                self._cache = programs.copy(self._cache, self._place(copies))

    def _level_for(self, shards: Sequence[Sequence[Row]], num_chunks: int = 0) -> Level:
        """What programs are compiled for, to serve these rows and chunks of a shard; the pool is made to fit."""
        num_blocks = max(pool.end for pool in self._scheduler.pools)
        needed = Level(max(map(len, shards)), num_chunks, num_blocks)
        self._fit_pool(self._geometry.level_for(needed).blocks)
        # The pool may have stayed larger.
        return self._geometry.level_for(needed._replace(blocks=self._pool))

    def _fit_pool(self, wanted: int) -> None:
        """Makes the pool as large as wanted, in blocks, and smaller only if it has been too large for a while."""
        self._too_large = self._too_large + 1 if wanted < self._pool else 0
        if wanted == self._pool or 0 < self._too_large < _PATIENCE:
            return
        for pool in self._scheduler.pools:
            pool.forget_from(wanted)
        self._resize(wanted)
        self._too_large = 0

    def _resize(self, num_blocks: int) -> None:
        if num_blocks != self._pool:
            self._cache = programs.resize(self._cache, num_blocks)
            self._pool = num_blocks

    def _rows_of(self, shards: Sequence[Sequence[Row]], size: int, width: int) -> programs.Rows:
        # With any rules, there is always room for the history of the longest row.
        longest = self._geometry.longest if self._any_rules else 0
        return inputs.rows_of(shards, size, width, self._geometry.config.vocab_size, longest)

    def _compiled_for(self, shards: Sequence[Sequence[Row]]) -> programs.Settings:
        """What a program is compiled for, to serve these rows."""
        requests = [row.request for rows in shards for row in rows]
        if self._any_rules:
            common, count = None, min(MOST_ALTERNATIVES, self._geometry.config.vocab_size)
        else:
            common = programs.common_rules([request.sampling for request in requests])
            count = max((request.num_alternatives for request in requests), default=0)
        steps = self._geometry.settings.steps
        return programs.Settings(self._geometry.config, common, count, steps)

    def _asked(self, shards: Sequence[Sequence[Row]]) -> Asked | None:
        """What any of these rows asks for, if it is no matter of the program."""
        if not self._any_rules:
            return None
        requests = [row.request for rows in shards for row in rows]
        rules = any(request.sampling.filters or request.sampling.penalizes for request in requests)
        alternatives = any(request.num_alternatives for request in requests)
        asked = Asked(np.bool_(rules), np.bool_(alternatives))
        return place(asked, replicated(self.mesh))

    def _width_for(self, rows: Sequence[Row]) -> int:
        """Blocks of a table that a program is compiled for."""
        return self._geometry.width_for(max((len(row.blocks) for row in rows), default=0))

    def _place(self, tree: Any) -> Any:
        """Arrays on the devices, their first dimension sharded like a batch."""
        return place(tree, activation(self.mesh, "batch"))

    def _events(self, shards: Sequence[Sequence[Row]], size: int, drawn: Drawn) -> list[Event]:
        """What was drawn for each row, up to its end; arrays of `drawn` are [all rows, steps, ...]."""
        events = []
        for shard, rows in enumerate(shards):
            for i, row in enumerate(rows):
                mine = jax.tree.map(lambda x, n=shard * size + i: x[n], drawn)
                events.append(self._advance(row, mine))
        return events

    def _advance(self, row: Row, drawn: Drawn) -> Event:
        """Adds what was drawn for a row, arrays [steps, ...], and takes it out if it has ended."""
        draws = []
        if row.drawn:
            # Every step but the first of all has written the token before.
            row.cached += len(drawn.token)
        for step in range(len(drawn.token)):
            draws.append(draw_of(drawn, step, row.request.num_alternatives))
            row.add(draws[-1].id)
            if row.end:
                self._scheduler.remove(row)
                del self._rows[row.ticket]
                break
        return Event(row.ticket, tuple(draws), row.end)
