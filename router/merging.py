"""Several answers of one request as one stream, each chunk with the index of its choice. Knows nothing of models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from replicas.types import Chunk
from router.failover import close

IndexedChunk = tuple[int, Chunk]

MAX_WAITING_CHUNKS = 2
"""Per sibling, between its replica and a slow client: beyond that the replica's stream is not read on."""


async def merged(streams: Sequence[AsyncIterator[Chunk]]) -> AsyncIterator[IndexedChunk]:
    """Chunks in the order they arrive; within one choice in the order of its stream.

    The first stream that fails fails the whole. Closing this iterator closes every stream.
    """
    if len(streams) == 1:  # the common case needs neither a task nor a queue
        try:
            async for chunk in streams[0]:
                yield 0, chunk
        finally:
            await close(streams[0])
        return
    queue: asyncio.Queue[IndexedChunk | BaseException | None] = asyncio.Queue(MAX_WAITING_CHUNKS * len(streams))
    pumps = [asyncio.create_task(_pump(index, stream, queue)) for index, stream in enumerate(streams)]
    num_open = len(pumps)
    try:
        while num_open:
            item = await queue.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(
    index: int, stream: AsyncIterator[Chunk], queue: asyncio.Queue[IndexedChunk | BaseException | None]
) -> None:
    try:
        async for chunk in stream:
            await queue.put((index, chunk))
        await queue.put(None)
    except Exception as error:
        await queue.put(error)
    finally:
        await close(stream)
