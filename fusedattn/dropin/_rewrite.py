"""Patterns in graphs, and ``torch.compile`` with them."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

from fusedattn.dropin import _patterns_attention, _patterns_conditioning, _patterns_pooling
from fusedattn.dropin._core import compose
from fusedattn.dropin._graph import Graph
from fusedattn.dropin._report import GraphReport, Rewrite

Pattern = Callable[[Graph, fx.Node], Rewrite | None]

# In the order in which they are looked for: what a norm takes with it is no longer a layer's.
_PATTERNS = (
    _patterns_attention.rewrite,
    _patterns_pooling.rewrite,
    _patterns_conditioning.rewrite_norm,
    _patterns_conditioning.rewrite_layer,
)
# Where a compiler comes after, which makes one pass of what is elementwise itself: in fewer elements than these
# Inductor's code is as fast on the CPU, forward and in training (python -m benchmarks.compiled).
_COMPILED = (
    functools.partial(_patterns_attention.rewrite, least=1 << 15),
    functools.partial(_patterns_conditioning.rewrite_norm, least=1 << 19),
)


def rewrite(graph_module: fx.GraphModule, *example_inputs: Any) -> GraphReport:
    """Makes attention and conditioning in a traced graph fused, in place, whatever module it is in, and reports.

    Additive attention is ``softmax(activation(a + b) @ w) @ x`` in every way to write it, with scale, biases and
    masks of -inf; where more stands between, the scores ``activation(a + b) @ w`` alone. Gated pooling is
    ``softmax(tanh(a) * sigmoid(b) @ w) @ x``, or its scores alone. Conditioning is a norm that is scaled and
    shifted, or a layer, ``activation(n * (1 + s) + b) + r``, with the gated residual before the norm; an RMS norm
    may be written out. What else uses an intermediate result keeps it, and the pattern stays. Parameters and
    results are those before.

    Args:
        graph_module: of ``torch.fx.symbolic_trace``, of ``torch.export.export(...).module()``, in core ATen, too
            (``run_decompositions``), or what a backend of ``torch.compile`` is given. Shapes are read from its
            nodes.
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
    return GraphReport(tuple(_rewritten(graph_module, _PATTERNS)))


def _rewritten(graph_module: Any, patterns: tuple[Pattern, ...]) -> Iterator[Rewrite]:
    """What became of a graph, and of the parts of it that are checkpointed."""
    for node in graph_module.graph.nodes:
        if getattr(node.target, "__name__", "") == "tag_activation_checkpoint":
            yield from _rewritten(graph_module.get_submodule(node.args[0].target), patterns)
    graph = Graph(graph_module)
    compose(graph)
    for pattern in patterns:
        for node in list(graph.order):
            if node in graph.order and (found := pattern(graph, node)) is not None:
                yield found
    graph_module.graph.lint()
    graph_module.recompile()


def _propagate(graph_module: fx.GraphModule, example_inputs: tuple) -> None:
    """Notes the shape of every node."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    FakeTensorProp(graph_module, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*example_inputs)


def backend(
    inner: str | Callable = "inductor",
    report: Callable[[GraphReport], Any] | None = None,
    always: bool = False,
) -> Callable:
    """A backend of ``torch.compile`` that rewrites graphs as :func:`rewrite` does, for another one to compile.

    What Inductor does as well is left to it: layers without a norm, norms that are not scaled or shifted by a
    condition, and on the CPU what is small.

    Args:
        inner: the other one, as ``torch.compile`` takes it. Default: ``"inductor"``.
        report: is called with the report of every graph, e.g. ``print``. Default: None.
        always: also rewrite what Inductor does as well. Default: False.

    Returns:
        What ``torch.compile(model, backend=...)`` takes. ``fusedattn.dropin.inductor`` is ``backend()``.
    """

    patterns = _PATTERNS if always else _COMPILED

    def compile_fused(graph_module: fx.GraphModule, example_inputs: list, **kwargs: Any) -> Callable:
        found = GraphReport(tuple(_rewritten(graph_module, patterns)))
        if report is not None:
            report(found)
        return _compiler(inner, **kwargs)(graph_module, example_inputs)

    return compile_fused


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
