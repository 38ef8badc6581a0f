"""What tests expect of answers over HTTP."""

from __future__ import annotations

from typing import Any

import httpx2


def problem(reply: httpx2.Response, status: int, executed: str = "no") -> dict[str, Any]:
    """The document of an error, which has to be of this status."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.headers["x-serveit-executed"] == executed
    assert reply.headers["x-request-id"]
    document: dict[str, Any] = reply.json()
    assert document["status"] == status
    return document
