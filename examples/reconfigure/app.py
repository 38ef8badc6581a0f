"""A threshold that is changed while the model serves: `serveit run examples/reconfigure/app.py`."""

from __future__ import annotations

import os
from typing import Annotated, Any, TypedDict

import msgspec
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from serveit import App

Tumour = Annotated[list[float], msgspec.Meta(min_length=30, max_length=30)]
MALIGNANT = 0

app = App()


def load_tumours() -> Any:
    """30 measurements each of real tumours to learn from and of others, then what both were."""
    tumours, kinds = load_breast_cancer(return_X_y=True)
    return train_test_split(tumours, kinds, test_size=0.5, random_state=7, stratify=kinds)


class Finding(TypedDict):
    """Whether a tumour is to be looked at, at which threshold, and the process that says so."""

    suspicious: bool
    threshold: float
    pid: int


@app.backend(num_replicas=2, user_config={"threshold": 0.5})
class Screening:
    """How likely is it that a tumour is malignant, and is that too likely?"""

    def __init__(self) -> None:
        tumours, _, kinds, _ = load_tumours()
        self._model = make_pipeline(StandardScaler(), LogisticRegression()).fit(tumours, kinds)

    def reconfigure(self, user_config: dict[str, float]) -> None:
        """Called when a replica starts and whenever `user_config` is changed; the model stays."""
        self._threshold = user_config["threshold"]

    def __call__(self, tumour: Tumour) -> Finding:
        probability = self._model.predict_proba([tumour])[0][MALIGNANT]
        suspicious = bool(probability >= self._threshold)
        return Finding(suspicious=suspicious, threshold=self._threshold, pid=os.getpid())


app.add_route("/screen", Screening, methods=["POST"])
