"""Asks the model in use, then looks at what the candidate made of the copies.

    python examples/shadow/client.py            # serves the app itself, on Ray
    python examples/shadow/client.py --local    # in this process

Whoever asks gets the answers of the model in use only.
"""

from __future__ import annotations

import asyncio
import sys

from app import Sample, app, load_wines

import serveit


async def main(*, local: bool) -> None:
    _, analyses, _, growers = load_wines()
    samples = [Sample(number, analysis.tolist()) for number, analysis in enumerate(analyses)]
    async with serveit.serve(app, local=local, http={"location": None}) as client:
        in_use = [grower async for grower in client.get_handle("grower").map(samples, max_in_flight=8)]
        candidate: dict[int, int] = {}
        async with asyncio.timeout(10):  # copies may come in after the answers
            while len(candidate) < len(samples):
                candidate = await client.get_handle("Candidate").said.call()
    print(f"asked {len(samples)}, copied {len(candidate)}")
    print(f"in use     {sum(in_use[n] == grower for n, grower in enumerate(growers))} right")
    print(f"candidate  {sum(candidate[n] == grower for n, grower in enumerate(growers))} right")
    print(f"the same   {sum(in_use[n] == candidate[n] for n in candidate)}")


if __name__ == "__main__":
    asyncio.run(main(local="--local" in sys.argv))
