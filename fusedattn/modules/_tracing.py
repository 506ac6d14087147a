"""torch.fx.symbolic_trace of modules whose way depends on sizes, which it cannot follow."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from torch import fx

Forward = TypeVar("Forward", bound=Callable[..., Any])


def recorded_whole(forward: Forward) -> Forward:
    """A forward whose module is one node of a model for torch.fx.symbolic_trace, as those of torch.nn are.

    By itself such a module cannot be traced: torch.export can.
    """

    @wraps(forward)
    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        proxy: Any = next((x for x in (*args, *kwargs.values()) if isinstance(x, fx.Proxy)), None)
        if proxy is None or self is proxy.tracer.root:
            return forward(self, *args, **kwargs)
        return proxy.tracer.create_proxy("call_module", proxy.tracer.path_of_module(self), args, kwargs)

    return recorded  # type: ignore[return-value]
