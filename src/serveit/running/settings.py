"""What a running replica is configured by, and how it takes in other settings while it serves."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from types import NoneType
from typing import TYPE_CHECKING, Any

import msgspec

from serveit.control.orders import Settings
from serveit.exceptions import EncodingError
from serveit.wire.pickles import dump, load

if TYPE_CHECKING:
    from serveit.config import BackendConfig
    from serveit.declare.backend import BackendRecord
    from serveit.running.replica import Replica

PLAIN = (str, bytes, int, float, bool, set, frozenset, NoneType)
"""What says by itself whether it is equal."""


def configured(backend: BackendRecord, octets: bytes) -> BackendRecord:
    """A backend as the code declares it, with the settings that it is to be run by.

    Args:
        backend: of the user's app.
        octets: encoded `Settings`; empty for what the code says.

    Raises:
        TypeError, ValueError: its function or class does not fit them.
        Exception: what unpickling its `user_config` raises.
    """
    return backend.configured(_decode(backend.config, octets)[0]) if octets else backend


class LiveSettings:
    """The settings of one replica. All mutable state: `octets` (what is in force, encoded; empty where that
    is not certain) and `_is_certain` (whether the user's object has what they say)."""

    def __init__(self, declared: BackendConfig, octets: bytes) -> None:
        """
        Args:
            declared: what the code says.
            octets: what the replica has started with.
        """
        self.octets = octets
        self._declared = declared
        self._user_config = self._user_config_of(octets)
        self._is_certain = True
        self._turn = asyncio.Lock()

    def _user_config_of(self, octets: bytes) -> bytes | None:
        """Pickled, to be compared: what the code says may be asked for by name later."""
        pickled = _decode(self._declared, octets)[1] if octets else None
        if pickled is None and (declared := self._declared.user_config) is not None:
            with contextlib.suppress(EncodingError):  # then every other one is another
                _, [dumped] = dump(declared, "user_config", inline=True)
                pickled = bytes(dumped)
        return pickled

    async def take_in(self, replica: Replica, octets: bytes) -> None:
        """Give them to the replica; its `user_config` only if it is another than the one that it has.

        Raises:
            ValueError: there is no `user_config` to go back to: it never had one.
            TypeError: it takes none; nothing has changed.
            Exception: what unpickling it, or the user's `reconfigure`, raises.
        """
        async with self._turn:
            if octets == self.octets:
                return
            config, user_config = _decode(self._declared, octets)[0], self._user_config_of(octets)
            is_another = not (self._is_certain and _are_equal(user_config, self._user_config))
            if is_another and config.user_config is None:
                raise ValueError("it was started without a user_config: there is none to go back to")
            if is_another:
                replica.instance.check_reconfigures()
            self.octets = b""
            self._is_certain = not is_another
            await replica.configure(config, reconfigure=is_another)
            self.octets, self._user_config, self._is_certain = octets, user_config, True


def _are_equal(one: bytes | None, other: bytes | None) -> bool:
    """Whether two pickles are of the same. The octets need not be: the order of a set is another in each
    process, and what is the same object twice is written once."""
    if one is None or other is None or one == other:
        return one == other
    try:
        return _is_same(load((), one), load((), other))
    except Exception:  # whatever the user's classes do
        return False


def _is_same(one: Any, other: Any) -> bool:
    """For plain data; of what else there is, only the octets are known to tell."""
    kind = type(one)
    if kind is not type(other):
        return False
    if kind is dict:
        return one.keys() == other.keys() and all(_is_same(value, other[key]) for key, value in one.items())
    if kind in (list, tuple):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return kind in PLAIN and bool(one == other)


def _decode(declared: BackendConfig, octets: bytes) -> tuple[BackendConfig, bytes | None]:
    """The whole configuration, and the pickle of its `user_config`; None where the code's own is meant."""
    settings = msgspec.msgpack.decode(octets, type=Settings)
    pickled = settings.user_config
    user_config = declared.user_config if pickled is None else load((), pickled)
    return dataclasses.replace(settings.config, user_config=user_config), pickled
