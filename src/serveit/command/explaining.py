"""What the command says when something went wrong: one message, or the user's own traceback."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import importlib
import itertools
import os
import re
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import click

from serveit.exceptions import ImportFailed, RemoteTraceback, ServeitError

if TYPE_CHECKING:
    from collections.abc import Iterator

REFUSALS = (ServeitError, OSError, ValueError, KeyError)
"""What serveit raises for a mistake of the user's; everything else is ours, and keeps its traceback."""

_OWN = str(Path(__file__).parents[1]) + os.sep
_MACHINERY = (
    _OWN,
    "<frozen ",
    "uvloop/",
    *(str(Path(str(module.__file__)).parent) + os.sep for module in (asyncio, concurrent.futures, importlib)),
)


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """While inside, what is refused ends the command with one message, and what the user's code raised in a
    replica with that code's traceback.

    Args:
        what: could not be done then.
    """
    try:
        yield
    except Exception as error:
        notes = getattr(error, "__notes__", ())
        # A replica runs the user's code; an HTTP server, which is the other thing that starts, does not.
        theirs = any(note.startswith("(while replica ") for note in notes)
        if theirs or isinstance(error, REFUSALS):
            raise explain(error, what, theirs=theirs) from None
        raise


def explain(error: Exception, what: str, *, theirs: bool) -> click.ClickException:
    """One message for what serveit refuses; for what the user's code raised its own traceback, first.

    Args:
        error: what happened.
        what: could not be done because of it.
        theirs: whether it came out of the user's code.
    """
    if isinstance(error, ImportFailed) or not theirs:
        return click.ClickException(message_of(error))
    click.echo(users_traceback(error), err=True, nl=False)
    return click.ClickException(what)


def message_of(error: Exception) -> str:
    """What it says, and no more: neither a KeyError's quotes nor an OSError's number."""
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])
    return getattr(error, "strerror", None) or str(error)


def users_traceback(error: BaseException) -> str:
    """The traceback from the user's first line on, without serveit's own."""
    if isinstance(error.__cause__, RemoteTraceback):
        notes = "".join(f"{note}\n" for note in getattr(error, "__notes__", ()))
        return _users_frames(str(error.__cause__.args[0])) + notes
    told = traceback.TracebackException.from_exception(error)
    pending = [told]
    while pending:
        part = pending.pop()
        frames = itertools.dropwhile(lambda frame: frame.filename.startswith(_MACHINERY), part.stack)
        theirs = [frame for frame in frames if not frame.filename.startswith(_OWN)]
        part.stack = traceback.StackSummary.from_list(theirs)
        pending += [cause for cause in (part.__cause__, part.__context__) if cause is not None]
    return "".join(told.format())


def _users_frames(text: str) -> str:
    """The same of a traceback that came from a replica, as text."""
    kept, is_theirs = [], False
    for part in re.split(r'^(?=  File "|\S)', text, flags=re.MULTILINE):
        found = re.match(r'  File "(.*?)"', part)
        if found is None:
            is_theirs = is_theirs and not part.startswith("Traceback ")
        elif found[1].startswith(_MACHINERY if not is_theirs else _OWN):
            continue
        else:
            is_theirs = True
        kept.append(part)
    return "".join(kept)
