"""The command: `serveit run app:app`, and what is asked of an instance that runs.

Each command is thin: `operating` asks, `reporting` and `progress` show, and what goes wrong is said by
`explaining` in one message that names the way out. Ray and rich are imported only where they are needed.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click

from serveit.command.arguments import (
    asking,
    http_options,
    is_http_given,
    of_app,
    pairs,
    serving_options,
    timeout,
)
from serveit.command.explaining import explained
from serveit.command.running import (
    end_with,
    leave,
    listening,
    load,
    passed_on,
    serve,
    stopping_early,
    write_spec,
)

EPILOG = """
Exit codes: 0 done; 1 what was asked failed (for `status`: something is not as it should be); 2 wrong usage;
130 Ctrl-C. `run` ends with 0 after Ctrl-C, and with 130 after the second, which waits for nothing.
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.version_option(package_name="serveit", prog_name="serveit")
def main() -> None:
    """Serve Python functions and models over HTTP and native handles."""


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


# -- an app of one's own -------------------------------------------------------------------------


@main.command()
@click.argument("target")
@click.option("--local", is_flag=True, help="In this process, without Ray.")
@click.option("--address", help="Of a Ray cluster to join; without it an embedded Ray is started.")
@click.option("--reload", is_flag=True, help="Serve the new code whenever a Python file here is saved.")
@serving_options
@timeout
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
)
@click.option("--fd", type=int, hidden=True, help="A listening socket that the parent made (--reload).")
@click.option("--ready-fd", type=int, hidden=True, help="Gets a byte once ready (--reload).")
@click.option("--parent-fd", type=int, hidden=True, help="At its end when the parent is gone (--reload).")
@click.option("--spec-fd", type=int, hidden=True, help="Gets what the app is to be, instead (--reload).")
def run(
    target: str,
    local: bool,
    address: str | None,
    reload: bool,
    name: str,
    prefix: str | None,
    timeout_s: float,
    log_level: str,
    fd: int | None,
    ready_fd: int | None,
    parent_fd: int | None,
    spec_fd: int | None,
    **http: Any,
) -> None:
    """Serve the app TARGET until Ctrl-C.

    TARGET is "module:app", or "module" or "path/to/file.py" that holds one app.
    """
    from serveit.logs import configure

    configure(log_level)
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # Ray passes on what its processes say, in colours
    options, prefix = http_options(**http), prefix or ""
    if local and address is not None:
        raise click.UsageError("--address is for Ray, and --local does without: give one of them")
    if reload and local:
        from serveit.command.reload import supervise

        sys.exit(supervise(target, options, passed_on(options, name, prefix, log_level)))
    if reload:
        from serveit.command.redeploy import follow

        given = ["--name", name, "--prefix", prefix, "--deploy-timeout", str(timeout_s)]
        follow(
            target,
            options if is_http_given() else None,
            [*given, "--log-level", log_level],
            name=name,
            address=address,
            log_level=log_level,
        )
        return
    if parent_fd is not None:
        end_with(parent_fd)
    with stopping_early(0):
        app = load(target, name, prefix)
        if spec_fd is not None:
            write_spec(app, spec_fd, name=name, prefix=prefix, deploy_timeout_s=timeout_s)
        else:
            serve(
                app,
                ready_fd,
                name=name,
                prefix=prefix,
                http=options if local or is_http_given() else None,
                local=local,
                address=address,
                deploy_timeout_s=timeout_s,
                sock=listening(fd),
                log_level=log_level,
            )
    leave()


@main.command()
@click.argument("target")
@serving_options
@timeout
@asking
def deploy(
    target: str, name: str, prefix: str | None, timeout_s: float, address: str, as_json: bool, **http: Any
) -> None:
    """Serve the app TARGET in a Ray cluster until it is deleted.

    Where no instance runs, one is started, with these HTTP options. An app of the same name is updated:
    its replicas are replaced without failing a request, and stay if the new ones do not come up.
    """
    from serveit.command import operating
    from serveit.command.progress import show_progress
    from serveit.command.reporting import routes_of, serving_lines

    options = http_options(**http)
    with stopping_early(operating.INTERRUPTED):
        app = load(target, name, prefix or "")
    with explained("the app cannot be deployed"), show_progress("connecting") as progress:
        spec, url = operating.deploy(
            app,
            address,
            name=name,
            prefix=prefix,
            timeout_s=timeout_s,
            http=options if is_http_given() else None,
            on_progress=progress.deploying,
        )
    counts, routes = {b.name: b.num_replicas for b in spec.backends}, routes_of([spec])
    if as_json:
        _print_json({"app": name, "url": url, "backends": counts, "routes": [r.as_data() for r in routes]})
    else:
        click.echo("\n".join(serving_lines(url, counts, routes)))


# -- what runs -----------------------------------------------------------------------------------


@main.command()
@click.argument("name", required=False)
@asking
def status(name: str | None, address: str, as_json: bool) -> None:
    """Show the apps, or the app NAME: replicas, requests, HTTP servers.

    Ends with 0 if every app is RUNNING with all its replicas, else with 1.
    """
    from serveit.command import operating
    from serveit.command.reporting import is_whole, status_lines

    with explained("there is no status"):
        told = operating.ask(lambda instance: operating.status(instance, name), address)
    if as_json:
        _print_json(told)
    else:
        click.echo("\n".join(status_lines(told)))
    sys.exit(0 if is_whole(told) else 1)


@main.command()
@asking
def routes(address: str, as_json: bool) -> None:
    """Show each path, its methods, and the backends that it leads to."""
    from serveit.command import operating
    from serveit.command.reporting import routes_lines

    with explained("there are no routes"):
        found = operating.ask(operating.routes, address)
    if as_json:
        _print_json([route.as_data() for route in found])
    else:
        click.echo("\n".join(routes_lines(found)))


# -- changes -------------------------------------------------------------------------------------


@main.command()
@click.argument(
    "numbers", metavar="BACKEND=N ...", nargs=-1, required=True, callback=pairs("BACKEND=N, v1=3", int)
)
@of_app
@timeout
@asking
def scale(
    numbers: dict[str, int], app_name: str, timeout_s: float | None, address: str, as_json: bool
) -> None:
    """Change numbers of replicas; ends when they are there."""
    from serveit.command import operating

    left = "the change may go on without this command: `serveit status` shows it"
    with explained("the backend cannot be scaled"):
        counts = operating.ask(
            lambda instance: operating.scale(instance, app_name, numbers, timeout_s),
            address,
            on_interrupt=left,
        )
    if as_json:
        _print_json({"app": app_name, "num_replicas": counts})
    else:
        click.echo("\n".join(f"{name}: {counts[name]} of {counts[name]} ready" for name in numbers))


@main.command()
@click.argument("endpoint")
@click.argument(
    "weights", metavar="[BACKEND=WEIGHT ...]", nargs=-1, callback=pairs("BACKEND=WEIGHT, v1=0.9", float)
)
@click.option(
    "--shadow",
    "shadows",
    metavar="BACKEND=FRACTION",
    multiple=True,
    callback=pairs("BACKEND=FRACTION, v3=0.1", float),
    help="Send copies of so many requests there; 0: none any more. May be given several times.",
)
@of_app
@asking
def traffic(
    endpoint: str,
    weights: dict[str, float],
    shadows: dict[str, float],
    app_name: str,
    address: str,
    as_json: bool,
) -> None:
    """Change the backends that ENDPOINT leads to: a route's name, or its path.

    The weights sum to 1: `serveit traffic /predict v1=0.9 v2=0.1`.
    """
    from serveit.command import operating

    if not weights and not shadows:
        raise click.UsageError("nothing to change: give weights, as v1=0.9 v2=0.1, or --shadow v3=0.1")
    with explained("the traffic cannot be changed"):
        changed = operating.ask(
            lambda instance: operating.traffic(instance, app_name, endpoint, weights, shadows), address
        )
    if as_json:
        _print_json(changed.as_data())
    else:
        click.echo(f"{changed.path or changed.endpoint}: {changed.leads_to}")


@main.command()
@click.argument("name")
@asking
def delete(name: str, address: str, as_json: bool) -> None:
    """End the app NAME: what it runs first. The last one's end is the instance's."""
    from serveit.command import operating

    left = f"{name} ends without this command"
    with explained("the app cannot be deleted"):
        operating.ask(lambda instance: operating.delete(instance, name), address, on_interrupt=left)
    if as_json:
        _print_json({"deleted": name})
    else:
        click.echo(f"{name} is deleted")


@main.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@asking
def shutdown(yes: bool, address: str, as_json: bool) -> None:
    """End all apps, what they run first, and the instance. Ray goes on."""
    from serveit.command import operating

    if not yes and not sys.stdin.isatty():
        raise click.UsageError("this ends all apps: without a terminal to ask on it needs --yes")
    with explained("the instance cannot be shut down"):
        names = operating.ask(operating.names, address)
        if not yes:
            click.confirm(
                f"End {', '.join(names) or 'the instance, which has no apps'}?", abort=True, err=True
            )
        operating.ask(operating.shutdown, address, on_interrupt="the instance ends without this command")
    if as_json:
        _print_json({"ended": names})
    else:
        click.echo(f"ended {', '.join(names)}" if names else "ended: there were no apps")
