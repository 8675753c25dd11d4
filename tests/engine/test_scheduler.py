"""Blocks and slots over thousands of requests: nothing leaks, nothing is used twice, nobody waits for ever."""

import collections

import numpy as np
import pytest

from jaxllm.engine.block_pool import BlockPool, prefix_names
from jaxllm.engine.config import SamplingConfig
from jaxllm.engine.request import Request
from jaxllm.engine.scheduler import Scheduler

BLOCK = 4


class Content:
    """What a device would have written: the tokens in every block, by simulating each chunk and step."""

    def __init__(self, num_shards):
        self.blocks = [collections.defaultdict(dict) for _ in range(num_shards)]

    def prefill(self, plans):
        for shard, plan in enumerate(plans):
            blocks = self.blocks[shard]
            for chunk in plan.chunks:
                # A chunk begins where a block does, and the row has all blocks before it.
                assert chunk.begin % BLOCK == 0
                self.write(chunk.row, chunk.begin, chunk.row.prompt[chunk.begin : chunk.end])
            for start in plan.starts:
                if start.copied >= 0:
                    blocks[start.row.blocks[-1]] = dict(blocks[start.copied])

    def write(self, row, begin, tokens):
        for position, token in enumerate(tokens, begin):
            block = row.blocks[position // BLOCK]
            self.blocks[row.shard][block][position % BLOCK] = token

    def check(self, row):
        """The row's blocks hold the row's tokens."""
        tokens = [*row.prompt, *row.drawn][: row.cached]
        for position, token in enumerate(tokens):
            block = row.blocks[position // BLOCK]
            assert self.blocks[row.shard][block][position % BLOCK] == token


def check_pools(scheduler):
    users = [collections.Counter() for _ in scheduler.pools]
    for row in scheduler.admitted():
        users[row.shard].update(row.blocks)
    for pool, used in zip(scheduler.pools, users, strict=True):
        assert pool._users == used
        assert len(pool._free) + len(pool._unused) + len(used) == pool.num_blocks
        assert pool.num_available >= 0
    promised = collections.Counter()
    for row in scheduler.admitted():
        promised[row.shard] += row.promised
    assert [pool._promised for pool in scheduler.pools] == [
        promised[i] for i in range(len(scheduler.pools))
    ]


def random_request(rng, stems):
    """A prompt that often begins like others, and is often the same."""
    stem = stems[rng.integers(len(stems))]
    prompt = [*stem[: rng.integers(1, len(stem) + 1)]]
    if rng.random() < 0.5:
        prompt += rng.integers(100, size=rng.integers(0, 9)).tolist()
    return Request(prompt, SamplingConfig(int(rng.integers(1, 20))), (0, 0), (7,))


@pytest.mark.parametrize("num_shards", [1, 3])
def test_ten_thousand_requests_leave_no_block_behind(num_shards):
    rng = np.random.default_rng(num_shards)
    stems = [rng.integers(8, 100, size=n).tolist() for n in (3, 8, 21, 33)]
    scheduler = Scheduler(num_shards, slots=5, num_blocks=40, block=BLOCK, prefill_blocks=4)
    content = Content(num_shards)
    submitted = ended = 0
    while ended < 10_000:
        while len(scheduler.waiting) < 6 and submitted < 10_000 and rng.random() < 0.7:
            scheduler.submit(submitted, random_request(rng, stems))
            submitted += 1
        if rng.random() < 0.05:
            rows = [*scheduler.admitted(), *scheduler.waiting]
            if rows:
                scheduler.remove(rows[rng.integers(len(rows))])
                ended += 1
        content.prefill(plans := scheduler.plan_prefill())
        for plan in plans:
            assert len(plan.chunks) <= 4
            for start in plan.starts:
                start.row.add(int(rng.integers(100)))
        steps = int(rng.integers(1, 5))
        going = [row for row in scheduler.decoding if not row.end]
        scheduler.extend(steps)
        for row in going:
            content.check(row)
            for _ in range(steps):
                if not row.end:
                    content.write(row, row.cached, row.drawn[-1:])
                    row.cached += 1
                    row.add(int(rng.integers(100)))
        for row in [row for row in scheduler.decoding if row.end]:
            scheduler.remove(row)
            ended += 1
        counts = collections.Counter(row.shard for row in scheduler.admitted())
        assert max(counts.values(), default=0) <= 5
        if ended % 50 == 0:
            check_pools(scheduler)
    check_pools(scheduler)
    assert all(pool.num_used == 0 == pool._promised for pool in scheduler.pools)


def test_samples_of_a_prompt_share_its_whole_blocks():
    scheduler = Scheduler(1, slots=8, num_blocks=60, block=BLOCK, prefill_blocks=8)
    request = Request([*range(10, 20)], SamplingConfig(8), (0, 0))
    for ticket in range(4):
        scheduler.submit(ticket, request)
    [plan] = scheduler.plan_prefill()
    # Ten tokens: two blocks that are shared, and one of each row's own.
    assert len(plan.chunks) == 3
    assert len(plan.starts) == 4
    rows = [start.row for start in plan.starts]
    assert {tuple(row.blocks[:2]) for row in rows} == {tuple(rows[0].blocks[:2])}
    assert len({row.blocks[2] for row in rows}) == 4
    assert [start.copied for start in plan.starts] == [-1, *[rows[0].blocks[2]] * 3]


def test_a_prefix_is_known_by_all_of_its_tokens():
    assert prefix_names([1, 2, 3, 4, 5, 6, 7, 8], 4) == prefix_names([1, 2, 3, 4, 9], 4)
    assert len(prefix_names(range(9), 4)) == 2
    # The same block after another one is another prefix.
    assert (
        prefix_names([1, 1, 1, 1, 5, 6, 7, 8, 9], 4)[1:]
        != (prefix_names([1, 1, 1, 2, 5, 6, 7, 8, 9], 4)[1:])
    )


def test_the_prefix_that_was_used_longest_ago_goes_first():
    pool = BlockPool(3)
    pool.promise(3)
    blocks = [pool.take() for _ in range(3)]
    for name, block in zip((b"a", b"b", b"c"), blocks, strict=True):
        pool.keep(name, block)
    for block in (blocks[1], blocks[0], blocks[2]):
        pool.leave(block)
    assert (pool.num_used, pool.num_available) == (0, 3)
    pool.share(pool.find([b"b"])[0])
    pool.leave(blocks[1])
    pool.promise(1)
    assert pool.take() == blocks[0]
    assert [pool.find([name]) for name in (b"a", b"b", b"c")] == [[], [blocks[1]], [blocks[2]]]


def test_no_more_is_promised_than_there_is():
    pool = BlockPool(2)
    pool.promise(2)
    with pytest.raises(ValueError, match="1 blocks promised, and 0 are available"):
        pool.promise(1)
