"""Conditioning in a graph, under whatever name: what scales and shifts the result of a norm, or of a layer.

What is looked for, each part but the first and one more optional::

    h = r + g * x           what a transformer block adds before the next norm
    n = norm(h)             layer, RMS, group, instance or batch norm; or a linear layer, a convolution, a product
    z = n * (1 + s) + b     or n * s + b, with factors that are broadcast along n
    y = activation(z) + u

It becomes one call of ``norm_film``, or ``film`` where there is no norm. Each step is the only user of the one
before; h alone may have others, which get the h that the call returns. ``addcmul`` is a product and a sum, an RMS
norm may be written out, ``x * rsqrt(mean(x * x) + eps)``, and SiLU, too, ``z * sigmoid(z)``.
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fusedattn._conditioning import ACTIVATIONS
from fusedattn.dropin._calls import Call, Source
from fusedattn.dropin._graph import DISTURBED, SMALL, Graph, Labels, Miss
from fusedattn.dropin._modulate import FUSES
from fusedattn.dropin._report import Rewrite
from fusedattn.ops.film import film
from fusedattn.ops.norm_film import norm_film

_NORMS = {
    "layer_norm": "layer",
    "rms_norm": "rms",
    "group_norm": "group",
    "instance_norm": "instance",
    "batch_norm": "batch",
}
# Whose results are in memory before anything is done with them.
_LAYERS = ("linear", "matmul", "bmm", "conv1d", "conv2d", "conv3d", "scaled_dot_product_attention")
_OF_ROWS = ("layer", "rms")
_LAYER_FUSES = "scale, shift and what follows in one pass"


@dataclass
class _Chain:
    """What is done with the result of a norm or layer, ``start``, up to ``end``."""

    start: fx.Node
    channel: int
    end: fx.Node
    gamma: tuple[Source, Labels] | None = None
    offset: float = 0.0
    beta: tuple[Source, Labels] | None = None
    activation: str | None = None
    residual: Source | None = None
    nodes: list[fx.Node] = field(default_factory=list)
    passed: list[fx.Node] = field(default_factory=list)  # from factors and summands to what they are laid out from
    weight: tuple[Source, Labels] | None = None  # of an RMS norm that is written out
    before: list[fx.Node] = field(default_factory=list)  # the steps of that norm but the last one

    def sources(self) -> list[Source]:
        pairs = [pair[0] for pair in (self.gamma, self.beta, self.weight) if pair is not None]
        return pairs + ([] if self.residual is None else [self.residual])


def rewrite_norm(graph: Graph, node: fx.Node, least: int = 0) -> Rewrite | None:
    """What became of the norm at ``node``; None where nothing scales, shifts or activates it.

    ``least``: where a compiler comes after, the number of elements from which more than its own code is needed.
    """
    call = graph.call(node)
    before: list[fx.Node] = []
    if call is not None and call.name in ("mul", "div"):
        call, before = _written_out(graph, node, call)
    if call is None or call.name not in _NORMS or len(graph.shape(node)) < 2:
        return None
    norm = _NORMS[call.name]
    chain = _chain(graph, node, len(graph.shape(node)) - 1 if norm in _OF_ROWS else 1, before)
    if chain.gamma is None and chain.beta is None and (norm in _OF_ROWS or chain.activation is None or least):
        return None
    if graph.is_small(node, least):
        return Rewrite(graph.name(node), FUSES, False, SMALL)
    return _reported(graph, chain, FUSES, lambda: _replace_norm(graph, call, norm, chain))


def rewrite_layer(graph: Graph, node: fx.Node) -> Rewrite | None:
    """What became of the layer at ``node``; None where nothing scales it, channel by channel, and goes on."""
    call = graph.call(node)
    if call is None or call.name not in _LAYERS or len(graph.shape(node)) < 2:
        return None
    chain = _chain(graph, node, 1 if call.name.startswith("conv") else len(graph.shape(node)) - 1)
    if chain.gamma is None or len(chain.nodes) < 3 or not _is_of_channels(chain.gamma[1], chain):
        return None
    return _reported(graph, chain, _LAYER_FUSES, lambda: _replace_layer(graph, chain))


def _reported(graph: Graph, chain: _Chain, fuses: str, replace: Callable[[], None]) -> Rewrite:
    name = graph.name(chain.start)
    try:
        dtypes = {graph.value(node).dtype for node in chain.nodes}  # type: ignore[union-attr]
        if len(dtypes) > 1:
            raise Miss(f"its steps are of {' and '.join(sorted(map(str, dtypes)))}")
        if graph.is_disturbed([*chain.before, *chain.nodes, *chain.passed], chain.end):
            raise Miss(DISTURBED)
        replace()
        return Rewrite(name, fuses, True)
    except Miss as miss:
        return Rewrite(name, fuses, False, str(miss))


def _written_out(graph: Graph, node: fx.Node, call: Call) -> tuple[Call | None, list[fx.Node]]:
    """``x * rsqrt(mean(x * x, -1) + eps)``, or divided by the root, as an RMS norm; its steps before the last."""
    factors = [(call.input, call.get("other"))]
    if call.name == "mul":
        factors.append(factors[0][::-1])
    for x, root in factors:
        shape = graph.shape(x)
        rooted = _step(graph, root, "rsqrt" if call.name == "mul" else "sqrt")
        added = None if rooted is None else _step(graph, rooted.input, "add")
        if not shape or rooted is None or added is None or added.get("alpha", 1) != 1:
            continue
        mean, eps = added.input, added.get("other")
        if isinstance(mean, (int, float)):
            mean, eps = eps, mean
        averaged = _step(graph, mean, "mean")
        if averaged is None or not isinstance(eps, (int, float)) or averaged.get("dtype") is not None:
            continue
        dims, squared = averaged.get("dim"), _step(graph, averaged.input, "pow", "square", "mul")
        dims = list(dims) if isinstance(dims, (tuple, list)) else [dims]
        if squared is None or squared.input is not x or dims not in ([-1], [len(shape) - 1]):
            continue
        is_square = {"pow": squared.get("exponent") == 2, "mul": squared.get("other") is x}.get(squared.name, True)
        if is_square and averaged.get("keepdim"):
            made = {"input": x, "normalized_shape": shape[-1:], "eps": eps}
            return Call("rms_norm", made), [root, rooted.input, mean, averaged.input]
    return None, []


def _step(graph: Graph, node: Any, *names: str) -> Call | None:
    """The call of a node that computes one of these for one user."""
    call = graph.call(node)
    return call if call is not None and call.name in names and not call.in_place and len(node.users) == 1 else None


# What follows


def _chain(graph: Graph, start: fx.Node, channel: int, before: list[fx.Node] | None = None) -> _Chain:
    """The longest chain from a norm or layer."""
    labels, shape = graph.labels(start), graph.shape(start)
    chain = _Chain(start, channel, start, nodes=[start], before=before or [])
    while chain.residual is None:
        if (activated := _silu(graph, chain.end)) is not None and chain.activation is None:
            chain.activation = "silu"
            chain.nodes += activated
            chain.end = chain.nodes[-1]
            continue
        if len(chain.end.users) != 1:
            break
        user = next(iter(chain.end.users))
        call = graph.call(user)
        if call is None or graph.shape(user) != shape or (call.in_place and call.input is not chain.end):
            break
        if not _extend(graph, chain, call, labels):
            break
        chain.end = user
        chain.nodes.append(user)
    return chain


def _silu(graph: Graph, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The nodes of ``z * sigmoid(z)``, where nothing else uses z."""
    users = list(node.users)
    for sigmoid, product in (users, users[::-1]) if len(users) == 2 else ():
        first, last = graph.call(sigmoid), graph.call(product)
        if first is None or last is None or (first.name, last.name) != ("sigmoid", "mul"):
            continue
        operands = last.input, last.get("other")
        if not (first.in_place or last.in_place) and operands in ((node, sigmoid), (sigmoid, node)):
            return (sigmoid, product) if len(sigmoid.users) == 1 else None
    return None


def _extend(graph: Graph, chain: _Chain, call: Call, labels: Labels) -> bool:
    """Whether a call on the chain's end continues it; then it is noted what with."""
    if (activation := _activation(call)) is not None and chain.activation is None:
        chain.activation = activation
        return True
    if call.name == "addcmul":
        return _add_product(graph, chain, call, labels)
    if call.name not in ("mul", "add") or call.get("alpha", 1) != 1:
        return False
    a, b = call.input, call.get("other")
    return a is not b and _take(graph, chain, call.name, b if a is chain.end else a, labels)


def _add_product(graph: Graph, chain: _Chain, call: Call, labels: Labels) -> bool:
    """``_extend`` by a product and a sum in one call."""
    summand, factors = call.input, [call.get("tensor1"), call.get("tensor2")]
    if call.get("value", 1) != 1 or factors.count(chain.end) != 1 or summand is chain.end:
        return False
    kept = chain.gamma, chain.offset, chain.weight, len(chain.passed)
    if _take(graph, chain, "mul", factors[1 - factors.index(chain.end)], labels):
        if _take(graph, chain, "add", summand, labels):
            return True
        chain.gamma, chain.offset, chain.weight = kept[:3]
        del chain.passed[kept[3] :]
    return False


def _take(graph: Graph, chain: _Chain, name: str, other: Any, labels: Labels) -> bool:
    """Whether the chain can go on by a factor or summand; then it is noted."""
    value = graph.value(other)
    if value is None:
        return False
    along = graph.aligned(other, labels)
    if along is None:
        return False
    is_full = along == labels
    if name == "add" and is_full and not _is_expanded(graph, other, along):
        chain.residual = other
        return True
    if chain.activation is not None or chain.beta is not None:
        return False
    if name == "mul" and chain.gamma is not None:
        # The first factor of a norm that is written out may be its weight.
        of_weight = [label for label in chain.gamma[1] if label is not None]
        if not chain.before or chain.weight is not None or chain.offset or of_weight != [chain.channel]:
            return False
        chain.weight, chain.gamma = chain.gamma, None
    source, of_source, passed = graph.narrowed(other, along)
    if name == "mul":
        inner = graph.call(source)
        numbers = () if inner is None or inner.name != "add" else (inner.input, inner.get("other"))
        for one, scale in (numbers, numbers[::-1]) if numbers else ():
            if isinstance(one, (int, float)) and graph.value(scale) is not None:
                chain.offset = float(one)
                passed.append(source)
                source, of_source, more = graph.narrowed(scale, of_source)
                passed += more
                break
        chain.gamma = source, of_source
    else:
        chain.beta = source, of_source
    chain.passed += passed
    return True


def _is_expanded(graph: Graph, source: Source, along: Labels) -> bool:
    """Whether a tensor is a smaller one that was expanded."""
    return set(graph.narrowed(source, along)[1]) - {None} < set(along) - {None}


def _activation(call: Call) -> str | None:
    """The name that ``film`` has for an activation."""
    if call.name == "gelu":
        return "gelu_tanh" if call.get("approximate") == "tanh" else "gelu"
    if call.name == "leaky_relu" and call.get("negative_slope", 0.01) != 0.01:
        return None
    return call.name if call.name in ACTIVATIONS else None


def _is_of_channels(labels: Labels, chain: _Chain) -> bool:
    """Whether there is one value per channel, of each batch element or all."""
    return chain.channel in labels and set(labels) <= {None, 0, chain.channel}


# The calls


def _parameter(graph: Graph, pair: tuple[Source, Labels] | None, chain: _Chain) -> fx.Node | None:
    """A factor or summand as ``film`` takes it."""
    if pair is None:
        return None
    source, labels = pair
    have, channel = set(labels) - {None}, chain.channel
    rank = len(graph.shape(chain.start))
    wanted: Labels = tuple(range(rank))
    if have == {channel}:
        wanted = (channel,)
    elif have == {0, channel}:
        wanted = (0, channel)
    return graph.cast(source, graph.arranged(source, labels, wanted), chain.end)


def _place(graph: Graph, first: fx.Node, chain: _Chain, sources: list[Source]) -> fx.Node:
    """The first node of the chain before which all that it takes is there."""
    ready = max(graph.order.get(source, 0) for source in sources if isinstance(source, fx.Node))
    return first if ready < graph.order[first] else chain.end


def _options(graph: Graph, chain: _Chain) -> dict[str, Any]:
    options: dict[str, Any] = {"channel_dim": chain.channel}
    if chain.offset:
        options["gamma_offset"] = chain.offset
    if chain.activation is not None:
        options["activation"] = chain.activation
    if chain.residual is not None:
        options["residual"] = graph.cast(chain.residual, graph.node(chain.residual), chain.end)
    return options


def _replace_layer(graph: Graph, chain: _Chain) -> None:
    first = chain.nodes[1]
    with graph.module.graph.inserting_before(_place(graph, first, chain, [chain.start, *chain.sources()])):
        gamma, beta = _parameter(graph, chain.gamma, chain), _parameter(graph, chain.beta, chain)
        y = graph.add(film, chain.start, gamma, beta, **_options(graph, chain))
    graph.replace(chain.end, y)
    graph.erase([*chain.nodes[1:], *chain.passed])


def _norm_options(graph: Graph, call: Call, norm: str) -> dict[str, Any]:
    """What a norm has beside its input."""
    eps = graph.number(call.get("eps", None if norm == "rms" else 1e-5))
    if norm in _OF_ROWS and len(call.get("normalized_shape")) != 1:
        raise Miss("the norm is over several dimensions")
    if eps is None:
        raise Miss("the norm's eps depends on the dtype")
    if norm == "instance" and (call.get("running_mean") is not None or call.get("use_input_stats") in (False, 0)):
        raise Miss("the norm keeps running statistics")
    options: dict[str, Any] = {"norm": norm, "eps": eps}
    if norm == "group":
        options["num_groups"] = graph.number(call.get("num_groups"))
    if norm == "batch":
        running = {name: call.get(name) for name in ("running_mean", "running_var")}
        options |= {name: graph.node(t) for name, t in running.items() if t is not None}
        momentum = graph.number(call.get("momentum", 0.1))
        options |= {"training": bool(call.get("training", False)), "momentum": momentum}
    return options


def _formed(graph: Graph, call: Call, chain: _Chain) -> tuple[Source, Source, tuple[Source, Labels], list] | None:
    """(x, residual, gate, what computes it) where a norm's input is residual + gate * x."""
    h, shape = call.input, graph.shape(call.input)
    labels, added = graph.labels(h), graph.call(h)
    if added is None or added.in_place or added.get("alpha", 1) != 1 or graph.is_written(h):
        return None
    for residual, factors, made in _products(graph, added):
        for gate, x in (factors, factors[::-1]):
            along = graph.aligned(gate, labels)
            same = all(graph.value(t) is not None and graph.shape(t) == shape for t in (residual, x))
            if not same or along is None or along == labels or chain.channel not in along:
                continue
            source, of_source, passed = graph.narrowed(gate, along)
            if all(graph.value(t).dtype == graph.value(chain.end).dtype for t in (residual, x, h)):  # type: ignore[union-attr]
                return x, residual, (source, of_source), [*passed, *made, h]
    return None


def _products(graph: Graph, added: Call) -> Iterator[tuple[Any, tuple[Any, Any], list[fx.Node]]]:
    """(summand, factors of the other one, the nodes of that) of a sum."""
    if added.name == "addcmul" and added.get("value", 1) == 1:
        yield added.input, (added.get("tensor1"), added.get("tensor2")), []
    if added.name != "add":
        return
    for residual, scaled in ((added.input, added.get("other")), (added.get("other"), added.input)):
        product = graph.call(scaled)
        if product is not None and product.name == "mul" and not product.in_place and len(scaled.users) == 1:
            yield residual, (product.input, product.get("other")), [scaled]


def _replace_norm(graph: Graph, call: Call, norm: str, chain: _Chain) -> None:
    options = _norm_options(graph, call, norm)
    # What the call returns of h cannot be its residual.
    formed = None if chain.residual is call.input else _formed(graph, call, chain)
    pairs = [pair for pair in (chain.gamma, chain.beta, formed and formed[2]) if pair]
    if norm not in _OF_ROWS and not all(_is_of_channels(labels, chain) for _, labels in pairs):
        raise Miss("its scale, shift or gate has one value a place")
    affine = {name: call.get(name) for name in ("weight", "bias") if call.get(name) is not None}
    sources = [call.input, *chain.sources(), *affine.values()]
    place, others = _place(graph, chain.start, chain, sources), []
    if formed is not None:
        x, residual, gate, nodes = formed
        others = [user for user in call.input.users if user not in (chain.start, *chain.before)]
        early = _place(graph, nodes[-1], chain, [x, residual, gate[0], *sources[1:]])
        if any(graph.order[user] < graph.order[early] for user in others) or graph.is_disturbed(nodes, chain.end):
            formed, others = None, []
        else:
            place = early
    with graph.module.graph.inserting_before(place):
        gamma, beta = _parameter(graph, chain.gamma, chain), _parameter(graph, chain.beta, chain)
        options |= {name: graph.cast(t, graph.node(t), chain.end) for name, t in affine.items()}
        if chain.weight is not None:
            options["weight"] = _parameter(graph, chain.weight, chain)
        options |= _options(graph, chain)
        if formed is None:
            x = call.input
        else:
            options |= {"pre_residual": graph.node(residual), "pre_gate": _parameter(graph, gate, chain)}
        x = graph.cast(x, graph.node(x), chain.end)
        result = graph.add(norm_film, x, gamma, beta, **options)
        y = result if formed is None else graph.add(operator.getitem, result, 0)
        h = graph.add(operator.getitem, result, 1) if others else None
    graph.replace(chain.end, y)
    graph.erase([*chain.before, *chain.nodes, *chain.passed])
    if formed is not None:
        if h is not None:
            graph.replace(call.input, h)
        graph.erase(nodes)
