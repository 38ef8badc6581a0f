"""The same calls to the model without batches and with them, 64 in flight: how many a second.

    python examples/batching/client.py            # serves the app itself, on Ray
    python examples/batching/client.py --local    # in this process

Both share this machine with the client: the figures compare the two, they are no benchmark.
"""

from __future__ import annotations

import asyncio
import sys
import time

from app import app, load_patients

import serveit


async def ask(client: serveit.Client, backend: str, patients: list[list[float]]) -> list[float]:
    begun = time.perf_counter()
    predicted = [value async for value in client.get_handle(backend).map(patients, max_in_flight=64)]
    print(f"{backend:<8} {len(patients) / (time.perf_counter() - begun):6,.0f}/s")
    return predicted


async def main(*, local: bool) -> None:
    patients = load_patients()[1].tolist()
    async with serveit.serve(app, local=local, http={"location": None}) as client:
        single = await ask(client, "Single", patients)
        batched = await ask(client, "Batched", patients)
    same = sum(abs(one - other) < 1e-9 for one, other in zip(single, batched, strict=True))
    print(f"the same prediction for {same} of {len(patients)}")


if __name__ == "__main__":
    asyncio.run(main(local="--local" in sys.argv))
