"""Lowers the threshold twice, under requests: fewer tumours are missed, more are suspected for nothing.

    python examples/reconfigure/client.py            # serves the app itself, on Ray
    python examples/reconfigure/client.py --local    # in this process

Requests go on meanwhile; one that failed would end the program.
"""

from __future__ import annotations

import asyncio
import itertools
import sys

from app import MALIGNANT, app, load_tumours

import serveit


async def ask_on(client: serveit.Client, tumours: list[list[float]], pids: set[int]) -> None:
    """Two requests at a time, until it is cancelled. Notes which processes answer."""
    async for finding in client.get_handle("Screening").map(itertools.cycle(tumours), max_in_flight=2):
        pids.add(finding["pid"])


async def main(*, local: bool) -> None:
    _, tumours, _, kinds = load_tumours()
    pids = set[int]()
    async with (
        serveit.serve(app, local=local, http={"location": None}) as client,
        asyncio.TaskGroup() as group,
    ):
        asking = group.create_task(ask_on(client, tumours.tolist(), pids))
        screening = client.get_handle("Screening")
        for threshold in (0.5, 0.2, 0.05):
            await client.update("Screening", user_config={"threshold": threshold})
            findings = [finding async for finding in screening.map(tumours.tolist())]
            pids.update(finding["pid"] for finding in findings)
            pairs = [(f["suspicious"], kind == MALIGNANT) for f, kind in zip(findings, kinds, strict=True)]
            missed, for_nothing = pairs.count((False, True)), pairs.count((True, False))
            said = f"{missed} missed, {for_nothing} suspected for nothing"
            print(f"threshold {findings[0]['threshold']:<4}  {said}")
        asking.cancel()
    print("processes that answered:", len(pids))


if __name__ == "__main__":
    asyncio.run(main(local="--local" in sys.argv))
