"""Additive attention in a graph, under whatever name: ``activation(a + b) @ w``, or all of ``softmax(...) @ x``.

What is looked for::

    z = a + b + ...         summands with fewer dimensions than z: expanded, or of a layer over a concatenation
    e = activation(z) @ w   as a linear layer to one output, matmul, bmm, einsum, (w * activation(z)).sum(-1)
    p = softmax(e)          with scale, biases and masks before it, in this order
    c = p @ x               as matmul, bmm, einsum, (p[..., None] * x).sum(1)

Summands that vary along the keys, the dimension of the softmax, make the key, the others the query; what both have
is the batch, or heads. The scores alone are exact whatever follows: dropout, finite fills and other normalisers
stay as they are. Where nothing but scale, biases and masks of -inf stands between them and a softmax whose weights
are multiplied with values, all of it becomes one call.
"""

import math
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

from fusedattn.dropin._calls import Call, Source
from fusedattn.dropin._graph import DISTURBED, SMALL, Carried, Graph, Labels, Miss, New, only_user
from fusedattn.dropin._report import Rewrite
from fusedattn.dropin._scores import ATTENTION, NAN_ROWS, SCORES
from fusedattn.ops.additive_attention import additive_attention
from fusedattn.ops.additive_scores import additive_scores

_ACTIVATIONS = ("tanh", "sigmoid", "relu", "leaky_relu")
_INPUT = "input"  # the label of what a layer over a concatenation sums over


class _Summand(NamedTuple):
    """Of what the activation takes: a tensor, or ``source @ weight[:, columns].T``, which has ``labels`` then."""

    source: Source
    labels: Labels
    weight: Source | None = None
    columns: slice | None = None


class Rows(NamedTuple):
    """What is between the scores and their softmax; ``obstacle``: what of it additive attention has not."""

    softmax: fx.Node
    labels: Labels
    column: Any
    nodes: tuple[fx.Node, ...]
    scale: float
    biases: tuple[tuple[Source, Labels], ...]
    masks: tuple[tuple[Source, Labels, bool], ...]  # and whether True hides a key
    obstacle: str


class _Scores(NamedTuple):
    """What the scores are made of. Labels: ``lead`` of batch and heads, ``row`` of queries, ``column`` of keys."""

    product: Carried
    query: list[_Summand]
    key: list[_Summand]
    weight_labels: Labels
    lead: Labels
    row: Any
    column: Any
    options: dict[str, Any]
    nodes: set[fx.Node]  # that go with them
    rows: Rows | None

    @property
    def node(self) -> fx.Node:
        return self.product.product.node

    @property
    def labels(self) -> Labels:
        return (*self.lead, self.row, self.column)

    def sources(self) -> Iterator[Source]:
        yield from (s.source for s in (*self.query, *self.key))
        yield from (s.weight for s in (*self.query, *self.key) if s.weight is not None)
        yield self.product.other
        if self.product.product.bias is not None:
            yield self.product.product.bias


def rewrite(graph: Graph, node: fx.Node, least: int = 0) -> Rewrite | None:
    """What became of the activation at ``node``; None where it is in nothing like additive attention.

    ``least``: where a compiler comes after, the number of elements from which more than its own code is needed.
    """
    call = graph.call(node)
    if call is None or call.name not in _ACTIVATIONS or graph.value(node) is None:
        return None
    chain, labels = [node], graph.labels(node)
    while (product := graph.carried(chain[-1], labels)) is None:
        user = only_user(chain[-1])
        after = None if user is None else graph.through(user, labels)
        if user is None or after is None:
            return None
        chain, labels = [*chain, user], after
    if not _is_weight(product):
        return None
    name = graph.name(product.product.node)
    try:
        found = _read(graph, call, chain, product)
        if found is None:
            return None
        if graph.is_small(node, least):
            raise Miss(SMALL)
        reason = _replace_all(graph, found)
        if reason:
            _replace_scores(graph, found)
            return Rewrite(name, SCORES, True, f"these alone: {reason}")
        return Rewrite(
            name,
            ATTENTION,
            True,
            limits=NAN_ROWS if found.rows and (found.rows.biases or found.rows.masks) else "",
        )
    except Miss as miss:
        return Rewrite(name, SCORES, False, str(miss))


def _is_weight(product: Carried) -> bool:
    """Whether the other operand has one value for each channel, or each of each head."""
    labels = [label for label in product.other_labels if label is not None]
    return len(labels) <= 2 and not any(isinstance(label, New) for label in labels)


# Scores


def _read(graph: Graph, call: Call, chain: list[fx.Node], product: Carried) -> _Scores | None:
    """What scores are made of; None where nothing would be gained."""
    node, channel, scores = chain[0], product.summed, product.product.node
    labels = graph.labels(node)
    nodes = {*chain, *product.product.nodes}
    weight, weight_labels, passed = graph.narrowed(product.other, product.other_labels)
    nodes |= set(passed)
    product = product._replace(other=weight)
    summands = _summands(graph, call.input, labels, channel, nodes)
    rows = to_softmax(graph, scores, product.result)
    kinds = [{channel if label == _INPUT else label for label in s.labels} - {None} for s in summands]

    def split(column):
        """(query, key, the labels of each, those that the query alone has), by the dimension of keys."""
        parts = [[n for n, kind in enumerate(kinds) if (column in kind) is keys] for keys in (False, True)]
        of_query, of_key = (set().union(*(kinds[n] for n in part)) for part in parts)
        query, key = ([summands[n] for n in part] for part in parts)
        return query, key, of_query, of_key, of_query - of_key

    columns = [label for label in reversed(product.result) if label is not None] if rows is None else [rows.column]
    splits = [(column, *split(column)) for column in columns]
    # Without a softmax there is something to gain if every query meets every key.
    splits = [s for s in splits if s[1] and s[2] and channel in s[3] & s[4] and (rows is not None or s[5])]
    if not splits:
        if rows is None:
            return None
        used = isinstance(call.input, fx.Node) and len(call.input.users) > 1
        raise Miss(
            f"the argument of {call.name} is used elsewhere, too"
            if used
            else f"{call.name} is not taken of the sum of a part for each key and one that keys share"
        )
    column, query, key, *_, own = splits[0]
    if any(len(n.users) > 1 for n in (*chain, *product.product.nodes[:-1])):
        raise Miss(f"the result of {call.name} is used elsewhere, too")
    heads = [label for label in weight_labels if label not in (None, channel)]
    row = next((label for label in reversed(labels) if label in own - set(heads)), None)
    lead = [label for label in labels if label not in (None, channel, row, column, *heads)] + heads
    if len(lead) > 2 or column in heads:
        raise Miss("more dimensions than those of batch, heads, queries, keys and channels")
    if graph.is_disturbed(nodes, scores):
        raise Miss(DISTURBED)
    dtype: Any = graph.value(scores)
    autocast = graph.autocast_dtype(node)
    if not dtype.is_floating_point() or (autocast is not None and dtype.dtype not in (autocast, torch.float64)):
        raise Miss(f"scores of {dtype.dtype}{'' if autocast is None else f' under autocast to {autocast}'}")
    options = {} if call.name == "tanh" else {"activation": call.name}
    if call.name == "leaky_relu":
        options["negative_slope"] = graph.number(call.get("negative_slope", 0.01))
    leading = (None,) * (max(1, 2 * len(heads)) - len(lead)) + tuple(lead)
    return _Scores(product, query, key, weight_labels, leading, row, column, options, nodes, rows)


def _summands(graph: Graph, source: Any, labels: Labels, channel: Any, nodes: set[fx.Node]) -> list[_Summand]:
    """Those of a sum with these labels; nodes that are only theirs, and those looked through, are noted."""
    narrow, narrow_labels, passed = graph.narrowed(source, labels)
    call = graph.call(narrow)
    is_own = all(len(n.users) == 1 for n in (*passed, narrow) if isinstance(n, fx.Node))
    if call is not None and is_own and not call.in_place:
        if call.name == "add" and call.get("alpha", 1) == 1:
            operands = call.input, call.get("other")
            along = [graph.aligned(operand, narrow_labels) for operand in operands]
            if None not in along:
                nodes |= {*passed, narrow}
                parts: Any = zip(operands, along, strict=True)
                return [s for operand, a in parts for s in _summands(graph, operand, a, channel, nodes)]
        if call.name == "linear" and narrow_labels[-1] == channel and channel is not None:
            found = _of_concatenation(graph, call, narrow_labels, nodes)
            if found:
                nodes |= {*passed, narrow}
                return found
    nodes |= set(passed)
    return [_Summand(narrow, narrow_labels)]


def _of_concatenation(graph: Graph, linear: Call, labels: Labels, nodes: set[fx.Node]) -> list[_Summand]:
    """The parts of a linear layer over a concatenation, as layers over each; empty if it is no such layer."""
    call = graph.call(linear.input)
    if call is None or call.name != "cat" or len(linear.input.users) > 1:
        return []
    tensors, rank = call.get("tensors"), len(labels)
    widths = [graph.shape(t)[-1] for t in tensors]
    if call.get("dim", 0) not in (-1, rank - 1) or not all(isinstance(n, int) for n in widths):
        return []
    nodes.add(linear.input)
    found, first = [], 0
    for t, width in zip(tensors, widths, strict=True):
        source, of_source, passed = graph.narrowed(t, (*labels[:-1], _INPUT))
        nodes |= set(passed)
        found.append(_Summand(source, of_source, linear.get("weight"), slice(first, first + width)))
        first += width
    bias = linear.get("bias")
    return found if bias is None else [*found, _Summand(bias, labels[-1:])]


def _operands(graph: Graph, found: _Scores) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Query, key and weight, laid out for the op."""
    channel = found.product.summed

    def cast(source: Source, node: fx.Node) -> fx.Node:
        return graph.cast(source, node, found.node)

    def total(summands: list[_Summand], wanted: Labels) -> fx.Node:
        parts = []
        for s in summands:
            if s.weight is None:
                part = graph.arranged(s.source, s.labels, wanted)
            else:
                others = [label for label in s.labels if label != _INPUT]
                x = graph.arranged(s.source, s.labels, (*others, _INPUT))
                weight = graph.add(operator.getitem, graph.node(s.weight), (slice(None), s.columns))
                part = graph.arranged(graph.add(F.linear, x, weight), (*others, channel), wanted)
            parts.append(cast(s.source, part))
        first, *others = parts
        for other in others:
            first = graph.add(torch.add, first, other)
        return first

    query = total(found.query, (*found.lead, found.row, channel))
    key = total(found.key, (*found.lead, found.column, channel))
    heads = [label for label in found.weight_labels if label not in (None, channel)]
    weight = graph.arranged(found.product.other, found.weight_labels, (*heads, channel))
    return query, key, cast(found.product.other, weight)


def _replace_scores(graph: Graph, found: _Scores) -> None:
    with graph.module.graph.inserting_before(found.node):
        scores = graph.add(additive_scores, *_operands(graph, found), **found.options)
        scores = graph.arranged(scores, found.labels, found.product.result)
        if (bias := found.product.product.bias) is not None:
            scores = graph.add(torch.add, scores, graph.cast(bias, graph.node(bias), found.node))
    graph.replace(found.node, scores)
    graph.erase(found.nodes)


# Softmax and context


def to_softmax(graph: Graph, scores: fx.Node, labels: Labels) -> Rows | None:
    """What is between scores and a softmax of them; None where none follows."""
    node, scale, obstacle = scores, 1.0, ""
    nodes: list[fx.Node] = []
    biases: list[tuple[Source, Labels]] = []
    masks: list[tuple[Source, Labels, bool]] = []
    while True:
        users = list(node.users)
        if len(users) > 1:
            obstacle = obstacle or "the scores are used elsewhere, too"
            users = [user for user in users if (call := graph.call(user)) and call.name == "softmax"]
        if len(users) != 1 or graph.value(users[0]) is None:
            return None
        user = users[0]
        call, after = graph.call(user), graph.through(user, labels)
        if call is not None and call.name in ("softmax", "log_softmax") and isinstance(call.get("dim"), int):
            if call.name == "log_softmax" or call.get("dtype") is not None:
                obstacle = obstacle or f"a {call.name}{'' if call.name == 'log_softmax' else ' in another dtype'}"
            column = labels[call.get("dim")]
            if column is None:
                return None
            return Rows(user, labels, column, tuple(nodes), scale, tuple(biases), tuple(masks), obstacle)
        if after is not None:
            labels = after
        elif graph.shape(user) != graph.shape(node):
            return None
        elif call is not None and (number := _factor(call, node)) is not None and not biases + masks:
            scale *= number
        elif call is not None and (bias := _bias(graph, call, node, labels)) is not None and not masks:
            biases.append(bias)
        elif call is not None and (mask := _mask(graph, call, node, labels)) is not None:
            if isinstance(mask, str):
                obstacle = obstacle or mask
            else:
                masks.append(mask)
        else:
            what = call.name if call is not None else getattr(user.target, "__name__", user.target)
            obstacle = obstacle or f"{what} stands between them and the softmax"
        nodes.append(user)
        node = user


def _factor(call: Call, node: fx.Node) -> float | None:
    """The number that a node is multiplied by."""
    a, b = call.input, call.get("other")
    if call.name == "mul":
        number = b if a is node else a
    elif call.name == "div" and a is node and call.get("rounding_mode") is None:
        number = 1 / b if isinstance(b, (int, float)) and b else None
    else:
        number = None
    return float(number) if isinstance(number, (int, float)) else None


def _bias(graph: Graph, call: Call, node: fx.Node, labels: Labels) -> tuple[Source, Labels] | None:
    """A tensor that is added to a node and its labels."""
    if call.name != "add" or call.get("alpha", 1) != 1:
        return None
    bias = call.get("other") if call.input is node else call.input
    along = graph.aligned(bias, labels)
    return None if along is None or bias is node else (bias, along)


def _mask(graph: Graph, call: Call, node: fx.Node, labels: Labels) -> tuple[Source, Labels, bool] | str | None:
    """A mask that is applied to a node, with its labels, and whether True hides; in words, why it stays."""
    if call.name == "masked_fill" and call.input is node:
        mask, fill, hides = call.get("mask"), call.get("value"), True
    elif call.name == "where" and node in (call.input, call.get("other")):
        hides = call.get("other") is node
        mask, fill = call.get("condition"), call.input if hides else call.get("other")
    else:
        return None
    fill = graph.filled(fill)
    if not isinstance(fill, (int, float)):
        return "what a mask fills with is no number"
    if fill != -math.inf:
        return f"a mask fills with {fill:g}, so that a row without a valid key has weights"
    value, along = graph.value(mask), graph.aligned(mask, labels)
    if value is None or value.dtype != torch.bool or along is None:
        return "a mask of another shape or dtype"
    return mask, along, hides


class _Context(NamedTuple):
    product: Carried
    nodes: set[fx.Node]
    first: fx.Node  # what uses the weights

    def place(self, graph: Graph, softmax: fx.Node, inputs: list) -> tuple[fx.Node | None, bool]:
        """Where a call that makes weights and context of these may stand, or None; whether weights are used."""
        others = [user for user in softmax.users if user is not self.first]
        ready = max(graph.order.get(t, 0) for t in inputs if isinstance(t, fx.Node))
        place = softmax if ready < graph.order[softmax] else self.product.product.node
        is_late = any(graph.order[user] < graph.order[place] for user in others)
        return None if is_late else place, bool(others)

    def give(self, graph: Graph, result: fx.Node, labels: Labels, rows: Rows, of_weights: Labels | None) -> None:
        """The results of such a call to who used those before: the context alone, or labelled weights, too."""
        attended = result if of_weights is None else graph.add(operator.getitem, result, 0)
        attended = graph.arranged(attended, labels, self.product.result)
        if of_weights is not None:
            weights = graph.add(operator.getitem, result, 1)
            weights = graph.arranged(weights, of_weights, rows.labels)
        graph.replace(self.product.product.node, attended)
        graph.erase(self.nodes)
        if of_weights is not None:
            graph.replace(rows.softmax, weights)


def context_of(graph: Graph, weights: fx.Node, labels: Labels, column: Any) -> _Context | None:
    """The product of weights with values."""
    for first in weights.users:
        node, of_node = weights, labels
        chain: list[fx.Node] = []
        while True:
            product = graph.carried(node, of_node)
            if product is not None and product.summed == column:
                chain += product.product.nodes
                return _Context(product, set(chain), chain[0])
            user = first if node is weights else only_user(node)
            after = None if user is None else graph.through(user, of_node)
            if user is None or after is None:
                break
            node, of_node, chain = user, after, [*chain, user]
    return None


def _replace_all(graph: Graph, found: _Scores) -> str:
    """Scores, softmax and context as one call; returns why not, if not."""
    rows = found.rows
    if rows is None:
        return "no softmax follows"
    if rows.obstacle:
        return rows.obstacle
    context = context_of(graph, rows.softmax, rows.labels, found.column)
    if context is None:
        return "the weights are not multiplied with values as they are"
    product, softmax = context.product, rows.softmax
    nodes = found.nodes | set(rows.nodes) | {softmax} | context.nodes
    new = [label for label in product.other_labels if isinstance(label, New)]
    if len(new) > 1 or not set(product.other_labels) <= {None, found.column, *found.lead, *new}:
        return "the values have more dimensions than batch, heads, keys and channels"
    dtypes = {graph.value(t).dtype for t in (found.node, softmax, product.other, product.product.node)}  # type: ignore[union-attr]
    if len(dtypes) > 1:
        return f"scores, weights and values are of {' and '.join(sorted(map(str, dtypes)))}"
    end = product.product.node
    if graph.is_disturbed(nodes, end) or graph.is_written(softmax) or graph.is_written(end):
        return f"of the context, {DISTURBED}"
    inputs = [*found.sources(), product.other, *(t for t, *_ in (*rows.biases, *rows.masks))]
    place, has_weights = context.place(graph, softmax, inputs)
    if place is None:
        return "the weights are used before the values are computed"
    with graph.module.graph.inserting_before(place):
        query, key, weight = _operands(graph, found)
        if (bias := found.product.product.bias) is not None:  # cancelled: a gradient of zero, but not None
            weight = graph.add(torch.add, weight, graph.cast(bias, graph.node(bias), found.node), alpha=0)
        width = new[0] if new else None
        value = graph.arranged(product.other, product.other_labels, (*found.lead, found.column, width))
        options = dict(found.options)
        if rows.scale != 1:
            options["scale"] = rows.scale
        for bias, labels in rows.biases:
            bias = graph.cast(bias, graph.arranged(bias, labels, found.labels), found.node)
            options["bias"] = graph.add(torch.add, options["bias"], bias) if "bias" in options else bias
        for mask, labels, hides in rows.masks:
            visible = graph.arranged(mask, labels, found.labels)
            visible = graph.add(torch.logical_not, visible) if hides else visible
            options["mask"] = (
                graph.add(torch.logical_and, options["mask"], visible) if "mask" in options else visible
            )
        if has_weights:
            options["return_weights"] = True
        result = graph.add(additive_attention, query, key, value, weight, **options)
        context.give(graph, result, (*found.lead, found.row, width), rows, found.labels if has_weights else None)
    graph.erase(nodes - context.nodes)
    return ""
