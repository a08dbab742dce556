"""Responses that are kept for whoever goes on with them: in memory, up to a number of bytes."""

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Coroutine
from typing import Any

import msgspec

from quire.server.errors import ApiError

Key = tuple[str, str]  # a tenant, and the id of a response: nobody finds another's
Item = dict[str, Any]


class Store:
    """The one that nobody has asked for the longest goes first, unless it still runs. Threads may share it."""

    def __init__(self, most_bytes: int):
        """0 bytes: nothing is kept."""
        self.most_bytes, self.num_bytes = most_bytes, 0
        self._kept: OrderedDict[Key, bytes] = OrderedDict()  # as JSON, whose size is known
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._lock = threading.Lock()

    def keep(self, key: Key, items: list[Item], answer: dict[str, Any]) -> bool:
        """Keep a response, and the items that the model has read for it, in the place of what was there.

        False: there is no room, and nothing is there now.
        """
        kept = msgspec.json.encode((items, answer))
        with self._lock:
            self._forget(key)
            if len(kept) > self.most_bytes:
                return False
            while self.num_bytes + len(kept) > self.most_bytes:
                oldest = next((other for other in self._kept if other not in self._tasks), None)
                if oldest is None:
                    return False
                self._forget(oldest)
            self._kept[key] = kept
            self.num_bytes += len(kept)
        return True

    def find(self, key: Key, param: str = "response_id") -> tuple[list[Item], dict[str, Any]]:
        """The items and the response; `param` is what named it.

        Raises:
            ApiError: 404, there is none.
        """
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                items, answer = msgspec.json.decode(self._kept[key])
                return items, answer
        why = "it was not kept, or was deleted, or newer ones have its room (--response-store-bytes)"
        if not self.most_bytes:
            why = (
                "this server keeps none; start it with --response-store-bytes, or send the whole conversation"
            )
        code = "previous_response_not_found" if param == "previous_response_id" else "response_not_found"
        raise ApiError(404, f"there is no response {key[1][:200]!r}: {why}", param=param, code=code)

    def run(self, key: Key, work: Coroutine[Any, Any, None]) -> None:
        """Work at a response that nobody waits for; until its end it stays."""
        task = self._tasks[key] = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._tasks.pop(key, None))

    async def stop(self, key: Key) -> None:
        """Stop that work, if there is any."""
        if (task := self._tasks.get(key)) is not None:
            task.cancel()
            await asyncio.wait([task])

    def delete(self, key: Key) -> None:
        """Keep it no longer."""
        with self._lock:
            self._forget(key)

    def _forget(self, key: Key) -> None:
        self.num_bytes -= len(self._kept.pop(key, b""))
