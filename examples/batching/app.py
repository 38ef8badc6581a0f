"""One model, asked for one patient at a time and for many: `serveit run examples/batching/app.py`."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from sklearn.datasets import load_diabetes
from sklearn.ensemble import RandomForestRegressor
from sklearn.model_selection import train_test_split

from serveit import App

Patient = Annotated[list[float], msgspec.Meta(min_length=10, max_length=10)]

app = App()


def load_patients() -> Any:
    """Ten measurements each of real patients to learn from and of others, then how their diabetes went on."""
    patients, progress = load_diabetes(return_X_y=True, scaled=False)
    return train_test_split(patients, progress, test_size=0.5, random_state=7)


def fit() -> Any:
    patients, _, progress, _ = load_patients()
    return RandomForestRegressor(50, random_state=7).fit(patients, progress)


@app.backend
class Single:
    """Called with a patient."""

    def __init__(self) -> None:
        self._model = fit()

    def __call__(self, patient: Patient) -> float:
        return float(self._model.predict([patient])[0])


@app.backend(max_batch_size=32)
class Batched:
    """Called with those who wait by now, 32 at most: to go down the trees with all costs little more."""

    def __init__(self) -> None:
        self._model = fit()

    def __call__(self, patients: list[Patient]) -> list[float]:
        predicted: list[float] = self._model.predict(patients).tolist()
        return predicted


app.add_route("/single", Single, methods=["POST"])
app.add_route("/batched", Batched, methods=["POST"])
