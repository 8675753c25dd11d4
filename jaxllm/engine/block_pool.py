"""Which blocks of the cache are free, and which hold the beginning of a prompt that others may share.

A block that rows no longer use is kept while nobody needs its room, if it holds a whole block of a prompt: the next
prompt that begins with the same tokens finds it. What was used longest ago goes first.
"""

import collections
import hashlib
import heapq
from collections.abc import Sequence

import numpy as np


def prefix_names(prompt: Sequence[int], size: int) -> list[bytes]:
    """A name for each beginning of a prompt that is a whole number of blocks and leaves out its last token.

    Prompts with the same name have the same tokens: the names are digests of 128 bits.
    """
    names = []
    name = b""
    for end in range(size, len(prompt), size):
        tokens = np.asarray(prompt[end - size : end], np.int32).tobytes()
        name = hashlib.blake2b(name + tokens, digest_size=16).digest()
        names.append(name)
    return names


class BlockPool:
    """The blocks of one shard of the cache, numbered from 0."""

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        # The lowest number first, so that the blocks in use lie together.
        self._free = list(range(num_blocks))
        self._users: dict[int, int] = {}
        # Kept prefixes: their blocks, the last used one at the end.
        self._unused: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._prefix_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._promised = 0

    @property
    def num_available(self) -> int:
        """Blocks that are neither in use nor promised."""
        return len(self._free) + len(self._unused) - self._promised

    @property
    def num_used(self) -> int:
        """Blocks that rows use."""
        return len(self._users)

    @property
    def end(self) -> int:
        """The number after that of the last block that rows use."""
        return max(self._users, default=-1) + 1

    def forget_from(self, first: int) -> None:
        """Forgets the prefixes in blocks from this number on, which no row uses."""
        for block in [block for block in self._unused if block >= first]:
            del self._unused[block]
            del self._block_of[self._prefix_of.pop(block)]
            heapq.heappush(self._free, block)

    def promise(self, count: int) -> None:
        """Sets blocks aside for a row that will take them later, one by one."""
        if count > self.num_available:
            raise ValueError(f"{count} blocks promised, and {self.num_available} are available")
        self._promised += count

    def release_promise(self, count: int) -> None:
        """Gives back what was promised and not taken."""
        self._promised -= count

    def take(self) -> int:
        """A block of those that were promised to a row."""
        self._promised -= 1
        block = heapq.heappop(self._free) if self._free else self._forget_oldest()
        self._users[block] = 1
        return block

    def share(self, block: int) -> None:
        """Another row uses a block."""
        self._unused.pop(block, None)
        self._users[block] = self._users.get(block, 0) + 1

    def leave(self, block: int) -> None:
        """A row no longer uses a block."""
        self._users[block] -= 1
        if self._users[block]:
            return
        del self._users[block]
        if block in self._prefix_of:
            self._unused[block] = None
        else:
            heapq.heappush(self._free, block)

    def keep(self, prefix: bytes, block: int) -> None:
        """Remembers that a block holds the last tokens of a prefix with this name."""
        if prefix not in self._block_of:
            self._block_of[prefix] = block
            self._prefix_of[block] = prefix

    def find(self, prefixes: Sequence[bytes]) -> list[int]:
        """The blocks of a prompt's longest known beginning; prefixes: from `prefix_names`."""
        found = []
        for prefix in prefixes:
            if prefix not in self._block_of:
                break
            found.append(self._block_of[prefix])
        return found

    def num_unused(self, blocks: Sequence[int]) -> int:
        """How many of these blocks no row uses: sharing them takes them from what is available."""
        return sum(block in self._unused for block in blocks)

    def forget(self) -> None:
        """Forgets all prefixes, as when the weights have changed."""
        for block in self._unused:
            heapq.heappush(self._free, block)
        self._unused.clear()
        self._prefix_of.clear()
        self._block_of.clear()

    def _forget_oldest(self) -> int:
        block, _ = self._unused.popitem(last=False)
        del self._block_of[self._prefix_of.pop(block)]
        return block
