"""The app: the value that decorators register into. Nothing starts when it is built or imported."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, overload

from serveit.config import BackendConfig, did_you_mean
from serveit.context import resolve
from serveit.declare.backend import (
    Backend,
    BackendRecord,
    BatchBackend,
    find_backend,
    make_backend,
    registered_already,
)
from serveit.declare.fitting import check_fit
from serveit.declare.route import Route, check_methods, endpoint_name, refuse_equal
from serveit.declare.routing import compile_pattern
from serveit.declare.target import check_kind, choose_name, describe
from serveit.declare.traffic import parse_traffic
from serveit.types import DEFAULT_METHOD

if TYPE_CHECKING:
    from typing import Literal, ParamSpec

    from serveit.calling.handle import Handle
    from serveit.calling.sync import SyncHandle
    from serveit.declare.decorators import (
        AsyncBatchModel,
        AsyncMethod,
        AsyncModel,
        BackendDecorator,
        BackendOptions,
        BatchDecorator,
        BatchModel,
        Method,
        Model,
        RouteDecorator,
        Served,
    )
    from serveit.declare.routing import Pattern

    P = ParamSpec("P")
    R = TypeVar("R")
    A = TypeVar("A")
    B = TypeVar("B")
    C = TypeVar("C", bound=type[Any])


class App:
    """Backends and the routes that lead to them.

    ```python
    app = App()

    @app.route("/api/<user_id:int>")
    @app.backend(num_replicas=2)
    async def user(user_id: int, verbose: bool = False) -> dict:
        return {"id": user_id, "verbose": verbose}
    ```
    """

    def __init__(self) -> None:
        self.backends: dict[str, BackendRecord] = {}
        self.routes: list[Route] = []

    def __repr__(self) -> str:
        return (
            f"<App backends={sorted(self.backends)} routes={[route.pattern.text for route in self.routes]}>"
        )

    # -- backends ----------------------------------------------------------------------------

    @overload
    def backend(  # type: ignore[overload-overlap]
        self,
        target: C,
        /,
        *,
        name: str | None = None,
        init_args: Sequence[Any] = (),
        init_kwargs: Mapping[str, Any] | None = None,
        config: BackendConfig | None = None,
        max_batch_size: int | None = None,
        **options: Unpack[BackendOptions],
    ) -> C: ...
    @overload
    def backend(
        self,
        target: str,
        /,
        *,
        name: str,
        init_args: Sequence[Any] = (),
        init_kwargs: Mapping[str, Any] | None = None,
        config: BackendConfig | None = None,
        max_batch_size: int | None = None,
        **options: Unpack[BackendOptions],
    ) -> Backend[..., Any]: ...
    @overload
    def backend(
        self,
        target: Callable[[list[A]], Coroutine[Any, Any, Sequence[B]]],
        /,
        *,
        max_batch_size: int,
        name: str | None = None,
        **options: Unpack[BackendOptions],
    ) -> BatchBackend[A, B, Coroutine[Any, Any, Sequence[B]]]: ...
    @overload
    def backend(
        self,
        target: Callable[[list[A]], Sequence[B]],
        /,
        *,
        max_batch_size: int,
        name: str | None = None,
        **options: Unpack[BackendOptions],
    ) -> BatchBackend[A, B, Sequence[B]]: ...
    @overload
    def backend(
        self,
        target: Callable[P, R],
        /,
        *,
        name: str | None = None,
        config: BackendConfig | None = None,
        **options: Unpack[BackendOptions],
    ) -> Backend[P, R]: ...
    @overload
    def backend(
        self,
        target: None = None,
        /,
        *,
        max_batch_size: int,
        name: str | None = None,
        init_args: Sequence[Any] = (),
        init_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[BackendOptions],
    ) -> BatchDecorator: ...
    @overload
    def backend(
        self,
        target: None = None,
        /,
        *,
        name: str | None = None,
        init_args: Sequence[Any] = (),
        init_kwargs: Mapping[str, Any] | None = None,
        config: BackendConfig | None = None,
        max_batch_size: None = None,
        **options: Unpack[BackendOptions],
    ) -> BackendDecorator: ...
    def backend(
        self,
        target: Any = None,
        /,
        *,
        name: str | None = None,
        init_args: Sequence[Any] = (),
        init_kwargs: Mapping[str, Any] | None = None,
        config: BackendConfig | None = None,
        **options: Any,
    ) -> Any:
        """Register a function or class; a decorator with or without arguments, or the plain form.

        Args:
            target: a function, a class, or "package.module:attribute", which only replicas import.
            name: the backend's name; by default the function's or class's own.
            init_args: positional arguments of the class.
            init_kwargs: keyword arguments of the class.
            config: a whole `BackendConfig` in place of `options`.
            options: fields of `BackendConfig`.

        Returns:
            The class itself; for a function or import string its `Backend`.

        Raises:
            TypeError: an unknown option, or a target or option that does not fit.
            ValueError: a value out of range, or a name that is taken.
        """
        settings = BackendConfig.from_options(config, options)

        def register(target: Any) -> Any:
            record = self._register(target, name, settings, init_args, init_kwargs)
            return target if inspect.isclass(target) else record

        return register if target is None else register(target)

    def _register(
        self,
        target: Any,
        name: str | None,
        config: BackendConfig,
        init_args: Sequence[Any],
        init_kwargs: Mapping[str, Any] | None,
    ) -> BackendRecord:
        if isinstance(target, BackendRecord):
            raise registered_already(target, self)
        check_kind(target, "@app.backend")
        chosen = choose_name(target, name, "app.backend")
        self._refuse_taken(chosen, target)
        record = self.backends[chosen] = make_backend(self, target, chosen, config, init_args, init_kwargs)
        return record

    def _refuse_taken(self, name: str, target: Any) -> None:
        taken = self.backends.get(name)
        if taken is not None:
            hint = "give the second one another name="
            if taken.target is target and inspect.isclass(target):
                hint = f"write @app.route above @app.backend, or {hint}"
            raise ValueError(f"there is a backend {name!r} already ({describe(taken.target)}): {hint}")
        if any(route.name == name for route in self.routes):
            raise ValueError(f"{name!r} is the name of a route already: give the backend another name=")

    # -- routes ------------------------------------------------------------------------------

    def route(
        self, path: str, *, methods: Collection[str] = ("GET",), name: str | None = None
    ) -> RouteDecorator:
        """Decorate a backend, or a bare function or class, which then becomes one with defaults.

        Args:
            path: the pattern, "/api/<user_id:int>" or "/api/{user_id:int}"; convertors are
                Starlette's: str, int, float, path, uuid and those registered with it.
            methods: HTTP methods; GET brings HEAD.
            name: of the endpoint; by default the path.
        """
        if not isinstance(path, str):
            raise TypeError(f'write @app.route("/path") with the path in brackets, got {path!r}')
        check_methods(methods, f"route {path!r}")

        def register(target: Any) -> Any:
            if isinstance(target, BackendRecord):
                self.add_route(path, target, methods=methods, name=name)
                return target
            check_kind(target, "@app.route")
            found = self._find(target, "@app.route")
            record = found[0] if found else self._register(target, None, BackendConfig(), (), None)
            try:
                self.add_route(path, target, methods=methods, name=name)
            except BaseException:
                if found is None:
                    del self.backends[record.name]
                raise
            return target if inspect.isclass(target) else record

        return register

    def add_route(
        self,
        path: str,
        target: Any = None,
        *,
        methods: Collection[str] = ("GET",),
        name: str | None = None,
        traffic: Mapping[str, float] | None = None,
        shadow: Mapping[str, float] | None = None,
        method_name: str | None = None,
    ) -> None:
        """Lead a path to a backend, to a method of one, or to several by weight.

        Args:
            path: the pattern; see `route`.
            target: a backend: its name, its function or class (of which the first registered one
                is meant), or a method of its class.
            methods: HTTP methods; GET brings HEAD.
            name: of the endpoint; by default the path.
            traffic: backend name to weight, in place of `target`; the weights sum to 1.
            shadow: backend name to the share of requests that it gets a copy of.
            method_name: the method of the backends' classes to call, where `target` is none itself.

        Raises:
            TypeError: the function does not fit the route; the text says which parameter and why.
            ValueError: a bad pattern, an equal route, weights that do not sum to 1, unknown names.
        """
        where = f"route {path!r}"
        pattern = compile_pattern(path)
        allowed = check_methods(methods, where)
        if (target is None) == (traffic is None):
            raise TypeError(f"{where}: give either a backend or traffic={{name: weight}}")
        called = method_name or DEFAULT_METHOD
        if traffic is None:
            record, found = self._lookup(target, where)
            if method_name is not None and found != DEFAULT_METHOD:
                raise TypeError(f"{where}: {describe(target)} is a method itself: leave method_name= out")
            called = called if found == DEFAULT_METHOD else found
            traffic = {record.name: 1.0}
        table = parse_traffic(traffic, shadow, self.backends, where)
        for backend_name in sorted({*dict(table.weights), *dict(table.shadows)}):
            self._check_binding(backend_name, called, pattern, allowed, where)
        refuse_equal(pattern, allowed, self.routes, where)
        taken = {*self.backends, *(route.name for route in self.routes)}
        endpoint = endpoint_name(name, pattern, allowed, taken, where)
        self.routes.append(Route(endpoint, pattern, allowed, table, called))

    def _check_binding(
        self, backend: str, method_name: str, pattern: Pattern, methods: tuple[str, ...], where: str
    ) -> None:
        record = self.backends[backend]
        if getattr(record.target, "__name__", None) != backend:
            where = f"{where}, backend {backend!r}"
        check_fit(record, method_name, pattern, methods, where)

    # -- looking things up -------------------------------------------------------------------

    @overload
    def handle(self, target: Served[P, R], *, sync: Literal[False] = ...) -> Handle[P, R]: ...
    @overload
    def handle(
        self, target: type[AsyncBatchModel[A, B]], *, sync: Literal[False] = ...
    ) -> Handle[[A], B]: ...
    @overload
    def handle(self, target: type[BatchModel[A, B]], *, sync: Literal[False] = ...) -> Handle[[A], B]: ...
    @overload
    def handle(self, target: type[AsyncModel[P, R]], *, sync: Literal[False] = ...) -> Handle[P, R]: ...
    @overload
    def handle(self, target: type[Model[P, R]], *, sync: Literal[False] = ...) -> Handle[P, R]: ...
    @overload
    def handle(self, target: type[Any] | str, *, sync: Literal[False] = ...) -> Handle[..., Any]: ...
    @overload
    def handle(self, target: AsyncMethod[P, R], *, sync: Literal[False] = ...) -> Handle[P, R]: ...
    @overload
    def handle(self, target: Method[P, R], *, sync: Literal[False] = ...) -> Handle[P, R]: ...
    @overload
    def handle(self, target: Served[P, R], *, sync: Literal[True]) -> SyncHandle[P, R]: ...
    @overload
    def handle(self, target: type[AsyncBatchModel[A, B]], *, sync: Literal[True]) -> SyncHandle[[A], B]: ...
    @overload
    def handle(self, target: type[BatchModel[A, B]], *, sync: Literal[True]) -> SyncHandle[[A], B]: ...
    @overload
    def handle(self, target: type[AsyncModel[P, R]], *, sync: Literal[True]) -> SyncHandle[P, R]: ...
    @overload
    def handle(self, target: type[Model[P, R]], *, sync: Literal[True]) -> SyncHandle[P, R]: ...
    @overload
    def handle(self, target: type[Any] | str, *, sync: Literal[True]) -> SyncHandle[..., Any]: ...
    @overload
    def handle(self, target: AsyncMethod[P, R], *, sync: Literal[True]) -> SyncHandle[P, R]: ...
    @overload
    def handle(self, target: Method[P, R], *, sync: Literal[True]) -> SyncHandle[P, R]: ...
    def handle(self, target: Any, *, sync: bool = False) -> Any:
        """The handle on a backend or endpoint of this app, for code that runs where the app is served.

        Args:
            target: a backend's class, function or name, a method of its class, or a route's name.
            sync: the blocking handle, for threads without an event loop.

        Raises:
            NotServing: nothing runs.
            KeyError: no backend or endpoint of that name.
            TypeError: a function or class that is no backend of this app.
        """
        if isinstance(target, str):
            return resolve(self, target, sync=sync)
        record, method_name = self._lookup(target, "app.handle")
        handle = resolve(self, record.name, sync=sync)
        return handle if method_name == DEFAULT_METHOD else handle.options(method_name=method_name)

    def _lookup(self, target: Any, where: str) -> tuple[BackendRecord, str]:
        """The backend, and the name of its method, that `target` means."""
        if isinstance(target, str):
            record = self.backends.get(target)
            if record is None:
                raise ValueError(
                    f"{where}: no backend {target!r}: {did_you_mean(target, list(self.backends))}"
                )
            return record, DEFAULT_METHOD
        found = self._find(target, where)
        if found is None:
            if isinstance(target, BackendRecord):
                raise TypeError(
                    f"{where}: {describe(target.target)} is a backend of another app: "
                    "the route and the backend belong to the same one"
                )
            raise TypeError(
                f"{where}: {describe(target)} is no backend of this app: "
                "put @app.backend on it (on its class, for a method)"
            )
        return found

    def _find(self, target: Any, where: str) -> tuple[BackendRecord, str] | None:
        return find_backend(self.backends, target, where)
