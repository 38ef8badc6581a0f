"""A backend asks two others at once and compares what they say: `serveit run examples/compose/app.py`."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, TypedDict

import msgspec
import numpy as np
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier

from serveit import App

Scan = Annotated[list[float], msgspec.Meta(min_length=64, max_length=64)]

app = App()


def load_scans() -> Any:
    """Real scans to learn from and others to be tested with, then the digits of both."""
    scans, digits = load_digits(return_X_y=True)
    return train_test_split(scans, digits, test_size=0.4, random_state=7, stratify=digits)


class Verdict(TypedDict):
    """What the two make of a scan together, whether they agree, and what each of them says."""

    digit: int
    agreed: bool
    opinions: dict[str, int]


@app.backend(max_batch_size=32)
class Neighbours:
    """The nearest scans decide. Many are looked up at once: a batch."""

    def __init__(self) -> None:
        scans, _, digits, _ = load_scans()
        self._model = KNeighborsClassifier(5).fit(scans, digits)

    def __call__(self, scans: list[Scan]) -> list[Any]:
        return list(self._model.predict_proba(scans))


@app.backend(num_replicas=2)
class Forest:
    """Thirty trees decide, on one scan at a time; so there are two of these."""

    def __init__(self) -> None:
        scans, _, digits, _ = load_scans()
        self._model = RandomForestClassifier(30, random_state=7).fit(scans, digits)

    def __call__(self, scan: Scan) -> np.ndarray[Any, Any]:
        return np.array(self._model.predict_proba([scan])[0])


@app.backend
class Vote:
    """Has no model, and asks those that have one."""

    async def __call__(self, scan: Scan) -> Verdict:
        said = await asyncio.gather(app.handle(Neighbours).call(scan), app.handle(Forest).call(scan))
        neighbours, forest = (int(probabilities.argmax()) for probabilities in said)
        both = int(np.sum(said, axis=0).argmax())
        opinions = {"neighbours": neighbours, "forest": forest}
        return Verdict(digit=both, agreed=neighbours == forest, opinions=opinions)

    async def disagreements(self, count: int = 100) -> dict[int, Verdict]:
        """Of the first scans of the test set those on which the two disagree."""
        verdicts = await asyncio.gather(*(self(scan.tolist()) for scan in load_scans()[1][:count]))
        return {index: verdict for index, verdict in enumerate(verdicts) if not verdict["agreed"]}

    async def second_opinion(self, scan: Scan) -> int:
        """What the neighbours say; where they are not sure of it, what the forest says."""
        probabilities = await app.handle(Neighbours).call(scan)
        if probabilities.max() < 0.8:
            probabilities = await app.handle(Forest).call(scan)
        return int(probabilities.argmax())


app.add_route("/vote", Vote, methods=["POST"])
app.add_route("/second-opinion", Vote.second_opinion, methods=["POST"])
app.add_route("/disagreements", Vote.disagreements)
