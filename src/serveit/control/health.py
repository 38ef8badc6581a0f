"""Looks after replicas that serve: asks each again and again how it is, until it is not well or gone.

What the controller finds out here outlives no controller, and need not: the next one asks the same. A
replica that answers tells what its own `Checkup` has found (`running/health`), and whether its event loop
is blocked; one that does not answer at all is only noticed here.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from serveit.control.orders import Health
from serveit.control.processes import ProcessDied, ended, pause

if TYPE_CHECKING:
    from serveit.control.orders import Leaving, Started, StartFailed
    from serveit.control.replicas import Replica
    from serveit.types import Clock

LATE_S = 1.0
"""What an answer may take on its way. Twice: where this process itself had no turn for a long time, the
answers of that time are there, and only have to be read."""


async def last_of(replica: Replica, clock: Clock) -> Health | str:
    """Wait until a replica that serves is not well, or gone: then how that came.

    While it drains nobody asks: only its end is waited for.
    """
    assert replica.process is not None, "it has started"
    death = asyncio.ensure_future(replica.process.death())
    illness = asyncio.ensure_future(_falls_ill(replica, clock))
    try:
        await asyncio.wait((death, illness), return_when=asyncio.FIRST_COMPLETED)
        if not death.done() and (health := illness.result()) is not None:
            return health
        return await death
    finally:
        death.cancel()
        illness.cancel()


async def told(replica: Replica, clock: Clock) -> Started | StartFailed | Leaving:
    """What a replica that an earlier controller has started says of that start.

    Raises:
        ProcessDied: it is gone, or hangs and will say nothing any more.
    """
    assert replica.process is not None, "it was found"
    saying = asyncio.ensure_future(replica.process.start())
    illness = asyncio.ensure_future(_falls_ill(replica, clock))
    try:
        await asyncio.wait((saying, illness), return_when=asyncio.FIRST_COMPLETED)
        if not saying.done() and (health := illness.result()) is not None:
            raise ProcessDied(health.illness)
        return await saying
    finally:
        saying.cancel()
        illness.cancel()


async def _falls_ill(replica: Replica, clock: Clock) -> Health | None:
    """Ask until it is not well; None once it is being ended."""
    process = replica.process
    assert process is not None, "it has started"
    while True:
        options = replica.version.spec.backend(replica.backend).config  # they may change while it runs
        await pause(clock, options.health_check_period_s)
        if replica.ending is not None:
            return None
        timeout_s = options.health_check_timeout_s
        asking = asyncio.ensure_future(process.health(timeout_s))
        try:
            for patience_s in (timeout_s + LATE_S, LATE_S):
                if await ended(clock, asking, patience_s):
                    break
            else:
                return Health(f"it has not answered for {timeout_s:g} s", hangs=True)
            if (health := asking.result()).illness:
                return health
        finally:
            asking.cancel()
