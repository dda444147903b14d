"""Who holds which block of the paged KV cache. Ids only: the tensors live in the worker.

Blocks are of fixed size (PagedAttention, Kwon et al. 2023). A full block is found again by its parent and its tokens,
so that a later request with the same beginning shares it; the parent of a first block is the salt. A block that
nobody holds stays findable until its turn comes in the LRU free list. Knows no scheduling and no tensors.

    every block is in exactly one state:   held (ref > 0)   |   free: cached (has a key) or blank
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from replicas.engine.request import Request

BlockKey = tuple[int | str, bytes]
"""(identity of the parent, token ids of the block). The identity is a number that no other block ever had, or the
salt. The table compares whole keys, so an equal key means an equal prefix: hashes may collide, blocks cannot mix."""


@dataclass(slots=True)
class _Block:
    ref_count: int = 0
    key: BlockKey | None = None
    """Set while the block can be found."""
    identity: int = -1
    """Of the prefix that ends with this block; given when it becomes findable."""


class BlockManager:
    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
    ) -> None:
        assert num_blocks > 0, f"num_blocks must be positive, not {num_blocks}"
        assert block_size > 0, f"block_size must be positive, not {block_size}"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._enable_prefix_caching = enable_prefix_caching
        self._blocks = [_Block() for _ in range(num_blocks)]
        # Ids in the order in which they are handed out: blank ones first, then cached ones, least recently used first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._by_key: dict[BlockKey, int] = {}
        self._identities = itertools.count()

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out now, cached ones included."""
        return len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def num_shareable_blocks(self, num_tokens: int) -> int:
        """Blocks of a beginning that a request of `num_tokens` can find cached: one token is left to compute."""
        return (num_tokens - 1) // self.block_size if self._enable_prefix_caching else 0

    def match_prefix(self, request: Request) -> list[int]:
        """Cached blocks that begin the request, longest run; at least one token is left to compute. Changes nothing."""
        matched: list[int] = []
        parent: int | str = request.cache_salt
        for index in range(self.num_shareable_blocks(request.num_tokens)):
            block_id = self._by_key.get((parent, self._token_bytes(request, index)))
            if block_id is None:
                break
            matched.append(block_id)
            parent = self._blocks[block_id].identity
        return matched

    def can_admit(self, request: Request, prefix: list[int], num_reserved: int) -> bool:
        """Whether all the request's tokens would find a block beside `prefix`, `num_reserved` blocks staying free."""
        num_new = self.num_blocks_for(request.num_tokens) - len(prefix)
        num_revived = sum(self._blocks[block_id].ref_count == 0 for block_id in prefix)
        return num_new + num_revived + num_reserved <= len(self._free)

    def adopt_prefix(self, request: Request, prefix: list[int]) -> None:
        """Give the request the blocks of `match_prefix`, before anything else is allocated and could evict them."""
        assert len(request.block_table) == 0, f"{request.request_id} already holds blocks"
        for block_id in prefix:
            self._free.pop(block_id, None)
            self._blocks[block_id].ref_count += 1
            request.block_identities.append(self._blocks[block_id].identity)
        request.block_table.extend(prefix)
        request.num_computed_tokens = len(prefix) * self.block_size

    def allocate(self, request: Request, num_new_tokens: int) -> bool:
        """Blocks for the request's next tokens; False, with nothing changed, if there are too few."""
        num_needed = self.num_blocks_for(request.num_computed_tokens + num_new_tokens) - len(request.block_table)
        if num_needed > len(self._free):
            return False
        if num_needed > 0:
            request.block_table.extend([self._take() for _ in range(num_needed)])
        return True

    def publish(self, request: Request) -> None:
        """Make findable the blocks that the request has filled since it was here last.

        Only after the step that computed them: until then their K and V are not there."""
        if not self._enable_prefix_caching:
            return
        for index in range(len(request.block_identities), request.num_computed_tokens // self.block_size):
            parent = request.block_identities[-1] if index else request.cache_salt
            key = (parent, self._token_bytes(request, index))
            # A twin computed at the same time may be there already. It stays, ours goes with its request.
            block_id = self._by_key.setdefault(key, int(request.block_table.view[index]))
            block = self._blocks[block_id]
            if block.key is None:
                block.key, block.identity = key, next(self._identities)
            request.block_identities.append(block.identity)

    def free(self, request: Request) -> None:
        """Take back all blocks of a request. Its last block is the first to be evicted: it is the least shared."""
        for block_id in reversed(request.block_table.view.tolist()):
            block = self._blocks[block_id]
            block.ref_count -= 1
            assert block.ref_count >= 0, f"block {block_id} freed twice, last by {request.request_id}"
            if block.ref_count == 0:
                self._free[block_id] = None
                if block.key is None:
                    self._free.move_to_end(block_id, last=False)
        request.block_table.clear()
        request.block_identities.clear()

    def check_integrity(self, holders: Iterable[Request]) -> None:
        """AssertionError that says what is wrong, unless free + held = total, every reference is one of `holders`,
        and the table of keys and the blocks agree."""
        references: Counter[int] = Counter()
        for request in holders:
            table = request.block_table.view.tolist()
            assert len(set(table)) == len(table), f"{request.request_id} holds a block twice: {table}"
            num_blocks = self.num_blocks_for(request.num_computed_tokens)
            assert len(table) >= num_blocks, f"{request.request_id} has {len(table)} blocks, computed {num_blocks}"
            references.update(table)
        num_held = len(references)
        assert num_held + len(self._free) == self.num_blocks, (
            f"{len(self._free)} free + {num_held} held of {self.num_blocks} blocks"
        )
        for block_id, block in enumerate(self._blocks):
            assert block.ref_count == references[block_id], (
                f"block {block_id} counts {block.ref_count} holders, {references[block_id]} hold it"
            )
            assert (block_id in self._free) == (block.ref_count == 0), f"block {block_id} is both free and held"
            if block.key is not None:
                assert self._by_key.get(block.key) == block_id, f"cached block {block_id} cannot be found"
        num_cached = sum(block.key is not None for block in self._blocks)
        assert num_cached == len(self._by_key), f"{num_cached} cached blocks, {len(self._by_key)} keys"

    def _take(self) -> int:
        block_id, _ = self._free.popitem(last=False)
        block = self._blocks[block_id]
        if block.key is not None:
            del self._by_key[block.key]
            block.key = None
        block.ref_count = 1
        return block_id

    def _token_bytes(self, request: Request, index: int) -> bytes:
        return request.token_ids.view[index * self.block_size : (index + 1) * self.block_size].tobytes()
