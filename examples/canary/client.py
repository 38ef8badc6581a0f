"""Gives the new version more and more of the requests, and prints how each of the two does.

    python examples/canary/client.py            # serves the app itself, on Ray
    python examples/canary/client.py --local    # in this process

Users keep their version while the weights stand; it is chosen by the shard key.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from typing import Any

from app import Prediction, app, load_scans

import serveit


async def predict_all(client: serveit.Client, scans: Any) -> list[Prediction]:
    """What is said to the users' scans; each has one."""
    predict = client.get_handle("predict")
    calls = (predict.options(shard_key=f"user {n}").call(scan.tolist()) for n, scan in enumerate(scans))
    predictions: list[Prediction] = await asyncio.gather(*calls)
    return predictions


async def main(*, local: bool) -> None:
    _, scans, _, digits = load_scans()
    async with serveit.serve(app, local=local, http={"location": None}) as client:
        for share in (0.0, 0.1, 0.5, 1.0):
            await client.set_traffic("predict", {"v1": 1.0 - share, "v2": share})
            predictions = await predict_all(client, scans)
            asked, right = Counter[str](), Counter[str]()
            for prediction, digit in zip(predictions, digits, strict=True):
                asked[prediction["version"]] += 1
                right[prediction["version"]] += prediction["digit"] == digit
            said = [f"{name} {right[name]:3} of {asked[name]:3} right" for name in sorted(asked)]
            print(f"{share:4.0%} to v2:  {',  '.join(said)}")


if __name__ == "__main__":
    asyncio.run(main(local="--local" in sys.argv))
