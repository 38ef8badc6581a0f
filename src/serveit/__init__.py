"""serveit serves Python functions and models: decorate them, `serveit run app:app`, call them.

Importing it starts nothing and loads neither Ray nor uvicorn.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from serveit.config import BackendConfig, HTTPOptions
from serveit.context import Context, context
from serveit.declare.app import App
from serveit.declare.backend import Backend
from serveit.declare.signature import Body, Header, Query
from serveit.exceptions import (
    BatchError,
    BodyTooLarge,
    DeadlineExceeded,
    Draining,
    EncodingError,
    ImportFailed,
    InvalidRequest,
    ItemErrors,
    NeedsRay,
    NoReplica,
    NotServing,
    PathNotFound,
    ProtocolError,
    QueueFull,
    Rejected,
    RemoteError,
    ReplicaDied,
    ServeitError,
    UnsupportedMediaType,
)

if TYPE_CHECKING:
    from starlette.requests import Request

    from serveit import testing
    from serveit.calling.handle import Handle
    from serveit.calling.sync import SyncHandle
    from serveit.client import Client, SyncClient
    from serveit.serving import connect, run, serve

__version__ = "0.1.0"

__all__ = [
    "App",
    "Backend",
    "BackendConfig",
    "BatchError",
    "Body",
    "BodyTooLarge",
    "Client",
    "Context",
    "DeadlineExceeded",
    "Draining",
    "EncodingError",
    "HTTPOptions",
    "Handle",
    "Header",
    "ImportFailed",
    "InvalidRequest",
    "ItemErrors",
    "NeedsRay",
    "NoReplica",
    "NotServing",
    "PathNotFound",
    "ProtocolError",
    "Query",
    "QueueFull",
    "Rejected",
    "RemoteError",
    "ReplicaDied",
    "Request",
    "Response",
    "ServeitError",
    "SyncClient",
    "SyncHandle",
    "UnsupportedMediaType",
    "connect",
    "context",
    "run",
    "serve",
    "testing",
]

_LAZY = {
    "Client": "serveit.client",
    "Handle": "serveit.calling.handle",
    "Request": "starlette.requests",
    "Response": "starlette.responses",
    "SyncClient": "serveit.client",
    "SyncHandle": "serveit.calling.sync",
    "connect": "serveit.serving",
    "run": "serveit.serving",
    "serve": "serveit.serving",
}


def __getattr__(name: str) -> Any:
    """What is costly to import comes with its first use."""
    if name == "testing":
        return import_module("serveit.testing")
    if name not in _LAZY:
        raise AttributeError(f"module 'serveit' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
