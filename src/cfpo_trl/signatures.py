"""Methods that take what another one takes, and show it."""

import inspect
from collections.abc import Callable
from typing import Any, ParamSpec

P = ParamSpec("P")


def like(original: Callable[P, Any]) -> Callable[[Callable[..., Any]], Callable[P, Any]]:
    """The decorated method shows the parameters of `original` to editors and to `inspect.signature`."""

    def decorate(method: Callable[..., Any]) -> Callable[P, Any]:
        method.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        return method

    return decorate
