"""What user code can learn of where it runs, and how a `Backend` finds its handle.

Rooms below cannot import those above: whoever runs an app puts a resolver here, and what the user
wrote (`await double.call(2)`, `app.handle("double")`) asks it.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import msgspec

from serveit.exceptions import NotServing


class Context(msgspec.Struct, frozen=True):
    """Where the running user code stands.

    Attributes:
        app: name of the app.
        backend: name of the backend.
        replica: id of the replica.
        request_id: of the request; for a batch, of its first item. Empty while a replica starts.
        deadline: when the caller gives up, on the event loop's clock; None for never.
    """

    app: str
    backend: str
    replica: str
    request_id: str = ""
    deadline: float | None = None

    def of_request(self, request_id: str, deadline: float | None) -> Context:
        """The same place, for one request. Hot path: once per request."""
        return Context(self.app, self.backend, self.replica, request_id, deadline)


class Resolver(Protocol):
    """Who runs an app in this process or can reach it. An attribute `app` names it: the code of one
    app may call another's backends, and these are reached elsewhere."""

    def get_handle(self, name: str, *, sync: bool = False) -> Any:
        """A handle on a backend or endpoint of the app. KeyError for unknown names."""


_ids = itertools.count(1)
_id_prefix = secrets.token_hex(6)


def new_request_id() -> str:
    """A name for a request, unique over processes: a random prefix of this one's and a count."""
    return f"{_id_prefix}-{next(_ids):x}"


_current: ContextVar[Context | None] = ContextVar("serveit_context", default=None)
_resolver: ContextVar[Resolver | None] = ContextVar("serveit_resolver", default=None)
_serving: dict[int, list[Resolver]] = {}


def context() -> Context:
    """The context of the running request.

    Raises:
        NotServing: called outside a replica, or in a thread that was started without the context.
    """
    found = _current.get()
    if found is None:
        raise NotServing(
            "serveit.context() is for code that runs in a replica, and here none does; in a thread that you "
            "start there, run the function by contextvars.copy_context().run"
        )
    return found


def inherited_deadline() -> float | None:
    """The deadline of the request that this code runs for; None outside one."""
    found = _current.get()
    return found.deadline if found is not None else None


def is_nested() -> bool:
    """Whether the code that runs now is that of a request in a replica of this process."""
    found = _current.get()
    return found is not None and bool(found.request_id)


def enter(current: Context, resolver: Resolver | None) -> None:
    """Set what the running task (or copied context) sees from here on."""
    _current.set(current)
    _resolver.set(resolver)


@contextmanager
def serving(app: object, resolver: Resolver) -> Iterator[None]:
    """While inside, `app` is served by `resolver` for all code of this process."""
    resolvers = _serving.setdefault(id(app), [])
    resolvers.append(resolver)
    try:
        yield
    finally:
        resolvers.remove(resolver)
        if not resolvers:
            del _serving[id(app)]


def resolve(app: object, name: str, *, sync: bool = False) -> Any:
    """The handle on `name` of `app`: inside a replica its own instance's, else this process's newest.

    Raises:
        NotServing: nothing runs that serves the app.
        KeyError: it has no such backend or endpoint.
    """
    resolver = _resolver.get()
    if resolver is None or getattr(resolver, "app", app) is not app:
        resolvers = _serving.get(id(app))
        if not resolvers:
            raise NotServing(
                f"{name!r} is not being served: start the app with `serveit run module:app`, "
                "`async with serveit.serve(app)` or, in tests, `async with serveit.testing.local(app)`; "
                "what runs elsewhere is reached by `async with serveit.connect()`"
            )
        resolver = resolvers[-1]
    return resolver.get_handle(name, sync=sync)
