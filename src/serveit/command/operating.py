"""What the commands do that ask a running instance, each as one coroutine; `ask` runs them from a command.

They stand on `cluster/instance` and on `AppClient`, as programs do that call `serveit.connect()`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, TypeVar

from serveit.client import AppClient
from serveit.command.reporting import Route, routes_of
from serveit.config import did_you_mean
from serveit.control.orders import BackendChange

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    from serveit.cluster.instance import Instance
    from serveit.config import HTTPOptions
    from serveit.control.orders import Deploying
    from serveit.control.spec import AppSpec
    from serveit.declare.app import App

T = TypeVar("T")

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells count it."""


def ask(what: Callable[[Instance], Awaitable[T]], address: str, *, on_interrupt: str = "") -> T:
    """Ask the instance at an address.

    Args:
        what: to ask; given the instance.
        address: of its cluster, or "auto".
        on_interrupt: what Ctrl-C leaves behind, to be said then.

    Raises:
        ConnectionError: there is no such cluster.
        NotServing: no instance runs there.
        Exception: whatever `what` raises.
    """
    return _run(lambda: _asked(what, address), on_interrupt)


def deploy(app: App, address: str, **options: Any) -> tuple[AppSpec, str | None]:
    """As `deployed`, from a command."""
    left = "the deploy may go on without this command: `serveit status` shows how it ends"
    return _run(lambda: deployed(app, address, **options), left)


async def _asked(what: Callable[[Instance], Awaitable[T]], address: str) -> T:
    from serveit.cluster.instance import open_instance

    async with open_instance(address) as instance:
        return await what(instance)


async def deployed(
    app: App,
    address: str,
    *,
    name: str,
    prefix: str | None,
    timeout_s: float,
    http: HTTPOptions | None,
    on_progress: Callable[[Deploying], None],
) -> tuple[AppSpec, str | None]:
    """Deploy an app that stays until it is deleted; starts an instance where there is none.

    Args:
        app: what to serve.
        address: of the cluster.
        name: of the app.
        prefix: in front of all its paths; None for that of the app that it updates.
        timeout_s: how long replicas may wait for resources.
        http: of the instance's HTTP servers; None to take them as they are, or the defaults.
        on_progress: told how far it is.

    Returns:
        The app as it is to be, and where the instance answers HTTP.
    """
    import msgspec

    from serveit.cluster.instance import make_spec, open_instance

    async with open_instance(address, http=http, start=True) as instance:
        if prefix is None:
            prefix = _prefix_of((await instance.specs()).get(name))
        spec = await make_spec(app, name=name, prefix=prefix, deploy_timeout_s=timeout_s)
        has_routes = http is None or http.serves
        if not has_routes:
            spec = msgspec.structs.replace(spec, routes=())
        await instance.deploy(spec, on_progress)
        return spec, await instance.url() if has_routes else None


def _prefix_of(spec: AppSpec | None) -> str:
    return spec.routes[0].prefix if spec is not None and spec.routes else ""


# -- what is asked -------------------------------------------------------------------------------


async def status(instance: Instance, name: str | None = None) -> dict[str, Any]:
    """All of it, or what concerns one app. KeyError, with the nearest, if that does not run."""
    told = await instance.status()
    if name is not None:
        known = told.get("apps", {})
        if name not in known:
            with contextlib.suppress(KeyError):  # its first deploy may have failed
                known = {name: await instance.app(name).status()}
        _check_known(name, known)
        told = {**told, "apps": {name: known[name]}}
    return told


async def routes(instance: Instance) -> list[Route]:
    """Of all apps."""
    return routes_of((await instance.specs()).values())


async def scale(
    instance: Instance, app: str, numbers: Mapping[str, int], timeout_s: float | None = None
) -> dict[str, int]:
    """Change numbers of replicas, one backend after the other; a mistake in any changes none.

    Args:
        instance: that runs it.
        app: its app.
        numbers: by backend.
        timeout_s: how long new replicas may wait for their places.
    """
    spec = await _spec(instance, app)
    for backend, number in numbers.items():
        spec.changed(backend, BackendChange({"num_replicas": number}))
    client = AppClient(instance.app(app))
    for backend, number in numbers.items():
        await client.update(backend, num_replicas=number, deploy_timeout_s=timeout_s)
    return {b.name: b.num_replicas for b in (await instance.specs())[app].backends}


async def traffic(
    instance: Instance, app: str, endpoint: str, weights: Mapping[str, float], shadows: Mapping[str, float]
) -> Route:
    """Change where an endpoint leads, in one step.

    Args:
        instance: that runs it.
        app: its app.
        endpoint: its name, or its path.
        weights: all of them; empty to leave them.
        shadows: those that change.
    """
    specs = await instance.specs()
    _check_known(app, specs)
    spec = specs[app]
    name = _endpoint(spec, endpoint, specs)
    changed = spec.rerouted(name, weights or None, shadows)  # raises before anything is changed
    await instance.app(app).reroute(name, weights or None, shadows)
    found = changed.endpoint(name)
    alone = Route("", (), app, name, found.weights, found.shadows)
    return next((route for route in routes_of([changed]) if route.endpoint == name), alone)


async def delete(instance: Instance, name: str) -> None:
    """End an app. KeyError, with the nearest, if it does not run."""
    _check_known(name, await instance.specs())
    await instance.app(name).delete()


async def names(instance: Instance) -> list[str]:
    """Of all apps."""
    return sorted(await instance.specs())


async def shutdown(instance: Instance) -> None:
    """End all of them, and the instance."""
    await instance.shutdown()


async def _spec(instance: Instance, app: str) -> AppSpec:
    specs = await instance.specs()
    _check_known(app, specs)
    return specs[app]


def _check_known(name: str, known: Mapping[str, Any]) -> None:
    if name not in known:
        raise KeyError(f"no app {name!r} runs: {did_you_mean(name, list(known))}")


def _endpoint(spec: AppSpec, name: str, others: Mapping[str, AppSpec]) -> str:
    """An endpoint goes by its route's name; its path says it as well, with the prefix or without."""
    ends = [endpoint.name for endpoint in spec.endpoints]
    if name in ends:
        return name
    found = [r.endpoint for r in spec.routes if name in (r.prefix + r.pattern, r.pattern)]
    if len(found) > 1:
        raise KeyError(
            f"{name!r} of app {spec.name!r} is several endpoints, by method: say "
            f"{' or '.join(map(repr, found))}"
        )
    if found:
        return found[0]
    known = list(dict.fromkeys([*ends, *(route.prefix + route.pattern for route in spec.routes)]))
    owners = [route.app for route in routes_of(others.values()) if route.path == name]
    way_out = f"it is of --app {owners[0]}" if owners else did_you_mean(name, known)
    raise KeyError(f"app {spec.name!r} has no endpoint {name!r}: {way_out}")


# -- running them --------------------------------------------------------------------------------


def _run(make: Callable[[], Awaitable[T]], on_interrupt: str) -> T:
    async def run() -> T:
        return await make()

    # Ray is told when it is imported whether replicas' output is shown here; and what is shown nevertheless
    # is no part of the answer.
    os.environ.setdefault("RAY_LOG_TO_DRIVER", "0")
    with _interruptible(on_interrupt), contextlib.redirect_stdout(sys.stderr):
        return asyncio.run(run())


@contextlib.contextmanager
def _interruptible(left: str) -> Iterator[None]:
    """Ctrl-C ends the process at once, also in the middle of what Ray does: there is nothing to undo here."""

    def leave(*_: Any) -> None:
        os.write(2, f"\ninterrupted{': ' if left else ''}{left}\n".encode())
        os._exit(INTERRUPTED)

    previous = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
