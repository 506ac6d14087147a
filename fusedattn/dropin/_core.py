"""Graphs in core ATen, as ``run_decompositions`` of an exported program leaves them.

There a product of matrices has its other dimensions merged before it and parted after, and a norm returns its
statistics, too. Each is put together again, exactly: patterns then read these graphs as any other.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fusedattn.dropin._graph import Graph, is_same, only_user

_ATEN = torch.ops.aten
_VIEWS = (_ATEN.view.default, _ATEN._unsafe_view.default, _ATEN.reshape.default)


def compose(graph: Graph) -> None:
    """Puts together what core ATen takes apart; other graphs stay as they are."""
    for node in list(graph.order):
        if node in graph.order and isinstance(node.target, torch._ops.OpOverload):
            for known in (_linear, _of_merged, _products, _norm):
                if known(graph, node):
                    break


def _merged(graph: Graph, node: Any, kept: int) -> fx.Node | None:
    """What a view merges the leading dimensions of, all but the ``kept`` last."""
    if not isinstance(node, fx.Node) or node.target not in _VIEWS:
        return None
    source: Any = node.args[0]
    before, after = graph.shape(source), graph.shape(node)
    same = len(after) == kept + 1 and all(map(is_same, before[-kept:], after[-kept:]))
    return source if same and len(before) > kept else None


def _parted(graph: Graph, node: fx.Node, leading: tuple) -> fx.Node | None:
    """The only user of a node, where that is a view which parts its first dimension into these."""
    user = only_user(node)
    if user is None or user.target not in _VIEWS:
        return None
    after, rest = graph.shape(user), graph.shape(node)[1:]
    expected = (*leading, *rest)
    return user if len(after) == len(expected) and all(map(is_same, after, expected)) else None


def _exchange(graph: Graph, old: fx.Node, function: Any, *args: Any, **kwargs: Any) -> None:
    """A call in place of a node, and of what only that used."""
    with graph.module.graph.inserting_before(old):
        new = graph.add(function, *args, **kwargs)
    unused = [old]
    graph.replace(old, new)
    for node in unused:
        unused += [n for n in node.all_input_nodes if n not in unused and n.op == "call_function"]
    graph.erase(unused)


def _linear(graph: Graph, node: fx.Node) -> bool:
    """``addmm(bias, view(x), permute(weight))`` as a linear layer."""
    bias: Any
    if node.target is _ATEN.addmm.default and not node.kwargs:
        bias, x, transposed = node.args
    elif node.target is _ATEN.mm.default:
        bias = None
        x, transposed = node.args
    else:
        return False
    is_permuted = isinstance(transposed, fx.Node) and transposed.target is _ATEN.permute.default
    if not is_permuted or list(transposed.args[1]) != [1, 0]:  # type: ignore[union-attr, arg-type]
        return False
    if bias is not None and graph.shape(bias) != graph.shape(transposed)[1:]:
        return False
    source: Any = _merged(graph, x, 1)
    end = None if source is None else _parted(graph, node, graph.shape(source)[:-1])
    if end is None:
        source, end = x, node
    _exchange(graph, end, F.linear, source, transposed.args[0], bias)  # type: ignore[union-attr]
    return True


def _of_merged(graph: Graph, node: fx.Node) -> bool:
    """``(view(x) * weight).sum(1)``, which is a product with a vector."""
    source = _merged(graph, node, 1)
    product = None if source is None else only_user(node)
    if product is None or product.target is not _ATEN.mul.Tensor:
        return False
    weight: Any = product.args[1] if product.args[0] is node else product.args[0]
    total = only_user(product)
    if total is None or total.target is not _ATEN.sum.dim_IntList or len(graph.shape(weight)) != 1:
        return False
    if list(total.args[1]) not in ([1], [-1]) or len(total.args) > 2 or total.kwargs:  # type: ignore[arg-type]
        return False
    end = _parted(graph, total, graph.shape(source)[:-1])
    if end is None:
        return False
    _exchange(graph, end, torch.matmul, source, weight)
    return True


def _products(graph: Graph, node: fx.Node) -> bool:
    """``bmm`` of batches that were merged."""
    if node.target is not _ATEN.bmm.default:
        return False
    sources = [_merged(graph, operand, 2) for operand in node.args]
    if None in sources:
        return False
    leading = [graph.shape(source)[:-2] for source in sources]
    end = _parted(graph, node, leading[0])
    if end is None or len(leading[0]) != len(leading[1]) or not all(map(is_same, *leading)):
        return False
    _exchange(graph, end, torch.matmul, *sources)
    return True


def _norm(graph: Graph, node: fx.Node) -> bool:
    """A layer or group norm whose statistics nobody asks for."""
    if node.target not in (_ATEN.native_layer_norm.default, _ATEN.native_group_norm.default):
        return False
    result = only_user(node)
    if result is None or result.args[1] != 0:
        return False
    if node.target is _ATEN.native_layer_norm.default:
        _exchange(graph, result, F.layer_norm, *node.args)
    else:
        x, weight, bias, *_, groups, eps = node.args
        _exchange(graph, result, F.group_norm, x, groups, weight, bias, eps)
    return True
