"""Patterns in graphs, and ``torch.compile`` with them."""

import functools
from collections.abc import Callable
from typing import Any

from torch import fx

from fusedattn.dropin import _patterns_attention, _patterns_conditioning
from fusedattn.dropin._graph import Graph
from fusedattn.dropin._report import GraphReport

# In the order in which they are looked for: what a norm takes with it is no longer a layer's.
_PATTERNS = (
    _patterns_attention.rewrite,
    _patterns_conditioning.rewrite_norm,
    _patterns_conditioning.rewrite_layer,
)


def rewrite(graph_module: fx.GraphModule, *example_inputs: Any) -> GraphReport:
    """Makes attention and conditioning in a traced graph fused, in place, whatever module it is in, and reports.

    Additive attention is ``softmax(activation(a + b) @ w) @ x`` in every way to write it, with scale and masks of
    -inf; where more stands between, the scores ``activation(a + b) @ w`` alone. Conditioning is a norm that is
    scaled and shifted, or a layer, ``activation(n * (1 + s) + b) + r``, with the gated residual before the norm.
    What else uses an intermediate result keeps it, and the pattern stays. Parameters and results are those before.

    Args:
        graph_module: of ``torch.fx.symbolic_trace``, of ``torch.export.export(...).module()``, or what a backend
            of ``torch.compile`` is given. Shapes are read from its nodes.
        example_inputs: of a graph whose nodes have no shapes, as that of ``symbolic_trace``. A size of 1 is taken
            for one that is always 1, other sizes may change from call to call.

    Returns:
        The report; ``print`` shows it.

    Raises:
        TypeError: ``graph_module`` is no ``torch.fx.GraphModule``.
        ValueError: its nodes have no shapes, and there are no example inputs.
    """
    if not isinstance(graph_module, fx.GraphModule):
        got = type(graph_module).__name__
        raise TypeError(f"rewrite: graph_module: expected a torch.fx.GraphModule, got {got}")
    if example_inputs:
        _propagate(graph_module, example_inputs)
    elif not any("example_value" in node.meta or "val" in node.meta for node in graph_module.graph.nodes):
        expected = "those of the graph, whose nodes have no shapes"
        raise ValueError(f"rewrite: example_inputs: expected {expected}, got none")
    graph = Graph(graph_module)
    found = [pattern(graph, node) for pattern in _PATTERNS for node in list(graph.order) if node in graph.order]
    graph_module.graph.lint()
    graph_module.recompile()
    return GraphReport(tuple(entry for entry in found if entry is not None))


def _propagate(graph_module: fx.GraphModule, example_inputs: tuple) -> None:
    """Notes the shape of every node."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    FakeTensorProp(graph_module, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*example_inputs)


def backend(inner: str | Callable = "inductor", report: Callable[[GraphReport], Any] | None = None) -> Callable:
    """A backend of ``torch.compile`` that rewrites graphs as :func:`rewrite` does, for another one to compile.

    Args:
        inner: the other one, as ``torch.compile`` takes it. Default: ``"inductor"``.
        report: is called with the report of every graph, e.g. ``print``. Default: None.

    Returns:
        What ``torch.compile(model, backend=...)`` takes. ``fusedattn.dropin.inductor`` is ``backend()``.
    """

    def fused(graph_module: fx.GraphModule, example_inputs: list, **kwargs: Any) -> Callable:
        found = rewrite(graph_module)
        if report is not None:
            report(found)
        return _compiler(inner, **kwargs)(graph_module, example_inputs)

    return fused


def _compiler(inner: str | Callable, mode: str | None = None, options: dict | None = None) -> Callable:
    """A backend of ``torch.compile`` as it is called, with what the user passed for it."""
    from torch import _dynamo, _inductor

    compiler: Any = _dynamo.lookup_backend(inner)
    if inner != "inductor":
        kwargs = {"mode": mode, "options": options}
        return functools.partial(compiler, **{name: value for name, value in kwargs.items() if value is not None})
    patches = {} if mode is None else _inductor.list_mode_options(mode)
    return functools.partial(compiler, config_patches={**patches, **(options or {})})


inductor = backend()
