"""What goes wrong, in one message or as the user's own traceback."""

from __future__ import annotations

import os

import click
import pytest

from serveit import App, NotServing
from serveit.command import explaining
from serveit.command.explaining import explain, explained, users_traceback
from serveit.exceptions import ImportFailed, RemoteTraceback


def test_causes_are_shown_as_the_user_s() -> None:
    try:
        try:
            App().add_route("x")
        except Exception as error:
            raise ValueError("theirs") from error
    except ValueError as error:
        text = users_traceback(error)
    assert "direct cause" in text and "test_explaining.py" in text and "routing.py" not in text


def test_a_traceback_from_a_replica_is_shown_as_the_user_s() -> None:
    own, asyncios = explaining.__file__, os.__file__.replace("os.py", "asyncio/tasks.py")
    error = ValueError("theirs")
    error.add_note("(while it started)")
    error.__cause__ = RemoteTraceback(
        f'Traceback (most recent call last):\n  File "{own}", line 1, in a\n    a()\n'
        f'  File "{asyncios}", line 1, in b\n    b()\n    ^^^\n'
        '  File "app.py", line 1, in theirs\n    c()\n'
        f'  File "{asyncios}", line 1, in d\n    d()\n  File "{own}", line 2, in e\n    e()\n'
        "KeyError: 1\n\nDuring handling of the above exception, another exception occurred:\n\n"
        f'Traceback (most recent call last):\n  File "{own}", line 1, in f\n    f()\n'
        '  File "app.py", line 3, in theirs\nValueError: theirs\nand more\n'
    )
    assert users_traceback(error) == (
        'Traceback (most recent call last):\n  File "app.py", line 1, in theirs\n    c()\n'
        f'  File "{asyncios}", line 1, in d\n    d()\n'
        "KeyError: 1\n\nDuring handling of the above exception, another exception occurred:\n\n"
        'Traceback (most recent call last):\n  File "app.py", line 3, in theirs\n'
        "ValueError: theirs\nand more\n(while it started)\n"
    )


def test_click_exceptions_are_short() -> None:
    error = explain(OSError(98, "cannot listen on x"), "nothing", theirs=False)
    assert isinstance(error, click.ClickException) and error.message == "cannot listen on x"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(98, "cannot listen on x"), "cannot listen on x"),
        (ConnectionError("no Ray cluster"), "no Ray cluster"),
        (KeyError("no app 'x' runs"), "no app 'x' runs"),
        (ValueError("GET /x is taken"), "GET /x is taken"),
        (NotServing("nothing runs"), "nothing runs"),
    ],
)
def test_a_refusal_is_one_message(error: Exception, said: str) -> None:
    with pytest.raises(click.ClickException) as caught, explained("it cannot be done"):
        raise error
    assert caught.value.message == said


def test_our_own_mistakes_keep_their_traceback() -> None:
    with pytest.raises(AssertionError), explained("it cannot be done"):
        raise AssertionError("a bug")


@pytest.mark.parametrize("error", [ValueError("theirs"), OSError(2, "theirs"), NotServing("theirs")])
def test_what_a_replica_raised_is_the_user_s(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    error.add_note("(while replica Model#1 of app 'default' started)")
    with pytest.raises(click.ClickException) as caught, explained("it cannot be done"):
        raise error
    assert caught.value.message == "it cannot be done"
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):\n") and "theirs\n(while replica" in shown


def test_the_http_server_runs_no_code_of_the_user_s(capsys: pytest.CaptureFixture[str]) -> None:
    error = OSError(98, "cannot listen on x")
    error.add_note("(while the HTTP server started)")
    with pytest.raises(click.ClickException, match="cannot listen on x"), explained("it cannot be done"):
        raise error
    assert capsys.readouterr().err == ""


def test_an_import_string_is_a_message_also_from_a_replica() -> None:
    error = ImportFailed("there is no module 'x'")
    error.add_note("(while replica x#1 of app 'default' started)")
    with pytest.raises(click.ClickException, match="there is no module"), explained("it cannot be done"):
        raise error
