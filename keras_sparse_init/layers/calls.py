"""Calls that a layer passes on to the layer inside it."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any


class Lock:
    """A reentrant lock; a copy of a layer has one of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: Any) -> None:
        self._lock.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> Lock:
        return Lock()


def call_with_arguments_of(layer: Any) -> Callable[..., Any]:
    """The method `call` of a wrapper, which has the arguments of the wrapped layer's."""
    signature = inspect.signature(layer.call)
    names = positional_names(layer.call)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The wrapped layer's output on its effective kernels."""
        args, kwargs = all_but_first_by_name(names, args, kwargs)
        with self._effective_kernels():
            return self.layer(*args, **kwargs)

    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    call.__signature__ = signature.replace(parameters=[itself, *signature.parameters.values()])
    return call


def positional_names(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments that a function takes by position."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def all_but_first_by_name(names: list[str], args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """Arguments of a call: some layers of tf_keras take positional ones in another order than their method `call`."""
    if len(args) > len(names):
        return args, kwargs
    return args[:1], {**dict(zip(names[1:], args[1:], strict=False)), **kwargs}
