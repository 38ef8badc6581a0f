"""Two versions of a model behind one path, by weight: `serveit run examples/canary/app.py`."""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

import msgspec
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from serveit import App

Scan = Annotated[list[float], msgspec.Meta(min_length=64, max_length=64)]

MODELS: dict[str, Any] = {
    "logistic regression": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
    "support vectors": SVC(gamma=0.001),
}

app = App()


def load_scans() -> Any:
    """Real scans to learn from and others to be tested with, then the digits of both."""
    scans, digits = load_digits(return_X_y=True)
    return train_test_split(scans, digits, test_size=0.4, random_state=7, stratify=digits)


class Prediction(TypedDict):
    """The digit, and which version says so."""

    digit: int
    version: str


@app.backend(name="v1", init_args=("v1", "logistic regression"))
class Digits:
    """Tells handwritten digits, by the model that it is given."""

    def __init__(self, version: str, model: str) -> None:
        scans, _, digits, _ = load_scans()
        self._version = version
        self._model = MODELS[model].fit(scans, digits)

    def __call__(self, scan: Scan) -> Prediction:
        return Prediction(digit=int(self._model.predict([scan])[0]), version=self._version)


app.backend(Digits, name="v2", init_args=("v2", "support vectors"))
app.add_route("/predict", traffic={"v1": 1.0, "v2": 0.0}, methods=["POST"], name="predict")
