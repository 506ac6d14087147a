"""How tensors lie in a graph of ``torch.fx``, and how its nodes are replaced.

Patterns go by what becomes of each dimension, in whatever way the user wrote that: which one of the input it is
(:meth:`Graph.layout`), which one a product sums over (:meth:`Graph.product`). Shapes are those of the fake tensors
that tracers leave on nodes. A dimension is followed by its label; None stands for a size of 1, which needs none.
"""

import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fusedattn.dropin._calls import Attribute, Call, Source, read, writes

Labels = tuple[Any, ...]
DISTURBED = "something is written in place, or autocast or gradients are switched, before it is computed"
SMALL = "a compiler's own code is as fast at this size"
_VIEWS = ("unsqueeze", "squeeze", "view", "permute", "transpose", "expand", "select", "getitem")


class Miss(Exception):
    """Why something that looks like a pattern is not rewritten."""


class Product(NamedTuple):
    """A sum of products of two operands, each with its letters as in an einsum; ``nodes`` compute it."""

    operands: tuple[Source, Source]
    letters: tuple[Labels, Labels]
    result: Labels
    nodes: tuple[fx.Node, ...]
    bias: Source | None = None

    @property
    def node(self) -> fx.Node:
        return self.nodes[-1]


class Carried(NamedTuple):
    """A product as seen from one operand: the other one, all labels, and what is summed over."""

    other: Source
    other_labels: Labels
    result: Labels
    summed: Any
    product: Product


class New(NamedTuple):
    """The label of a dimension that the other operand brings."""

    letter: Any


def is_same(a: Any, b: Any) -> bool:
    """Whether two sizes are the same, whatever symbols in them stand for."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(a == b)


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_one(n: Any) -> bool:
    return is_same(n, 1)


def _is_plain(index: Any) -> bool:
    """Whether an index selects by nothing but numbers and slices."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or isinstance(part, (int, slice)) for part in parts)


class Graph:
    """The graph of a module, as patterns read and change it."""

    def __init__(self, module: fx.GraphModule):
        self.module = module
        self.renumber()

    def renumber(self) -> None:
        """Notes the order of nodes, once after each change."""
        self.order = {node: n for n, node in enumerate(self.module.graph.nodes)}
        self._writing = [node for node in self.order if writes(node, self.module)]

    # What a node is

    def value(self, source: Any) -> Tensor | None:
        """A tensor with the shape, dtype and device of a node's; None where they are unknown."""
        if isinstance(source, fx.Node) and source.op != "get_attr":
            found = source.meta.get("example_value", source.meta.get("val"))
        elif isinstance(source, (fx.Node, Attribute)):
            path = source.path if isinstance(source, Attribute) else str(source.target)
            found = functools.reduce(getattr, path.split("."), self.module)
        else:
            found = None
        return found if isinstance(found, Tensor) else None

    def shape(self, source: Any) -> tuple:
        value = self.value(source)
        return () if value is None else tuple(value.shape)

    def number(self, argument: Any) -> Any:
        """An argument as a plain number; where Dynamo takes it for one that changes (``dynamic=True``), a guard
        on what it is now comes with that."""
        if not isinstance(argument, fx.Node):
            return argument
        value = argument.meta.get("example_value", argument.meta.get("val"))
        if not isinstance(value, (torch.SymFloat, torch.SymInt)):
            raise Miss(f"{argument.name} is not known as a number")
        return float(value) if isinstance(value, torch.SymFloat) else int(value)

    def filled(self, argument: Any) -> Any:
        """The number that a node makes a tensor of, or else the argument."""
        call = self.call(argument)
        if call is None or call.name not in ("scalar_tensor", "full"):
            return argument
        return call.get("s", call.get("fill_value"))

    def is_small(self, node: fx.Node, least: int) -> bool:
        """Whether a node on the CPU is known to have fewer elements; elsewhere it was not measured."""
        value, size = self.value(node), math.prod(self.shape(node))
        return value is not None and value.device.type == "cpu" and isinstance(size, int) and size < least

    def labels(self, source: Any) -> Labels:
        """A label for each dimension: its number."""
        return tuple(None if _is_one(n) else d for d, n in enumerate(self.shape(source)))

    def call(self, node: Any) -> Call | None:
        return read(node, self.module)

    def is_disturbed(self, nodes: Iterable[fx.Node], last: fx.Node) -> bool:
        """Whether something is written, or a mode changed, while these nodes, up to the last, are computed."""
        nodes = set(nodes)
        # A view shows what is written into its base whenever it is taken.
        first = min(self.order[n] for n in nodes if (call := self.call(n)) is None or call.name not in _VIEWS)
        end = self.order[last]
        return any(first < self.order[node] < end and node not in nodes for node in self._writing)

    def is_written(self, node: fx.Node) -> bool:
        """Whether somebody writes into a node's result, or into a view of it."""
        return any(
            user in self._writing or (self.layout(user) is not None and self.is_written(user))
            for user in node.users
        )

    def autocast_dtype(self, node: fx.Node) -> torch.dtype | None:
        """That of autocast where a node is computed; None where it is off."""
        value = self.value(node)
        kind = "cpu" if value is None else value.device.type
        known = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        found = [torch.get_autocast_dtype(kind) if known else None]
        for n in self.order:
            if n is node:
                break
            name = getattr(n.target, "__name__", "")
            if name == "_enter_autocast" and n.args[0] == kind:
                device, dtype, enabled, *_ = n.args
                found.append((dtype or torch.get_autocast_dtype(kind)) if enabled else None)
            elif name == "_exit_autocast" and n.args[0].args[0] == kind:
                found.pop()
        return found[-1]

    def name(self, node: fx.Node) -> str:
        """Where a node is: the module that computes it, and its name."""
        stack = list(node.meta.get("nn_module_stack", {}).values())
        path = re.sub(r"^[LG]\['\w+'\]\.?", "", str(stack[-1][0])) if stack else ""
        return f"{path} ({node.name})" if path else node.name

    # What becomes of dimensions

    def layout(self, node: Any) -> tuple[Any, tuple[int | None, ...]] | None:
        """Of a node that lays out its input anew: the input, and for each dimension which one of it that is.

        None is a dimension that was added, or in which one element is repeated.
        """
        call = self.call(node)
        if call is None or call.in_place or (source := self.value(call.input)) is None:
            return None
        if (result := self.value(node)) is None or result.dtype != source.dtype:  # as of view(dtype)
            return None
        before, after = tuple(source.shape), tuple(result.shape)
        rank = len(before)
        origins: Sequence[int | None] | None = None
        if call.name == "contiguous" or (call.name == "dropout" and call.get("training") in (False, 0)):
            origins = range(rank)
        elif call.name == "permute":
            origins = [d % rank for d in call.get("dims")]
        elif call.name == "transpose":
            a, b = call.get("dim0") % rank, call.get("dim1") % rank
            origins = [{a: b, b: a}.get(d, d) for d in range(rank)]
        elif call.name in ("expand", "repeat"):
            added = len(after) - rank
            same = [is_same(n, after[added + d]) for d, n in enumerate(before)]
            if all(a or _is_one(n) for a, n in zip(same, before, strict=True)):
                origins = [None] * added + [d if a else None for d, a in enumerate(same)]
        elif call.name in ("unsqueeze", "squeeze", "view", "reshape", "select") or (
            call.name == "getitem" and _is_plain(call.get("index"))
        ):
            kept = [d for d, n in enumerate(before) if not _is_one(n)]
            places = [d for d, n in enumerate(after) if not _is_one(n)]
            sizes = zip((before[d] for d in kept), (after[d] for d in places), strict=False)
            if len(kept) == len(places) and all(is_same(a, b) for a, b in sizes):
                moved = dict(zip(places, kept, strict=True))
                origins = [moved.get(d) for d in range(len(after))]
        return None if origins is None else (call.input, tuple(origins))

    def through(self, node: fx.Node, labels: Labels) -> Labels | None:
        """The labels of a node that lays out an input with these; None where it does something else."""
        found = self.layout(node)
        return None if found is None else tuple(None if d is None else labels[d] for d in found[1])

    def narrowed(self, source: Any, labels: Labels) -> tuple[Any, Labels, list[fx.Node]]:
        """What a node with these labels was laid out or repeated from, its labels, and the nodes passed."""
        passed: list[fx.Node] = []
        while (found := self.layout(source)) is not None:
            passed.append(source)
            source, origins = found
            before: list[Any] = [None] * len(self.shape(source))
            for label, d in zip(labels, origins, strict=True):
                if d is not None:
                    before[d] = label
            labels = tuple(before)
        return source, labels, passed

    def aligned(self, source: Any, labels: Labels) -> Labels | None:
        """The labels of an operand that is broadcast along what has these; None where it is larger than that."""
        shape = self.shape(source)
        along = labels[max(0, len(labels) - len(shape)) :]
        if self.value(source) is None or len(along) < len(shape):
            return None
        found = tuple(None if _is_one(n) else label for n, label in zip(shape, along, strict=True))
        return found if sum(label is None for label in found) == sum(map(_is_one, shape)) else None

    # Products

    def product(self, node: Any) -> Product | None:
        """The sum of products that a node is, or, for a multiplication, that its only user makes of it."""
        call = self.call(node)
        if call is None or call.in_place:
            return None
        a: Any = call.input
        if call.name == "linear":
            b = call.get("weight")
            n, m = len(self.shape(a)), len(self.shape(b))
            batch = range(n - 1)
            letters = (*batch, "i"), ("o", "i")[2 - m :], (*batch, "o")[: n + m - 2]
            return self._product((a, b), letters, (node,), call.get("bias"))
        if call.name in ("matmul", "bmm"):
            b = call.get("other")
            n, m = len(self.shape(a)), len(self.shape(b))
            batch = range(-max(n, m), -2)
            left, right = (*range(-n, -2), *("i", "c")[-n:]), (*range(-m, -2), *("c", "j")[:m])
            result = (*batch, *("i",)[: n - 1], *("j",)[: m - 1])
            return self._product((a, b), (left, right, result), (node,))
        if call.name == "einsum":
            operands, equation = call.get("operands", call.get("tensors")), call.get("equation").replace(" ", "")
            terms, _, result = equation.partition("->")
            left, _, right = terms.partition(",")
            plain = all(len(set(term)) == len(term) and "." not in term for term in (left, right))
            if "->" not in equation or not plain or len(operands) != 2:
                return None
            return self._product(tuple(operands), tuple(map(tuple, (left, right, result))), (node,))
        if call.name == "mul" and len(node.users) == 1:
            return self._summed(node, call, next(iter(node.users)))
        return None

    def _summed(self, node: fx.Node, factors: Call, user: fx.Node) -> Product | None:
        call, rank = self.call(user), len(self.shape(node))
        if call is None or call.name != "sum" or call.get("dtype") is not None or call.get("dim") is None:
            return None
        dims = call.get("dim")
        summed = {d % rank for d in (dims if isinstance(dims, (tuple, list)) else (dims,))}
        result = [None if d in summed else d for d in range(rank) if call.get("keepdim") or d not in summed]
        operands = factors.input, factors.get("other")
        left, right = (tuple(range(rank - len(self.shape(t)), rank)) for t in operands)
        return self._product(operands, (left, right, tuple(result)), (node, user))

    def _product(self, operands: tuple, letters: tuple, nodes: tuple, bias: Any = None) -> Product | None:
        shapes = [self.shape(t) for t in (*operands, nodes[-1])]
        if any(self.value(t) is None for t in (*operands, nodes[-1])):
            return None
        if any(len(shape) != len(names) for shape, names in zip(shapes, letters, strict=True)):
            return None
        left, right, result = (
            tuple(None if _is_one(n) else name for n, name in zip(shape, names, strict=True))
            for shape, names in zip(shapes, letters, strict=True)
        )
        return Product(operands, (left, right), result, nodes, bias)

    def carried(self, node: fx.Node, labels: Labels) -> Carried | None:
        """The first product of a node with these labels, over one of its dimensions."""
        for user in node.users:
            product = self.product(user)
            if product is None or (product.operands[0] is node) == (product.operands[1] is node):
                continue
            side = 0 if product.operands[0] is node else 1
            mine, theirs = product.letters[side], product.letters[1 - side]
            names = {letter: label for letter, label in zip(mine, labels, strict=True) if letter is not None}
            summed = [letter for letter in names if letter not in product.result]
            if len(summed) == 1 and all(n is None or n in product.result or n in names for n in theirs):
                other, result = (
                    tuple(None if n is None else names.get(n, New(n)) for n in letters)
                    for letters in (theirs, product.result)
                )
                if names[summed[0]] in other:
                    return Carried(product.operands[1 - side], other, result, names[summed[0]], product)
        return None

    # Changes

    def node(self, source: Source) -> fx.Node:
        """A node for a tensor of a module."""
        return self.module.graph.get_attr(source.path) if isinstance(source, Attribute) else source

    def add(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A node that calls a function."""
        return self.module.graph.call_function(function, args, kwargs)

    def cast(self, source: Source, node: fx.Node, like: fx.Node) -> fx.Node:
        """What was made of a source, in the dtype of another node."""
        known, wanted = (self.value(t).dtype for t in (source, like))  # type: ignore[union-attr]
        return node if known == wanted else self.add(torch.Tensor.to, node, wanted)

    def arranged(self, source: Source, labels: Labels, wanted: Labels) -> fx.Node:
        """Nodes that lay out a tensor with these labels as ``wanted``, with 1 for those that it has not."""
        node = self.node(source)
        wanted = tuple(label if label in labels else None for label in wanted)
        if labels == wanted:
            return node
        if ones := tuple(d for d, label in enumerate(labels) if label is None):
            node = self.add(torch.squeeze, node, ones)
        kept = [label for label in labels if label is not None]
        order = [kept.index(label) for label in wanted if label is not None]
        if order != sorted(order):
            node = self.add(torch.permute, node, order)
        for d, label in enumerate(wanted):
            if label is None:
                node = self.add(torch.unsqueeze, node, d)
        return node

    def replace(self, node: fx.Node, other: fx.Node) -> None:
        """What used a node uses the other one; the node itself goes with :meth:`erase`."""
        other.meta = dict(node.meta)
        node.replace_all_uses_with(other)

    def erase(self, nodes: Iterable[fx.Node]) -> None:
        """Removes those that nobody uses, and notes the new order."""
        for node in sorted(set(nodes), key=self.order.__getitem__, reverse=True):
            if not node.users and node.op != "placeholder":
                self.module.graph.erase_node(node)
        self.renumber()
