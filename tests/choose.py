"""Of the cases of a test, few: where the same test has run in full elsewhere, and this run asks one thing more.

On the stand-in that is which device tensors are made on; at CPU levels below the best (``FUSEDATTN_TESTS=values``,
as `make test` and `make sanitize` set it there) whether the kernels of the level compute the same. Tests marked
``machinery`` ask PyTorch more than our kernels, and take seconds: other runs take one case of each op, these none.
`make test-all` and `FUSEDATTN_TESTS=all make sanitize` run all.
"""

import os
from collections.abc import Callable

TESTS = os.environ.get("FUSEDATTN_TESTS", "")


def each_value(items: list, value_of: Callable = repr) -> list:
    """The items that show a test the first, or a parameter a value that no item before did.

    ``value_of`` a parameter says what tells its values apart, or None where none of them asks anything new.
    """
    seen, chosen = set(), []
    for item in machinery_once(items):
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        values = {(name, value_of(value)) for name, value in parameters.items()}
        new = {(item.function, None), *((item.function, value) for value in values if value[1] is not None)}
        if new - seen:
            chosen.append(item)
        seen |= new
    return chosen


def machinery_once(items: list, apart: tuple[str, ...] = ()) -> list:
    """All items, but of each test marked ``machinery`` the first of each value of the parameters ``apart``."""
    seen, chosen = set(), []
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        kind = item.function, *(repr(parameters.get(name)) for name in apart)
        if not item.get_closest_marker("machinery") or kind not in seen:
            chosen.append(item)
        seen.add(kind)
    return chosen


def keep(config, items: list, chosen: list) -> None:
    """Deselects all items but the chosen ones."""
    kept = set(map(id, chosen))
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = chosen
