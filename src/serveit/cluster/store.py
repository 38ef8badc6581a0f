"""Where an instance's checkpoint is kept: in Ray's own key-value store, with what Ray knows of its actors.

It outlives the controller and its node; the head's GCS only where Ray itself has a store of its own
(`RAY_REDIS_ADDRESS`).
"""

from __future__ import annotations

import asyncio
from typing import Any

# Semi-private in Ray, and what its own libraries keep such things in. Here is the only place that uses it.
from ray.experimental import internal_kv

KEY = b"checkpoint"
SPACE = b"serveit"
SAVE_S = 15.0
"""What the store gets to answer; on a machine that is busy with other starts 5 s were too few."""


class RayStore:
    """One octet string."""

    async def save(self, octets: bytes) -> None:
        await _ask(internal_kv._internal_kv_put, KEY, octets, overwrite=True, namespace=SPACE)

    async def load(self) -> bytes | None:
        octets: bytes | None = await _ask(internal_kv._internal_kv_get, KEY, namespace=SPACE)
        return octets

    async def clear(self) -> None:
        await _ask(internal_kv._internal_kv_del, KEY, namespace=SPACE)


async def _ask(function: Any, *args: Any, **options: Any) -> Any:
    """In a thread: it blocks, for as long as Ray's GCS does not answer. Raises OSError."""
    try:
        return await asyncio.wait_for(asyncio.to_thread(function, *args, **options), SAVE_S)
    except TimeoutError:
        raise OSError(f"Ray's GCS has not answered for {SAVE_S:g} s: nothing can be changed now") from None
    except Exception as error:
        raise OSError(f"Ray's GCS cannot keep the instance's state: {error}") from error
