"""A candidate gets copies of what the model in use is asked: `serveit run examples/shadow/app.py`."""

from __future__ import annotations

from typing import Any

import msgspec
from sklearn.datasets import load_wine
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import train_test_split
from sklearn.tree import DecisionTreeClassifier

from serveit import App

app = App()


def load_wines() -> Any:
    """Analyses of real wines to learn from and others to be tested with, then who grew them."""
    analyses, growers = load_wine(return_X_y=True)
    return train_test_split(analyses, growers, test_size=0.5, random_state=7, stratify=growers)


class Sample(msgspec.Struct):
    """A wine: its number and the 13 figures of its analysis."""

    number: int
    analysis: list[float]


@app.backend
class InUse:
    """The model whose answers count."""

    def __init__(self) -> None:
        analyses, _, growers, _ = load_wines()
        self._model = DecisionTreeClassifier(max_depth=2, random_state=7).fit(analyses, growers)

    def __call__(self, sample: Sample) -> int:
        return int(self._model.predict([sample.analysis])[0])


# A copy that finds no free slot is left out, so that it can never be in anybody's way: there are many.
@app.backend(max_ongoing_requests=100)
class Candidate:
    """Another model. Nobody waits for its answers, so it notes them down."""

    def __init__(self) -> None:
        analyses, _, growers, _ = load_wines()
        self._model = RandomForestClassifier(20, random_state=7).fit(analyses, growers)
        self._said: dict[int, int] = {}

    def __call__(self, sample: Sample) -> int:
        grower = self._said[sample.number] = int(self._model.predict([sample.analysis])[0])
        return grower

    def said(self) -> dict[int, int]:
        """What it would have answered, by the samples' numbers."""
        return self._said


app.add_route("/grower", InUse, shadow={"Candidate": 1.0}, methods=["POST"], name="grower")
app.add_route("/said", Candidate.said)
