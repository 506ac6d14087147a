"""In which order groups of threads that went apart run, so that they meet again: behind what leads there.

A block of code comes after all blocks that reach it; blocks of a loop stand together, after its head, ordered in
the same way without the jumps back (the weak topological order of Bourdoncle 1993). The text is in no such order:
compilers put a rotated loop's second half before its first.
"""

from collections.abc import Iterable, Sequence


def ranks(successors: Sequence[Iterable[int]]) -> list[int]:
    """The place of every block, of which those that control may go on to are given; it begins with block 0."""
    order: list[int] = []

    def place(blocks: set[int]) -> None:
        for component in _components(blocks, successors):
            if len(component) == 1:
                order.extend(component)
                continue
            entered = {s for n, following in enumerate(successors) if n not in component for s in following}
            head = min(entered & component, default=min(component))
            order.append(head)
            place(component - {head})

    place(set(range(len(successors))))
    result = [0] * len(order)
    for rank, block in enumerate(order):
        result[block] = rank
    return result


def _components(blocks: set[int], successors: Sequence[Iterable[int]]) -> list[set[int]]:
    """Strongly connected ones, each before those that it leads to (Tarjan 1972)."""
    found: list[set[int]] = []
    number: dict[int, int] = {}
    lowest: dict[int, int] = {}
    open_: dict[int, None] = {}  # in order
    for root in sorted(blocks):
        path = [] if root in number else [(root, iter(successors[root]))]
        while path:
            block, rest = path[-1]
            if block not in number:
                number[block] = lowest[block] = len(number)
                open_[block] = None
            following = next(rest, None)
            if following is None:
                path.pop()
                if path:
                    before = path[-1][0]
                    lowest[before] = min(lowest[before], lowest[block])
                if lowest[block] == number[block]:
                    component = set()
                    while block not in component:
                        component.add(open_.popitem()[0])
                    found.append(component)
            elif following in blocks and following not in number:
                path.append((following, iter(successors[following])))
            elif following in open_:
                lowest[block] = min(lowest[block], number[following])
    return found[::-1]
