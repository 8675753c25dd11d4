"""Who is in the batch: which requests wait, whose prompts are prefilled, who decodes, and which blocks they have.

Nothing here knows of devices. The same requests in the same order lead to the same schedule, in every process.

A row is admitted when the blocks of its longest possible response are available. They are promised to it then, and taken
one by one as it grows; so no row ever waits in the middle, and those in use lie together.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence

from jaxllm.engine.block_pool import BlockPool, prefix_names
from jaxllm.engine.request import End, Request


@dataclasses.dataclass(eq=False)
class Row:
    """A request and how far it has come."""

    ticket: int
    request: Request
    prefixes: list[bytes]  # names of the beginnings of its prompt
    shard: int = -1
    blocks: list[int] = dataclasses.field(default_factory=list)  # its table
    promised: int = 0  # blocks that it may still take
    cached: int = 0  # tokens in its blocks
    drawn: list[int] = dataclasses.field(default_factory=list)
    end: End | None = None

    @property
    def prompt(self) -> Sequence[int]:
        return self.request.prompt

    @property
    def longest(self) -> int:
        """Tokens in the cache at the end: the last token of the longest response is not written."""
        return len(self.prompt) + self.request.sampling.max_new_tokens - 1

    def add(self, token: int) -> None:
        """Adds a token to the response, and sets `end` if that ends it."""
        self.drawn.append(token)
        if token in self.request.stop_ids:
            self.end = "stop"
        elif len(self.drawn) == self.request.sampling.max_new_tokens:
            self.end = "length"


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens of a prompt that are prefilled together; they fill a block, or the last one in part."""

    row: Row
    begin: int
    end: int


@dataclasses.dataclass(frozen=True)
class Start:
    """A row whose prompt is complete: it draws its first token from the last state of a chunk."""

    row: Row
    chunk: int  # index of the chunk among those of its shard
    copied: int = -1  # the block that its last one begins as a copy of; -1: none


@dataclasses.dataclass
class Prefill:
    """Chunks of a shard that are prefilled together, and the rows that start after them."""

    chunks: list[Chunk] = dataclasses.field(default_factory=list)
    starts: list[Start] = dataclasses.field(default_factory=list)


class Scheduler:
    """Rows of all shards."""

    def __init__(
        self, num_shards: int, slots: int, num_blocks: int, block: int, prefill_blocks: int
    ):
        """slots, num_blocks and prefill_blocks are those of a shard; block: positions of a block."""
        self.block = block
        self.slots = slots
        self.prefill_blocks = prefill_blocks
        self.pools = [BlockPool(num_blocks) for _ in range(num_shards)]
        self.waiting: collections.deque[Row] = collections.deque()
        self._filling: list[Row] = []
        # Rows that start when another one with the same prompt does.
        self._following: dict[Row, list[Row]] = {}
        self.decoding: list[Row] = []

    @property
    def has_room(self) -> bool:
        """Whether more than a quarter of the slots has no row that decodes, while others wait for one."""
        unfilled = len(self.pools) * self.slots - len(self.decoding)
        return bool(self.waiting or self._filling) and 4 * unfilled > len(self.pools) * self.slots

    def submit(self, ticket: int, request: Request) -> Row:
        """Puts a request at the end of the queue."""
        row = Row(ticket, request, prefix_names(request.prompt, self.block))
        self.waiting.append(row)
        return row

    def blocks_of(self, length: int) -> int:
        """Number of blocks for so many tokens."""
        return -(-length // self.block)

    # --- Prompts.

    def plan_prefill(self) -> list[Prefill]:
        """Admits rows, and says what to prefill in one call: one entry for each shard."""
        plans = [Prefill() for _ in self.pools]
        for row in list(self._filling):
            self._fill(row, plans[row.shard])
        while self.waiting and self._admit(self.waiting[0], plans):
            self.waiting.popleft()
        return plans

    def _admit(self, row: Row, plans: Sequence[Prefill]) -> bool:
        """Gives a row a slot and its blocks; False if it has to wait."""
        for shard in self._by_preference(row):
            if self._occupied(shard) == self.slots:
                continue
            leader = self._leader(row, shard, plans[shard])
            if leader is not None:
                if self._follow(row, leader, plans[shard]):
                    return True
            elif len(plans[shard].chunks) < self.prefill_blocks and self._reserve(row, shard):
                self._filling.append(row)
                self._fill(row, plans[shard])
                return True
        return False

    def _by_preference(self, row: Row) -> list[int]:
        """Shards: first those that know most of the prompt, then those with most room."""

        def preference(shard: int) -> tuple[int, int]:
            pool = self.pools[shard]
            return -len(pool.find(row.prefixes)), -pool.num_available

        return sorted(range(len(self.pools)), key=preference)

    def _occupied(self, shard: int) -> int:
        """Number of slots that have a row."""
        return sum(row.shard == shard for row in self.admitted())

    def _reserve(self, row: Row, shard: int) -> bool:
        """Shares the blocks that hold the beginning of a row's prompt, and promises it the others, if there are enough."""
        pool = self.pools[shard]
        found = pool.find(row.prefixes)
        private = self.blocks_of(row.longest) - len(found)
        if private + pool.num_unused(found) > pool.num_available:
            return False
        for block in found:
            pool.share(block)
        pool.promise(private)
        row.shard, row.promised = shard, private
        row.blocks, row.cached = found, len(found) * self.block
        return True

    def _fill(self, row: Row, plan: Prefill) -> None:
        """Adds chunks of a row's prompt to a plan, as many as it has room for."""
        length = len(row.prompt)
        while row.cached < length and len(plan.chunks) < self.prefill_blocks:
            end = min(row.cached + self.block, length)
            self._take(row)
            if end < length:
                self.pools[row.shard].keep(row.prefixes[end // self.block - 1], row.blocks[-1])
            plan.chunks.append(Chunk(row, row.cached, end))
            row.cached = end
        if row.cached == length:
            self._filling.remove(row)
            start = Start(row, chunk=len(plan.chunks) - 1)
            self._start(start, plan)
            for follower in self._following.pop(row, []):
                self._start(self._copy_of(start, follower), plan)

    def _start(self, start: Start, plan: Prefill) -> None:
        plan.starts.append(start)
        self.decoding.append(start.row)

    def _take(self, row: Row) -> None:
        row.blocks.append(self.pools[row.shard].take())
        row.promised -= 1

    # --- Several responses to the same prompt: the first one leads, and the others share what it has prefilled.

    def _leader(self, row: Row, shard: int, plan: Prefill) -> Row | None:
        """A row with the same prompt that is prefilled now, or has just been."""
        starting = [start.row for start in plan.starts]
        for other in (*self._filling, *starting):
            if other.shard == shard and other.request.prompt == row.request.prompt:
                return other
        return None

    def _follow(self, row: Row, leader: Row, plan: Prefill) -> bool:
        """Makes a row start when its leader does; False if there are not enough blocks."""
        pool = self.pools[leader.shard]
        private = self.blocks_of(row.longest) - len(row.prompt) // self.block
        if private > pool.num_available:
            return False
        pool.promise(private)
        row.shard, row.promised = leader.shard, private
        for start in plan.starts:
            if start.row is leader:
                self._start(self._copy_of(start, row), plan)
                return True
        self._following.setdefault(leader, []).append(row)
        return True

    def _copy_of(self, start: Start, row: Row) -> Start:
        """The start of another row with the same prompt.

        Whole blocks of the prompt are shared, and the last one is copied if the prompt does not fill it.
        """
        leader = start.row
        whole = len(row.prompt) // self.block
        row.blocks = leader.blocks[:whole]
        for block in row.blocks:
            self.pools[row.shard].share(block)
        row.cached = len(row.prompt)
        if row.cached % self.block == 0:
            return Start(row, start.chunk)
        self._take(row)
        return Start(row, start.chunk, copied=leader.blocks[whole])

    # --- Decoding and the end.

    def extend(self, steps: int) -> None:
        """Gives every row that decodes the blocks that it needs for so many steps."""
        for row in self.decoding:
            needed = self.blocks_of(min(row.cached + steps, row.longest))
            while len(row.blocks) < needed:
                self._take(row)

    def remove(self, row: Row) -> None:
        """Takes a row out, wherever it is."""
        if row.shard < 0:
            self.waiting.remove(row)
            return
        if row in self.decoding:
            self.decoding.remove(row)
        elif row in self._filling:
            self._filling.remove(row)
        for followers in self._following.values():
            if row in followers:
                followers.remove(row)
        self._release(row)
        # Whoever waited for this row's prompt has to be admitted anew.
        for follower in reversed(self._following.pop(row, [])):
            self._release(follower)
            self.waiting.appendleft(follower)

    def _release(self, row: Row) -> None:
        pool = self.pools[row.shard]
        pool.release_promise(row.promised)
        # The last one first: it is of no use without those before it, so it is forgotten before them.
        for block in reversed(row.blocks):
            pool.leave(block)
        row.shard, row.promised, row.blocks, row.cached = -1, 0, [], 0

    def admitted(self) -> Iterator[Row]:
        """All rows that have a slot."""
        yield from self._filling
        for followers in self._following.values():
            yield from followers
        yield from self.decoding
