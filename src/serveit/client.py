"""What a program holds of a running app: the client that `serve` and `connect` give."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol, Unpack, overload

from serveit.config import BackendConfig, check_options, check_seconds
from serveit.control.orders import BackendChange
from serveit.control.spec import check_app_name
from serveit.declare.app import App
from serveit.declare.traffic import parse_traffic
from serveit.exceptions import NotServing
from serveit.wire.pickles import dump, load

if TYPE_CHECKING:
    import socket

    from anyio.from_thread import BlockingPortal

    from serveit.calling.handle import Handle
    from serveit.calling.sync import SyncHandle
    from serveit.control.spec import AppSpec
    from serveit.declare.decorators import BackendChanges


class AppControl(Protocol):
    """What can be asked of an app wherever it runs, and changed in it."""

    async def status(self) -> dict[str, Any]: ...

    async def spec(self) -> AppSpec: ...

    async def update(self, backend: str, wanted: BackendChange, *, wait: bool) -> None: ...

    async def reroute(
        self, endpoint: str, weights: Mapping[str, float] | None, shadows: Mapping[str, float]
    ) -> None: ...

    async def delete(self) -> None: ...


class Runtime(AppControl, Protocol):
    """What a client needs of whoever runs the app: one process (`local`), or a cluster."""

    async def start(self, sock: socket.socket | None = None) -> None: ...

    async def aclose(self) -> None: ...

    @property
    def url(self) -> str | None: ...

    def get_handle(self, name: str, *, sync: bool = False, missing_ok: bool = False) -> Any: ...

    async def deploy(
        self, app: App, *, name: str, prefix: str, wait: bool, deploy_timeout_s: float
    ) -> None: ...


class Ended:
    """In the place of what a client has left: whatever is asked of it, it says so. Where it was is a fact."""

    def __init__(self, what: str, url: str | None) -> None:
        self._what = what
        self.url = url

    def __getattr__(self, name: str) -> NoReturn:
        raise NotServing(
            f"this client has been shut down, with the {self._what}(...) that it came from: enter "
            f"serveit.{self._what}(...) again for another"
        )


class AppClient:
    """What is asked of a running app, and changed in it, without calling it."""

    def __init__(self, app: AppControl) -> None:
        self._app = app

    async def status(self) -> dict[str, Any]:
        """What runs, as plain data.

        Returns:
            "app" and "url"; "state": "RUNNING", "DEPLOYING" (a change is on its way), "FAILED" (the last
            change, or a backend that was given up; what serves serves on) or "DELETING", and "message" says
            why; "version" (of its code and options), "num_replicas" (as they are to be, by backend);
            "backends": of each backend its replicas by id, with "state" ("starting", "ready", "stopping"),
            "running" and "waiting" (requests), "version", and "pid" where it is known; "failed": why a
            backend was given up.
        """
        return await self._app.status()

    async def routes(self) -> dict[str, list[Any]]:
        """The app's paths, each with its endpoint's name and methods."""
        spec = await self._app.spec()
        return {route.prefix + route.pattern: [route.endpoint, list(route.methods)] for route in spec.routes}

    async def update(
        self,
        backend: str,
        *,
        wait: bool = True,
        deploy_timeout_s: float | None = None,
        **options: Unpack[BackendChanges],
    ) -> None:
        """Change a backend while it serves; returns when the change is in force.

        What can be changed in running replicas is: the processes stay. Where `num_threads` or
        `ray_actor_options` change, new replicas come in the place of the old ones by a rolling update; other
        backends' replicas stay. Nothing fails meanwhile. Whether a function is called with lists is a matter
        of its code: a deploy changes that.

        Args:
            backend: its name.
            wait: False to return when it is sure to be tried; `status` tells what becomes of it.
            deploy_timeout_s: how long a new replica may wait for its place in the cluster.
            options: fields of `BackendConfig`; the others stay. A `user_config` that is another than the one
                before is handed to `reconfigure` of each replica, of one before all others.

        Raises:
            KeyError: there is no such backend.
            TypeError: an unknown option, or one that does not fit the backend.
            ValueError: a value is out of range, or does not go with another.
            Exception: what the user's code raised, a `reconfigure` or a new replica's start; then everything
                stands, or is put back, as it was.
        """
        await self._app.update(backend, _change(backend, options, deploy_timeout_s), wait=wait)

    async def get_config(self, backend: str) -> BackendConfig:
        """A backend's options as they are now. Its `user_config` is in it if it was changed while it served;
        the one that the code declares is not.

        Raises:
            KeyError: there is no such backend.
        """
        spec = (await self._app.spec()).backend(backend)
        user_config = None if spec.user_config is None else load((), spec.user_config)
        return spec.config.merge(num_replicas=spec.num_replicas, user_config=user_config)

    async def set_traffic(self, endpoint: str, traffic: Mapping[str, float]) -> None:
        """Change the weights of the backends that an endpoint leads to; shadows stay.

        When this returns, every proxy and every handle goes by the new weights. The app's next deploy brings
        back those of its code.

        Args:
            endpoint: a route's name (its path, if it has no other).
            traffic: weight by backend; they sum to 1. One of weight 0, or left out, keeps its replicas.

        Raises:
            KeyError: no such endpoint.
            TypeError: what is given is no numbers by backend.
            ValueError: no such backend, or its function does not fit the endpoint's route, or the weights do
                not sum to 1. The old ones stand.
        """
        spec = await self._app.spec()
        weights = dict(parse_traffic(traffic, None, _names(spec), f"endpoint {endpoint!r}").weights)
        spec.rerouted(endpoint, weights, {})  # raises before anything is changed
        await self._app.reroute(endpoint, weights, {})

    async def shadow_traffic(self, endpoint: str, backend: str, fraction: float) -> None:
        """Send copies of some of an endpoint's requests to a backend, whose answers nobody waits for.

        Args:
            endpoint: a route's name.
            backend: who gets the copies.
            fraction: of the requests, from 0 (none any more) to 1.

        Raises:
            KeyError: no such endpoint.
            TypeError: the fraction is no number.
            ValueError: no such backend, or its function does not fit the endpoint's route, or the fraction is
                out of range. What was stands.
        """
        spec = await self._app.spec()
        spec.rerouted(endpoint, None, {backend: fraction})  # raises before anything is changed
        await self._app.reroute(endpoint, None, {backend: float(fraction)})

    async def delete(self) -> None:
        """End the app: what it runs may end."""
        await self._app.delete()


class Client(AppClient):
    """A running app, from a program with an event loop. Got from `async with serveit.serve(app)`."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime)
        self._runtime = runtime

    def __repr__(self) -> str:
        return f"<Client {self.url or 'without HTTP'}>"

    def __reduce__(self) -> NoReturn:
        raise _stays_here(self)

    def end(self, what: str) -> None:
        """Nothing can be asked any more. For `Serving`, when it is left.

        Args:
            what: "serve" or "connect".
        """
        ended: Any = Ended(what, self.url)
        self._app = self._runtime = ended

    def check_open(self) -> None:
        """Raises NotServing once it has been left."""
        _ = self._runtime.status

    @property
    def url(self) -> str | None:
        """Where the app answers HTTP: "http://127.0.0.1:8000"; None without a server."""
        return self._runtime.url

    @overload
    def get_handle(
        self, name: str, *, sync: Literal[False] = False, missing_ok: bool = False
    ) -> Handle[..., Any]: ...
    @overload
    def get_handle(
        self, name: str, *, sync: Literal[True], missing_ok: bool = False
    ) -> SyncHandle[..., Any]: ...
    def get_handle(self, name: str, *, sync: bool = False, missing_ok: bool = False) -> Any:
        """A handle on a backend (by its name) or an endpoint (by its route's name).

        Args:
            name: a backend's calls it; an endpoint's chooses by its traffic on each call.
            sync: the blocking handle, for threads without an event loop.
            missing_ok: give a handle also where there is none of that name yet. Its calls wait until a
                deploy brings it: until their deadline, or 60 s without one.

        Raises:
            KeyError: there is none; the text suggests or lists the known names.
            TypeError: it is no name.
        """
        if not isinstance(name, str):
            raise TypeError(f"get_handle takes the name of a backend or of a route, a str; got {name!r}")
        return self._runtime.get_handle(name, sync=sync, missing_ok=missing_ok)

    async def deploy(
        self,
        app: App,
        *,
        name: str = "default",
        prefix: str = "",
        wait: bool = True,
        deploy_timeout_s: float = 60.0,
    ) -> None:
        """Serve another app in the same instance, or the next version of one. It stays until deleted.

        Args:
            app: what to serve.
            name: of the app in the instance.
            prefix: in front of all its paths.
            wait: False to return when it is sure to be tried; `status` tells what becomes of it.
            deploy_timeout_s: how long the replicas may wait for resources.

        Raises:
            ValueError: a route of it belongs to another app.
            NotServing: a replica found no place in that time; the text says what the cluster lacks.
            Exception: what a replica's start-up code raised; then what ran before runs on.
        """
        check_app(app, name, prefix)
        check_seconds("deploy_timeout_s", deploy_timeout_s)
        await self._runtime.deploy(
            app, name=name, prefix=prefix, wait=wait, deploy_timeout_s=deploy_timeout_s
        )


class SyncClient:
    """A running app, from a program without an event loop. Got from `with serveit.serve(app)`."""

    def __init__(self, client: Client, portal: BlockingPortal) -> None:
        self._client = client
        self._loop = portal

    @property
    def _portal(self) -> BlockingPortal:
        """To the client's event loop, which ends when it is left."""
        self._client.check_open()
        return self._loop

    def __repr__(self) -> str:
        return repr(self._client).replace("<Client", "<SyncClient")

    def __reduce__(self) -> NoReturn:
        raise _stays_here(self)

    @property
    def url(self) -> str | None:
        """As `Client.url`."""
        return self._client.url

    def get_handle(self, name: str, *, missing_ok: bool = False) -> SyncHandle[..., Any]:
        """A blocking handle; see `Client.get_handle`."""
        return self._client.get_handle(name, sync=True, missing_ok=missing_ok)

    def status(self) -> dict[str, Any]:
        """As `Client.status`."""
        return self._portal.call(self._client.status)

    def routes(self) -> dict[str, list[Any]]:
        """As `Client.routes`."""
        return self._portal.call(self._client.routes)

    def update(
        self,
        backend: str,
        *,
        wait: bool = True,
        deploy_timeout_s: float | None = None,
        **options: Unpack[BackendChanges],
    ) -> None:
        """As `Client.update`."""
        self._portal.call(
            partial(self._client.update, backend, wait=wait, deploy_timeout_s=deploy_timeout_s, **options)
        )

    def get_config(self, backend: str) -> BackendConfig:
        """As `Client.get_config`."""
        return self._portal.call(self._client.get_config, backend)

    def set_traffic(self, endpoint: str, traffic: Mapping[str, float]) -> None:
        """As `Client.set_traffic`."""
        self._portal.call(self._client.set_traffic, endpoint, traffic)

    def shadow_traffic(self, endpoint: str, backend: str, fraction: float) -> None:
        """As `Client.shadow_traffic`."""
        self._portal.call(self._client.shadow_traffic, endpoint, backend, fraction)

    def deploy(
        self,
        app: App,
        *,
        name: str = "default",
        prefix: str = "",
        wait: bool = True,
        deploy_timeout_s: float = 60.0,
    ) -> None:
        """As `Client.deploy`."""
        options: dict[str, Any] = {"name": name, "prefix": prefix, "wait": wait}
        self._portal.call(partial(self._client.deploy, app, **options, deploy_timeout_s=deploy_timeout_s))

    def delete(self) -> None:
        """As `Client.delete`."""
        self._portal.call(self._client.delete)


def _stays_here(client: Client | SyncClient) -> TypeError:
    """What to say to a task, or another process, that is to be given a client."""
    return TypeError(
        f"a {type(client).__name__} cannot be pickled, it belongs to its process: send a handle along, "
        "client.get_handle(...), or call serveit.connect() over there"
    )


def _change(backend: str, options: Mapping[str, Any], deploy_timeout_s: float | None) -> BackendChange:
    """What travels to whoever runs the app."""
    check_options(BackendConfig, f"backend {backend!r}", options)
    if deploy_timeout_s is not None:
        check_seconds("deploy_timeout_s", deploy_timeout_s, positive=True)
    plain = dict(options)
    pickled = None
    if "user_config" in plain:
        user_config = plain.pop("user_config")
        if user_config is None:
            raise ValueError("user_config=None says nothing to replicas that run: give the one to go to")
        _, [pickled] = dump(user_config, f"the user_config of backend {backend!r}", inline=True)
    return BackendChange(plain, None if pickled is None else bytes(pickled), deploy_timeout_s)


def _names(spec: AppSpec) -> list[str]:
    return [backend.name for backend in spec.backends]


def check_app(app: App, name: str, prefix: str) -> None:
    """Raises TypeError or ValueError for what cannot be served."""
    if not isinstance(app, App):
        raise TypeError(f"expected a serveit.App, got {type(app).__name__}")
    check_app_name(name)
    if prefix and (not prefix.startswith("/") or prefix.endswith("/")):
        raise ValueError(f"prefix must start with '/' and not end with one, got {prefix!r}")
