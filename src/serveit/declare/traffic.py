"""Which backend of an endpoint takes a request: the traffic table and the choices made with it.

Pure: no state and no I/O, and chance comes in as an argument. Hot path: `choose` or `choose_sticky`
and `shadows_for`, once per request, in proxies and handles.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from serveit.config import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

SUM_TOLERANCE = 1e-8
"""What the weights' sum may be off from 1, a weight: room for rounding, not for 0.33 three times."""


class Traffic(msgspec.Struct, frozen=True):
    """How an endpoint's requests are shared out; made by `parse_traffic`.

    Attributes:
        weights: (backend, share of the requests), sorted by name; the shares sum to 1. A backend
            of weight 0 is in the table and gets nothing.
        shadows: (backend, probability that it gets a copy of a request), sorted by name, none of 0.
    """

    weights: tuple[tuple[str, float], ...]
    shadows: tuple[tuple[str, float], ...] = ()


def parse_traffic(
    weights: Mapping[str, float],
    shadows: Mapping[str, float] | None,
    known: Collection[str],
    where: str,
) -> Traffic:
    """The table that the user's mappings make.

    Args:
        weights: share of the requests, by backend; they sum to 1.
        shadows: probability of a copy, by backend, in [0, 1]; 0 is as good as absent. A backend may
            be in both.
        known: names of the backends that there are.
        where: what errors start with: the endpoint, and who sets its traffic.

    Raises:
        TypeError: not a mapping, or a number in it is none (bools and strings are not).
        ValueError: an unknown backend, a number out of range, or weights that do not sum to 1.
    """
    shares = parse_shares(weights, "weight", known, where)
    if not shares:
        raise ValueError(
            f"{where}: no backend in the traffic: give weights that sum to 1, as {{'name': 1.0}}"
        )
    total = sum(share for _, share in shares)
    if not abs(total - 1) <= SUM_TOLERANCE * len(shares):
        raise ValueError(
            f"{where}: the weights must sum to 1, got {total:.10g} "
            f"({' + '.join(f'{share:.10g} for {name!r}' for name, share in shares)})"
        )
    copies = parse_shares({} if shadows is None else shadows, "shadow", known, where)
    for name, probability in copies:
        if probability > 1:
            raise ValueError(
                f"{where}: the shadow of {name!r} must be in [0, 1], got {probability:.10g}: "
                "it is the part of the requests that are copied"
            )
    return Traffic(shares, tuple(entry for entry in copies if entry[1] > 0))


def parse_shares(
    shares: Mapping[str, float], what: str, known: Collection[str], where: str
) -> tuple[tuple[str, float], ...]:
    """Numbers by backend, sorted by name, those of 0 included.

    Args:
        shares: what the user gave.
        what: they are: "weight" or "shadow".
        known: names of the backends that there are.
        where: what errors start with.

    Raises:
        TypeError: not a mapping, or a number in it is none.
        ValueError: an unknown backend, or a negative number or one that is not finite.
    """
    if not isinstance(shares, Mapping):
        raise TypeError(f"{where}: {what}s must be a dict of numbers by backend, got {shares!r}")
    parsed = []
    for name, share in shares.items():
        if not isinstance(name, str):
            raise TypeError(f"{where}: {what}s go by the backend's name, a str, got {name!r}")
        if name not in known:
            raise ValueError(f"{where}: unknown backend {name!r}: {did_you_mean(name, list(known))}")
        parsed.append((name, _parse_share(name, share, what, where)))
    return tuple(sorted(parsed))


def _parse_share(name: str, share: Any, what: str, where: str) -> float:
    if isinstance(share, bool) or not isinstance(share, (int, float)):
        raise TypeError(f"{where}: the {what} of {name!r} must be a number, got {share!r}")
    try:
        number = float(share)
    except OverflowError:  # an int of more than 308 digits
        number = math.inf
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{where}: the {what} of {name!r} must be ≥ 0 and finite, got {number:.10g}")
    return number


def choose(traffic: Traffic, random: float) -> str:
    """A backend by weight.

    Args:
        traffic: the endpoint's table.
        random: uniform in [0, 1), a new one each time.
    """
    weights = traffic.weights
    if len(weights) == 1:
        return weights[0][0]
    for name, weight in weights:
        if random < weight:  # never for a weight of 0: `random` stays ≥ 0
            return name
        random -= weight
    # The weights sum to a little less than 1, and `random` fell in the gap.
    return next(name for name, weight in reversed(weights) if weight)


def choose_sticky(traffic: Traffic, key: str) -> str:
    """The same backend for the same key, weights being the same; over many keys, shares by weight.

    Weighted rendezvous hashing: each backend draws a number h in (0, 1) from its name and the key,
    scores -weight / ln(h), and the highest score wins. Nothing is remembered, so every process and
    every restart agrees. A change of weights moves few more keys than it must: 50/50 to 60/40 moves
    a tenth of the keys, all of them to the grown backend; a new backend takes keys from the others
    in proportion and moves none between these. Where weights p become q, so that a share d of the keys
    has to move, at most 2d / (1 + d) do: a key stays at i with a probability of at least
    min(p_i, q_i) / Σ max(p_j, q_j).

    Sources: D. Thaler, C. Ravishankar, "Using name-based mappings to increase hit rates", IEEE/ACM
    Transactions on Networking 6(1), 1998 (rendezvous hashing); C. Schindelhauer, G. Schomaker,
    "Weighted distributed hash tables", SPAA 2005 (the logarithmic method: the weights).

    Args:
        traffic: the endpoint's table.
        key: the shard key: any text, of any length.
    """
    if len(traffic.weights) == 1:
        return traffic.weights[0][0]
    _, chosen = max(
        (-weight / math.log(_draw(name, key)), name) for name, weight in traffic.weights if weight
    )
    return chosen


def _draw(name: str, key: str) -> float:
    """A number in (0, 1), both ends excluded, that depends on the two texts only.

    The builtin `hash` differs between processes. Changing anything here sends users' keys elsewhere.
    """
    backend = name.encode("utf-8", "surrogatepass")
    # The length keeps ("ab", "c") apart from ("a", "bc").
    text = b"%d:%b%b" % (len(backend), backend, key.encode("utf-8", "surrogatepass"))
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
    # 52 bits and a half: exact as a float, so it never rounds to 0 or 1.
    return ((number >> 12) + 0.5) / 2**52


def shadows_for(traffic: Traffic, random: Callable[[], float]) -> list[str]:
    """The backends that get a copy of one request, each drawn on its own.

    Args:
        traffic: the endpoint's table.
        random: gives a new number, uniform in [0, 1), at each call.
    """
    return [name for name, probability in traffic.shadows if random() < probability]
