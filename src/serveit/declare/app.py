"""The app: the value that decorators register into. Nothing starts when it is built or imported."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, overload

from serveit.config import BackendConfig, did_you_mean
from serveit.context import resolve
from serveit.declare.backend import (
    LIFECYCLE,
    Backend,
    BackendOptions,
    BackendRecord,
    BatchBackend,
    check_name,
    describe,
)
from serveit.declare.binding import plan_binding
from serveit.declare.route import Route, check_methods
from serveit.declare.routing import compile_pattern
from serveit.declare.traffic import parse_traffic
from serveit.types import DEFAULT_METHOD

if TYPE_CHECKING:
    from typing import Literal, ParamSpec

    from serveit.calling.handle import Handle
    from serveit.calling.sync import SyncHandle
    from serveit.declare.decorators import BackendDecorator, BatchDecorator, RouteDecorator
    from serveit.declare.routing import Pattern

    P = ParamSpec("P")
    R = TypeVar("R")
    A = TypeVar("A")
    B = TypeVar("B")
    C = TypeVar("C", bound=type[Any])
    S = TypeVar("S")


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
            return self._register(target, name, settings, init_args, init_kwargs)

        return register if target is None else register(target)

    def _register(
        self,
        target: Any,
        name: str | None,
        config: BackendConfig,
        init_args: Sequence[Any],
        init_kwargs: Mapping[str, Any] | None,
    ) -> Any:
        if isinstance(target, BackendRecord):
            if any(target.name in dict(route.traffic.weights) for route in target.app.routes):
                raise TypeError(
                    f"write @app.route above @app.backend, not below it ({describe(target.target)})"
                )
            raise TypeError(f"{describe(target.target)} is backend {target.name!r} already")
        _refuse_class_body(target, "@app.backend")
        if isinstance(target, str) and name is None:
            raise TypeError(f"app.backend({target!r}) needs name=: the target is imported by replicas only")
        chosen = check_name(
            name if name is not None else getattr(target, "__name__", repr(target)), "app.backend"
        )
        self._refuse_taken(chosen, target)
        record: BackendRecord
        if inspect.isclass(target):
            record = BackendRecord(self, target, chosen, config, init_args, init_kwargs)
        elif isinstance(target, str):
            record = Backend(self, target, chosen, config)
            record.init_args, record.init_kwargs = tuple(init_args), dict(init_kwargs or {})
        elif init_args or init_kwargs:
            raise TypeError(f"init_args and init_kwargs are for classes; {describe(target)} is a function")
        else:
            record = (Backend if config.max_batch_size is None else BatchBackend)(
                self, target, chosen, config
            )
        self.backends[chosen] = record
        return target if inspect.isclass(target) else record

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

        def register(target: Any) -> Any:
            _refuse_class_body(target, "@app.route")
            if not isinstance(target, BackendRecord) and self._find(target) is None:
                target = self.backend(target)
            self.add_route(path, target, methods=methods, name=name)
            return target

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
    ) -> None:
        """Lead a path to a backend, to a method of one, or to several by weight.

        Args:
            path: the pattern; see `route`.
            target: a backend: its function, class, name, or a method of its class.
            methods: HTTP methods; GET brings HEAD.
            name: of the endpoint; by default the path.
            traffic: backend name to weight, in place of `target`; the weights sum to 1.
            shadow: backend name to the share of requests that it gets a copy of.

        Raises:
            TypeError: the function does not fit the route; the text says which parameter and why.
            ValueError: a bad pattern, an equal route, weights that do not sum to 1, unknown names.
        """
        where = f"route {path!r}"
        pattern = compile_pattern(path)
        allowed = check_methods(methods, where)
        if (target is None) == (traffic is None):
            raise TypeError(f"{where}: give either a backend or traffic={{name: weight}}")
        method_name = DEFAULT_METHOD
        if traffic is None:
            record, method_name = self._lookup(target, where)
            traffic = {record.name: 1.0}
        table = parse_traffic(traffic, shadow, self.backends, where)
        for backend_name in {*dict(table.weights), *dict(table.shadows)}:
            self._check_binding(backend_name, method_name, pattern, allowed, where)
        self._refuse_equal(pattern, allowed, where)
        endpoint = self._endpoint_name(name, pattern, allowed, where)
        self.routes.append(Route(endpoint, pattern, allowed, table, method_name))

    def _check_binding(
        self, backend: str, method_name: str, pattern: Pattern, methods: tuple[str, ...], where: str
    ) -> None:
        record = self.backends[backend]
        if isinstance(record.target, str):
            return  # decided when a replica has imported it
        try:
            method = record.method(method_name)
        except AttributeError as error:
            raise TypeError(f"{where}: {error}") from None
        plan_binding(
            method.function,
            pattern=pattern,
            methods=methods,
            batch=method.is_batch,
            drop_first=method.of_class,
            where=f"{where}, {describe(method.function)}",
        )

    def _refuse_equal(self, pattern: Pattern, methods: tuple[str, ...], where: str) -> None:
        for route in self.routes:
            shared = sorted(set(route.methods) & set(methods))
            if route.pattern.shape == pattern.shape and shared:
                raise ValueError(
                    f"{where} is equal to {route.pattern.text!r}, which takes {', '.join(shared)} already"
                )

    def _endpoint_name(self, name: str | None, pattern: Pattern, methods: tuple[str, ...], where: str) -> str:
        taken = {route.name for route in self.routes}
        if name is None:
            # A second route on the same path has other methods: they tell the two apart.
            return pattern.text if pattern.text not in taken else f"{','.join(methods)} {pattern.text}"
        if not isinstance(name, str) or not name:
            raise TypeError(f"{where}: name must be a non-empty str, got {name!r}")
        if name in taken or name in self.backends:
            raise ValueError(f"{where}: the name {name!r} is taken by another route or backend")
        return name

    # -- looking things up -------------------------------------------------------------------

    @overload
    def handle(self, target: Backend[P, Coroutine[Any, Any, R]]) -> Handle[P, R]: ...
    @overload
    def handle(self, target: Backend[P, R]) -> Handle[P, R]: ...
    @overload
    def handle(self, target: BatchBackend[A, B, Any]) -> Handle[[A], B]: ...
    @overload
    def handle(self, target: Any, *, sync: Literal[False] = False) -> Handle[..., Any]: ...
    @overload
    def handle(self, target: Any, *, sync: Literal[True]) -> SyncHandle[..., Any]: ...
    def handle(self, target: Any, *, sync: bool = False) -> Any:
        """The handle on a backend or endpoint of this app, for code that runs where the app is served.

        Args:
            target: a backend's class, function or name, a method of its class, or a route's name.
            sync: the blocking handle, for threads without an event loop.

        Raises:
            NotServing: nothing runs.
            KeyError: no backend or endpoint of that name.
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
        found = self._find(target)
        if found is None:
            raise TypeError(
                f"{where}: {describe(getattr(target, 'target', target))} is no backend of this app: "
                "put @app.backend on it (on its class, for a method)"
            )
        return found

    def _find(self, target: Any) -> tuple[BackendRecord, str] | None:
        for record in self.backends.values():
            if record is target or (record.target is target and inspect.isclass(target)):
                return record, DEFAULT_METHOD
        name = getattr(target, "__name__", "")
        for record in self.backends.values():
            if inspect.isclass(record.target) and name not in ("", *LIFECYCLE):
                if getattr(record.target, name, None) is target:
                    return record, name
        return None


def _refuse_class_body(target: Any, decorator: str) -> None:
    """A function defined in a class body cannot be served: there is no instance to call it on."""
    outer, _, _ = getattr(target, "__qualname__", "").rpartition(".")
    if inspect.isfunction(target) and outer and not outer.endswith("<locals>"):
        raise TypeError(
            f"{decorator} on the method {target.__qualname__}: put @app.backend on the class and lead a path "
            f'to the method with app.add_route("/path", {outer.rpartition(".")[2]}.{target.__name__})'
        )
