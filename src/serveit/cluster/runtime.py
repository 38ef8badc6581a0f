"""An app on Ray, as its driver's `Client` sees it: session, controller, HTTP, deploy, handles.

The counterpart of `local.LocalRuntime`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

import msgspec

from serveit.calling.gateway import open_portal
from serveit.calling.handle import Handle, HandleOptions
from serveit.cluster.contact import find_controller
from serveit.cluster.gateways import ClusterGateway, Entrance
from serveit.cluster.instance import Instance, InstanceApp, make_spec
from serveit.cluster.ownership import check_free, opened_session, own_app
from serveit.config import HTTPOptions
from serveit.context import serving
from serveit.exceptions import NotServing

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Coroutine, Mapping

    from serveit.cluster.ownership import OwnedApp
    from serveit.control.orders import BackendChange, Deploying
    from serveit.control.spec import AppSpec
    from serveit.declare.app import App

logger = logging.getLogger("serveit.client")

SLOW_START_S = 5.0
"""A deploy that takes longer says what it waits for."""


class ClusterRuntime:
    """One app on Ray."""

    def __init__(
        self,
        app: App | None,
        *,
        name: str = "default",
        prefix: str = "",
        http: HTTPOptions | None,
        address: str | None = None,
        deploy_timeout_s: float = 60.0,
        log_level: str = "info",
        on_progress: Callable[[Deploying], None] | None = None,
    ) -> None:
        """
        Args:
            app: what to serve, for as long as this runs; None for an app that runs already.
            name: of the app.
            prefix: in front of all its paths.
            http: of the instance's HTTP servers; None to take them as they are, or the defaults.
            address: of the cluster; see `open_session`.
            deploy_timeout_s: how long replicas may wait for resources.
            log_level: of the instance's processes, if this starts it.
            on_progress: told how far the deploy is; without it a slow one is logged.
        """
        self.app = app
        self.name = name
        self.prefix = prefix
        self._http = http
        self._address = address
        self._deploy_timeout_s = deploy_timeout_s
        self._log_level = log_level
        self._on_progress = on_progress
        self._exit = contextlib.AsyncExitStack()
        self._closing = asyncio.Lock()
        self._closed = False
        self.url: str | None = None
        self._instance: Instance
        self._entrance: Entrance
        self._gateway: ClusterGateway | None = None

    async def start(self, sock: socket.socket | None = None) -> None:
        """Start or join Ray and the instance, deploy, and answer.

        Raises:
            OSError: the HTTP address can't be listened on; found before any replica starts.
            ConnectionError: no cluster at the address.
            Exception: what a replica's constructor or other start-up code raised.
        """
        if sock is not None:
            raise ValueError("sock= is for local=True: on Ray the proxies listen")
        async with contextlib.AsyncExitStack() as stack:
            if self.app is None:
                await self._connect(stack)
            else:
                await self._serve(self.app, stack)
            self._exit = stack.pop_all()

    async def _connect(self, stack: contextlib.AsyncExitStack) -> None:
        """To an app that someone else serves."""
        await stack.enter_async_context(opened_session(self._address))
        self._instance = Instance(await asyncio.to_thread(find_controller))
        await self._open_ways(stack)
        await self._check_there()
        self.url = await self._instance.url()

    async def _check_there(self) -> None:
        """Raises NotServing, with why, unless the app runs or is coming up: whoever has not waited for its
        first deploy asks for its status here."""
        try:
            self._entrance.gateway(self.name)
        except NotServing:
            told: dict[str, Any] = {}
            with contextlib.suppress(KeyError):
                told = await self._running.status()
            if told.get("state") == "FAILED":
                raise NotServing(f"app {self.name!r} did not come up: {told['message']}") from None
            if told.get("state") != "DEPLOYING":
                raise

    async def _serve(self, app: App, stack: contextlib.AsyncExitStack) -> None:
        """An app of one's own."""
        # What can be found wrong before anything is started, is.
        check_free(self._http, self._address)
        spec = await self._make_spec(app, self.name, self.prefix, self._deploy_timeout_s)
        session = await stack.enter_async_context(opened_session(self._address))
        ways = await stack.enter_async_context(contextlib.AsyncExitStack())
        # Ends first: what runs may end while the ways to it are still open.
        owned, serve_http = await stack.enter_async_context(
            own_app(session, self.name, self._http, log_level=self._log_level, on_end=self._drain)
        )
        self._instance = owned.instance

        async def answer() -> None:
            self.url = await serve_http()

        # At the same time: each takes a process of its own.
        await _both(answer(), self._deploy(owned, spec))
        await self._open_ways(ways)
        self._gateway = self._entrance.gateway(self.name)
        stack.enter_context(serving(app, self))

    async def aclose(self) -> None:
        """Let what runs end, end the app, and whatever was started for it. Once is enough."""
        async with self._closing:
            if not self._closed:
                self._closed = True
                await self._exit.aclose()

    # -- what a client asks for --------------------------------------------------------------

    def get_handle(self, name: str, *, sync: bool = False, missing_ok: bool = False) -> Any:
        """A handle on a backend or endpoint. KeyError lists the known names."""
        gateway = self._entrance.gateway(self.name)
        if not missing_ok:
            gateway.directory.endpoint(name)
        handle: Handle[..., Any] = Handle(gateway, name, HandleOptions(missing_ok=missing_ok))
        return handle.sync if sync else handle

    @property
    def _running(self) -> InstanceApp:
        return self._instance.app(self.name)

    async def status(self) -> dict[str, Any]:
        """The app's backends, their replicas and what these are doing."""
        return {"app": self.name, "url": self.url, **await self._running.status()}

    async def spec(self) -> AppSpec:
        """The app as it is to be."""
        return await self._running.spec()

    async def update(self, backend: str, wanted: BackendChange, *, wait: bool) -> None:
        """Change a backend's options; returns when they are in force."""
        await self._running.update(backend, wanted, wait=wait)

    async def reroute(
        self, endpoint: str, weights: Mapping[str, float] | None, shadows: Mapping[str, float]
    ) -> None:
        """Change where an endpoint leads; returns when proxies and handles know."""
        await self._running.reroute(endpoint, weights, shadows)

    async def deploy(self, app: App, *, name: str, prefix: str, wait: bool, deploy_timeout_s: float) -> None:
        """Serve another app in the same instance; it stays until it is deleted."""
        await self._instance.deploy(await self._make_spec(app, name, prefix, deploy_timeout_s), wait=wait)

    async def delete(self) -> None:
        """End the app, whoever started it."""
        await self._running.delete()

    # -- starting ----------------------------------------------------------------------------

    async def _open_ways(self, ways: contextlib.AsyncExitStack) -> None:
        """Handles, from this loop and from other threads."""
        portal = await open_portal(ways)
        self._entrance = Entrance("driver", portal)
        ways.push_async_callback(self._entrance.aclose)
        await self._entrance.open()

    async def _make_spec(self, app: App, name: str, prefix: str, deploy_timeout_s: float) -> AppSpec:
        spec = await make_spec(app, name=name, prefix=prefix, deploy_timeout_s=deploy_timeout_s)
        serves = (self._http or HTTPOptions()).serves
        return spec if serves else msgspec.structs.replace(spec, routes=())

    async def _deploy(self, owned: OwnedApp, spec: AppSpec) -> None:
        if self._on_progress is not None:
            return await owned.deploy(spec, self._on_progress)
        names = ", ".join(backend.name for backend in spec.backends)
        slow = asyncio.get_running_loop().call_later(SLOW_START_S, logger.info, "still starting %s", names)
        try:
            await owned.deploy(spec)
        finally:
            slow.cancel()

    def _drain(self) -> None:
        """What comes from here from now on is refused at once."""
        if self._gateway is not None:
            self._gateway.directory.drain()


async def _both(first: Coroutine[Any, Any, None], second: Coroutine[Any, Any, None]) -> None:
    """Run both; what one raises ends the other and is raised as it is."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in (first, second)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
