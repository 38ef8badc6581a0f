"""Handwritten digits: scikit-learn's real scans, a model fitted in the constructor, batches, and a page
on which one draws. Run it with `serveit run examples/digits/app.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from sklearn.datasets import load_digits
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from starlette.responses import FileResponse
from threadpoolctl import threadpool_limits

from serveit import App

PAGE = Path(__file__).with_name("page.html")
SEED = 7

Pixel = Annotated[float, msgspec.Meta(ge=0, le=16)]
Row = Annotated[list[Pixel], msgspec.Meta(min_length=8, max_length=8)]

app = App()


class Image(msgspec.Struct, frozen=True):
    """A scan as the data set has it: 8 rows of 8 blocks, each with its count of inked pixels, 0 to 16."""

    pixels: Annotated[list[Row], msgspec.Meta(min_length=8, max_length=8)]


class Prediction(msgspec.Struct, frozen=True):
    """What the model makes of an image; `batch_size` is how many images were looked at together."""

    digit: int
    confidence: float
    probabilities: list[float]
    batch_size: int


class Scan(msgspec.Struct, frozen=True):
    """A real scan of the test set, and the digit that it is."""

    image: Image
    digit: int


def load_scans() -> tuple[list[Scan], list[Scan]]:
    """Real scans to learn from, and others to be tested with; the same ones each time."""
    digits = load_digits()
    scans = [
        Scan(Image(pixels.tolist()), int(digit))
        for pixels, digit in zip(digits.images, digits.target, strict=True)
    ]
    train, test = train_test_split(scans, test_size=0.4, random_state=SEED, stratify=digits.target)
    return train, test


def as_rows(images: list[Image]) -> Any:
    """One row of 64 numbers per image, as the model wants them."""
    return np.array([image.pixels for image in images]).reshape(len(images), 64)


def with_neighbours(rows: Any) -> Any:
    """The images, then each of them half a block further left, then right: hands centre less well than
    the makers of the data set did."""
    images = rows.reshape(-1, 8, 8)
    blank = np.zeros_like(images[:, :, :1])
    left = np.concatenate([images[:, :, 1:], blank], axis=2)
    right = np.concatenate([blank, images[:, :, :-1]], axis=2)
    return np.concatenate([images, (images + left) / 2, (images + right) / 2]).reshape(-1, 64)


# Looking at 32 images costs the model two or three times what looking at one does: full batches make it
# fast. Whoever sends 64 at once fills one for each of two replicas. Over HTTP the last few may be a little
# late; 10 ms let a batch fill (a full one starts at once), also on a slow or busy machine, and nobody who
# draws a digit notices them.
@app.backend(num_replicas=2, max_batch_size=32, batch_wait_timeout_s=0.01)
class Digits:
    """The model. Each replica has one, fitted when it starts, in a process of its own."""

    def __init__(self) -> None:
        # A replica keeps one core busy: with matrices this small, more threads cost more than they give.
        threadpool_limits(limits=1, user_api="blas")
        train, self._test = load_scans()
        self._model = make_pipeline(
            Nystroem(gamma=0.0005, n_components=400, random_state=SEED),
            LogisticRegression(C=100, max_iter=500),
        )
        rows = as_rows([scan.image for scan in train])
        self._model.fit(with_neighbours(rows), np.tile([scan.digit for scan in train], 3))

    def __call__(self, images: list[Image]) -> list[Prediction]:
        return [
            Prediction(int(row.argmax()), float(row.max()), row.tolist(), len(images))
            for row in self._model.predict_proba(as_rows(images))
        ]

    def samples(self, start: int = 0, count: int = 10) -> list[Scan]:
        """Some scans that the model has not seen. Not a batch: only `__call__` is called with lists."""
        return self._test[start : start + count]


app.add_route("/predict", Digits, methods=["POST"])
app.add_route("/samples", Digits.samples)


@app.route("/")
async def page() -> FileResponse:
    return FileResponse(PAGE)
