"""The process on a node that speaks HTTP: uvicorn around the ingress. A plain class; an actor runs it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from typing import TYPE_CHECKING

import uvicorn

from serveit.web.middlewares import with_middlewares
from serveit.web.protocol import protocol_class

if TYPE_CHECKING:
    from collections.abc import Iterator

    from serveit.config import HTTPOptions
    from serveit.web.ingress import Ingress

BACKLOG = 2048
CANCEL_S = 1.0
"""What requests that are cancelled at the end of a drain get to send their last words."""
FRESH_S = 0.1
"""What a connection that was accepted at the last moment gets to send its first request."""


class Proxy:
    """One HTTP server in the running event loop."""

    def __init__(self, options: HTTPOptions, ingress: Ingress) -> None:
        self.options = options
        self.ingress = ingress
        self._server: uvicorn.Server | None = None
        self._sockets: list[socket.socket] = []
        self._main_loop: asyncio.Task[None] | None = None
        self._url = ""

    @property
    def url(self) -> str:
        """Where it answers (or did); known once started."""
        return self._url

    async def start(self, sock: socket.socket | None = None) -> None:
        """Listen.

        Args:
            sock: a bound socket to take over; None to bind the options' address.

        Raises:
            OSError: the address is in use or not this machine's, or a certificate cannot be read; the
                text says which and what to do.
            ImportFailed: a middleware's import string leads nowhere.
        """
        config = self._config()
        sock = sock if sock is not None else bind(self.options)
        try:
            # Accepted sockets inherit it; asyncio itself sets it only where it knows that this is TCP.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            host, port = sock.getsockname()[:2]
            server = uvicorn.Server(config)
            server.lifespan = config.lifespan_class(config)
            await server.on_tick(0)  # the first answers have a date, too
            await server.startup(sockets=[sock])
        except OSError as error:
            sock.close()
            raise _cannot_listen(self.options, error) from None
        scheme = "https" if self.options.ssl_certfile else "http"
        self._url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        self._sockets = [sock]
        self._server = server
        self._main_loop = asyncio.get_running_loop().create_task(server.main_loop())

    def _config(self) -> uvicorn.Config:
        options = self.options
        config = uvicorn.Config(
            with_middlewares(self.ingress, options),
            http=protocol_class(options),
            interface="asgi3",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            root_path=options.root_path,
            timeout_keep_alive=options.keep_alive_s,  # type: ignore[arg-type]
            ssl_certfile=options.ssl_certfile,
            ssl_keyfile=options.ssl_keyfile,
            backlog=BACKLOG,
        )
        try:
            config.load()
        except OSError as error:
            files = f"ssl_certfile={options.ssl_certfile!r}, ssl_keyfile={options.ssl_keyfile!r}"
            raise OSError(
                error.errno, f"HTTPS needs a certificate that can be read: {files}: {error}"
            ) from None
        return config

    async def aclose(self, timeout_s: float | None = None) -> None:
        """Take no more connections and let the requests that run end.

        Args:
            timeout_s: then what still runs is cancelled, and answered 503 or cut off; None to wait
                for all of it.
        """
        server = self._server
        if server is None or self._main_loop is None or server.should_exit:
            return
        server.should_exit = True
        self.ingress.stopping = True
        self._main_loop.cancel()
        server.config.timeout_graceful_shutdown = timeout_s  # type: ignore[assignment]
        await self._serve_fresh(server)
        with _without_empty_errors():
            await server.shutdown(sockets=self._sockets)
        tasks = list(server.server_state.tasks)
        if tasks:
            if server.force_exit:
                for task in tasks:
                    task.cancel()
            await asyncio.wait(tasks, timeout=CANCEL_S)
        for connection in list(server.server_state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)  # the transports' last callbacks

    async def _serve_fresh(self, server: uvicorn.Server) -> None:
        """Accept nothing more, and let who was accepted just now send its request: uvicorn would close on
        it without an answer, and with `--reload` another process is there to accept the rest."""
        for listener in server.servers:
            listener.close()
        await asyncio.sleep(0)  # connections that are being made
        if any(getattr(one, "cycle", None) is None for one in server.server_state.connections):
            await asyncio.sleep(FRESH_S)

    def force(self) -> None:
        """Stop waiting for requests in an `aclose` under way."""
        if self._server is not None:
            self._server.force_exit = True


@contextlib.contextmanager
def _without_empty_errors() -> Iterator[None]:
    """uvicorn says as an error that it cancels the requests that still run, also where there are none."""

    def is_news(record: logging.LogRecord) -> bool:
        return not (str(record.msg).startswith("Cancel") and record.args == (0,))

    said = logging.getLogger("uvicorn.error")
    said.addFilter(is_news)
    try:
        yield
    finally:
        said.removeFilter(is_news)


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
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OSError(
            errno.EADDRNOTAVAIL, f"host {host!r} is not an address of this machine: {reason}"
        ) from None
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _cannot_listen(options, error) from None
    sock.setblocking(False)
    return sock


_WAYS_OUT = {
    errno.EADDRINUSE: "; something listens there already: stop it, or choose another with --port",
    errno.EADDRNOTAVAIL: "; it is not an address of this machine: choose another with --host",
    errno.EACCES: "; ports below 1024 need privileges: choose another with --port",
}


def _cannot_listen(options: HTTPOptions, error: OSError) -> OSError:
    number = error.errno or 0
    way_out = _WAYS_OUT.get(number, "")
    return type(error)(
        number, f"cannot listen on {options.host}:{options.port}: {os.strerror(number)}{way_out}"
    )
