"""Gated attention pooling in a graph, under whatever name: ``tanh(a) * sigmoid(b) @ w``, or all of its softmax and
context.

What is looked for::

    f = tanh(a) * sigmoid(b)      both (..., T, D)
    e = f @ w                     one score for each instance, or one for each head, as in additive attention
    p = softmax(e)                over the instances
    c = p @ x

Where nothing stands between scores and softmax, and its weights are multiplied with values, all of it becomes one
call; else the scores alone.
"""

from typing import Any, NamedTuple

import torch
from torch import fx

from fusedattn.dropin._calls import Source
from fusedattn.dropin._graph import DISTURBED, SMALL, Carried, Graph, Labels, Miss, New, only_user
from fusedattn.dropin._patterns_attention import Rows, context_of, to_softmax
from fusedattn.dropin._report import Rewrite
from fusedattn.ops.attention_pool import attention_pool

SCORES = "gate and scores in one pass"
POOLING = "gate, scores, softmax and context in one pass"


class _Scores(NamedTuple):
    """``lead`` is the label of the batch, or None, ``head`` that of heads."""

    product: Carried
    hidden: Source
    gate: Source
    shape: Labels  # of hidden and gate
    weight_labels: Labels
    lead: Any
    column: Any
    head: Any
    nodes: set[fx.Node]
    rows: Rows | None

    @property
    def node(self) -> fx.Node:
        return self.product.product.node

    @property
    def labels(self) -> Labels:
        heads = () if self.head is None else (self.head,)
        return (self.lead, *heads, self.column)

    @property
    def bias(self) -> Source | None:
        return self.product.product.bias


def rewrite(graph: Graph, node: fx.Node, least: int = 0) -> Rewrite | None:
    """What became of the tanh at ``node``; None where it is not gated and made a score of.

    ``least``: where a compiler comes after, the number of elements from which more than its own code is needed.
    """
    call = graph.call(node)
    product = only_user(node)
    gated = None if call is None or call.name != "tanh" or product is None else graph.call(product)
    if call is None or product is None or gated is None or gated.name != "mul" or gated.in_place:
        return None
    other = gated.get("other") if gated.input is node else gated.input
    sigmoid = graph.call(other)
    if sigmoid is None or sigmoid.name != "sigmoid" or len(other.users) != 1:
        return None
    hidden, gate = call.input, sigmoid.input
    if not graph.shape(hidden) == graph.shape(gate) == graph.shape(product):
        return None
    chain, labels = [product], graph.labels(product)
    while (found := graph.carried(chain[-1], labels)) is None:
        user = only_user(chain[-1])
        after = None if user is None else graph.through(user, labels)
        if user is None or after is None:
            return None
        chain, labels = [*chain, user], after
    heads = [label for label in found.other_labels if label not in (None, found.summed)]
    if len(heads) > 1 or not all(isinstance(label, New) for label in heads):
        return None
    name = graph.name(found.product.node)
    try:
        if graph.is_small(product, least):
            raise Miss(SMALL)
        if any(len(n.users) > 1 for n in chain):
            raise Miss("what is gated is used elsewhere, too")
        weight, weight_labels, passed = graph.narrowed(found.other, found.other_labels)
        nodes = {node, other, *chain, *found.product.nodes, *passed}
        scores = _read(graph, found._replace(other=weight), hidden, gate, weight_labels, nodes)
        reason = _replace_all(graph, scores)
        if not reason:
            return Rewrite(name, POOLING, True)
        _replace_scores(graph, scores)
        return Rewrite(name, SCORES, True, f"these alone: {reason}")
    except Miss as miss:
        return Rewrite(name, SCORES, False, str(miss))


def _read(
    graph: Graph, product: Carried, hidden: Source, gate: Source, weight_labels: Labels, nodes: set[fx.Node]
) -> _Scores:
    node = product.product.node
    rows = to_softmax(graph, node, product.result)
    labels, head = graph.labels(hidden), next((n for n in product.result if isinstance(n, New)), None)
    instances = [label for label in labels if label not in (None, product.summed)]
    column = instances[-1] if rows is None and instances else None if rows is None else rows.column
    if column not in instances or len(instances) > 2:
        raise Miss("expected one dimension of a batch and one of instances, over which the softmax is")
    lead = next((label for label in instances if label != column), None)
    if graph.is_disturbed(nodes, node):
        raise Miss(DISTURBED)
    dtype, autocast = graph.value(node).dtype, graph.autocast_dtype(node)  # type: ignore[union-attr]
    if len({graph.value(t).dtype for t in (hidden, gate, node)}) > 1:  # type: ignore[union-attr]
        raise Miss("hidden, gate and scores are of several dtypes")
    if not dtype.is_floating_point or (autocast is not None and dtype not in (autocast, torch.float64)):
        raise Miss(f"scores of {dtype}{'' if autocast is None else f' under autocast to {autocast}'}")
    return _Scores(product, hidden, gate, labels, weight_labels, lead, column, head, nodes, rows)


def _operands(graph: Graph, found: _Scores) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Hidden, weight and gate, laid out for the op."""
    channel = found.product.summed
    wanted = (found.lead, found.column, channel)
    hidden, gate = (graph.arranged(t, found.shape, wanted) for t in (found.hidden, found.gate))
    heads = () if found.head is None else (found.head,)
    weight = graph.arranged(found.product.other, found.weight_labels, (*heads, channel))
    return hidden, graph.cast(found.product.other, weight, found.node), gate


def _bias(graph: Graph, found: _Scores, *after: Any) -> fx.Node:
    """One of each head, in the dtype of the scores."""
    bias: Any = found.bias
    labels = (found.head,) * len(graph.shape(bias))
    return graph.cast(bias, graph.arranged(bias, labels, (*labels, *after)), found.node)


def _replace_scores(graph: Graph, found: _Scores) -> None:
    with graph.module.graph.inserting_before(found.node):
        hidden, weight, gate = _operands(graph, found)
        scores = graph.add(attention_pool, hidden, None, weight, gate)
        if found.bias is not None:
            scores = graph.add(torch.add, scores, _bias(graph, found, *(None,) * (found.head is not None)))
        scores = graph.arranged(scores, found.labels, found.product.result)
    graph.replace(found.node, scores)
    graph.erase(found.nodes)


def _replace_all(graph: Graph, found: _Scores) -> str:
    """Scores, softmax and context as one call; returns why not, if not."""
    rows = found.rows
    if rows is None:
        return "no softmax follows"
    if rows.obstacle or rows.scale != 1 or rows.biases or rows.masks:
        return rows.obstacle or "scale, bias or mask is between them and the softmax"
    softmax = rows.softmax
    context = context_of(graph, softmax, rows.labels, found.column)
    if context is None:
        return "the weights are not multiplied with values as they are"
    product, end = context.product, context.product.product.node
    new = [label for label in product.other_labels if isinstance(label, New)]
    have = {label for label in product.other_labels if label is not None}
    if len(new) != 1 or new[0] == found.head or have != {found.column, *new, *({found.lead} - {None})}:
        return "the values have other dimensions than batch, instances and channels"
    dtypes = {graph.value(t).dtype for t in (found.node, softmax, product.other, end)}  # type: ignore[union-attr]
    if len(dtypes) > 1:
        return f"scores, weights and values are of {' and '.join(sorted(map(str, dtypes)))}"
    nodes = found.nodes | set(rows.nodes) | {softmax} | context.nodes
    if graph.is_disturbed(nodes, end) or graph.is_written(softmax) or graph.is_written(end):
        return f"of the context, {DISTURBED}"
    inputs = [found.hidden, found.gate, found.product.other, product.other, found.bias]
    place, has_weights = context.place(graph, softmax, inputs)
    if place is None:
        return "the weights are used before the values are computed"
    with graph.module.graph.inserting_before(place):
        hidden, weight, gate = _operands(graph, found)
        if found.bias is not None:  # cancelled: a gradient of zero, but not None
            bias = _bias(graph, found, *(None,) * (found.head is not None))
            weight = graph.add(torch.add, weight, bias, alpha=0)
        value = graph.arranged(product.other, product.other_labels, (found.lead, found.column, new[0]))
        options = {"return_weights": True} if has_weights else {}
        result = graph.add(attention_pool, hidden, value, weight, gate, **options)
        context.give(graph, result, (*found.labels[:-1], new[0]), rows, found.labels if has_weights else None)
    graph.erase(nodes - context.nodes)
    return ""
