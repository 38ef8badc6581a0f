"""What was meant by a name that there is not."""

from __future__ import annotations

from serveit.nearest import did_you_mean


def test_did_you_mean() -> None:
    assert did_you_mean("prot", ["port", "host"]) == "did you mean 'port'?"
    assert did_you_mean("x", ["port", "host"]) == "there is 'host', 'port'"
    assert did_you_mean("x", []) == "there is none"
