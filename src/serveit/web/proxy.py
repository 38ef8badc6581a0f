"""The process on a node that speaks HTTP: uvicorn around the ingress. A plain class; an actor runs it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from typing import TYPE_CHECKING, Any

import uvicorn

from serveit.web.ingress import with_middlewares
from serveit.web.protocol import protocol_class

if TYPE_CHECKING:
    from serveit.config import HTTPOptions
    from serveit.web.ingress import Ingress

BACKLOG = 2048


class Proxy:
    """One HTTP server in the running event loop."""

    def __init__(self, options: HTTPOptions, ingress: Ingress) -> None:
        self.options = options
        self.ingress = ingress
        self._server: uvicorn.Server | None = None
        self._sockets: list[socket.socket] = []
        self._main_loop: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where it answers; known once started."""
        host, port = self._sockets[0].getsockname()[:2]
        scheme = "https" if self.options.ssl_certfile else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{self.options.root_path}"

    async def start(self, sock: socket.socket | None = None) -> None:
        """Listen.

        Args:
            sock: a listening socket to take over; None to bind the options' address.

        Raises:
            OSError: the address is in use or not this machine's; the text says which and what to do.
        """
        self._sockets = [sock if sock is not None else bind(self.options)]
        config = uvicorn.Config(
            with_middlewares(self.ingress, self.options),
            http=protocol_class(self.options),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            root_path=self.options.root_path,
            timeout_keep_alive=self.options.keep_alive_s,  # type: ignore[arg-type]
            ssl_certfile=self.options.ssl_certfile,
            ssl_keyfile=self.options.ssl_keyfile,
            backlog=BACKLOG,
        )
        config.load()
        self._server = uvicorn.Server(config)
        self._server.lifespan = config.lifespan_class(config)
        await self._server.on_tick(0)  # the first answers have a date, too
        await self._server.startup(sockets=self._sockets)
        self._main_loop = asyncio.get_running_loop().create_task(self._server.main_loop())

    async def aclose(self, timeout_s: float | None = None) -> None:
        """Take no more connections and let the requests that run end.

        Args:
            timeout_s: then what still runs is cancelled; None to wait for all of it.
        """
        server = self._server
        if server is None or server.should_exit:
            return
        server.should_exit = True
        if self._main_loop is not None:
            self._main_loop.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._main_loop
        server.config.timeout_graceful_shutdown = timeout_s  # type: ignore[assignment]
        await server.shutdown(sockets=self._sockets)

    def force(self) -> None:
        """Stop waiting for requests in an `aclose` under way."""
        if self._server is not None:
            self._server.force_exit = True


def bind(options: HTTPOptions) -> socket.socket:
    """A bound socket, listening once the server is up.

    With IPPROTO_TCP spelled out: asyncio sets TCP_NODELAY only where it reads the protocol's number,
    and without it each keep-alive answer takes over 40 ms.

    Raises:
        OSError: with what to do about it.
    """
    host, port = options.host, options.port
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise OSError(f"host {host!r} is not an address of this machine: {error.strerror}") from None
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise type(error)(
            error.errno, f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}{_way_out(error)}"
        ) from None
    sock.setblocking(False)
    return sock


def _way_out(error: Any) -> str:
    import errno

    ways = {
        errno.EADDRINUSE: "; something listens there already: stop it, or choose another with --port",
        errno.EADDRNOTAVAIL: "; it is not an address of this machine: choose another with --host",
        errno.EACCES: "; ports below 1024 need privileges: choose another with --port",
    }
    return ways.get(error.errno, "")
