"""What ``FlopCounterMode`` of ``torch.utils`` counts: products of matrices alone, as of PyTorch's own."""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

_COUNTER = "torch.utils.flop_counter"
_formulas: dict[Any, Callable[..., int]] = {}


def count(operator: Any, formula: Callable[..., int]) -> None:
    """Has an operator counted by ``formula`` of its arguments, with shapes in place of tensors."""
    _formulas[operator] = formula
    if counter := sys.modules.get(_COUNTER):
        _register(counter)


def _register(counter: ModuleType) -> None:
    for operator, formula in _formulas.items():
        if operator not in counter.flop_registry:
            counter.register_flop_formula(operator)(formula)


class _WhenImported(MetaPathFinder):
    """Registers the formulas once somebody imports the counter, which takes 0.6 s: it imports Triton."""

    def find_spec(self, fullname, path, target=None):
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = exec_module
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _WhenImported())
