"""ObjectRefs and actor handles inside the arguments and results of calls, where plain pickle loses what
makes them work: a ref without its owner is never ready, and waiting for it has no end.

They are pickled as Ray does it outside of its own tasks. Ray then keeps what they stand for until the
process that sent them ends, since it cannot know when the receiver has them: fine for a model's weights,
too much for each of a stream of large results. Those go through `handle.remote`, or as values.
"""

from __future__ import annotations

from typing import Any

import ray
import ray.cloudpickle

from serveit.exceptions import EncodingError
from serveit.wire.pickles import register


def install() -> None:
    """From here on calls of this process carry them. Again is no harm."""
    register(ray.ObjectRef, reduce_owned)
    register(ray.actor.ActorHandle, reduce_owned)
    register(ray.ObjectRefGenerator, refuse_generator)


def reduce_owned(value: Any) -> tuple[Any, ...]:
    """With the owner's address, and kept alive here."""
    pickler: Any = ray.cloudpickle
    return pickler.loads, (pickler.dumps(value),)


def refuse_generator(value: Any) -> tuple[Any, ...]:
    raise EncodingError(
        "an ObjectRefGenerator belongs to the process that made it: send the ObjectRefs that it yields, "
        "or return it from a function that is called with `async for item in handle.stream(...)`"
    )
