"""What an adapter says of the module that it knows, and what a module is compared with."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

Draw = Callable[..., Tensor]
Sizes = dict[str, int]
Shape = tuple[str | int, ...]


def largest(*tensors: Tensor) -> int:
    """The elements of the largest of them."""
    return max([t.numel() for t in tensors])


def no_reasons(module: nn.Module) -> list[str]:
    return []


@dataclass(frozen=True, eq=False)
class Adapter:
    """One module of one source, and what stands in for its forward.

    Args:
        name: ``"package.Class"``. A module is looked at if its class, or one that it derives from, has that name.
        source: the repository and file that it was read from.
        fuses: what runs fused, in a few words.
        shapes: every parameter and buffer by its name, with its shape in letters and numbers: ``("2C", "E")``.
            A letter is the same size wherever it stands. A name that ends with ``?`` may be absent, and so may
            what a pattern (``"attn.*"``) stands for; None in place of a shape allows any.
        fused: stands in for the method: takes the module and the method's arguments, whose names may differ.
        probe: takes a module, the sizes that letters stand for and ``draw(*shape)``, uses the module as people do
            and returns all that it answers: of the original and of the replaced one this has to be the same.
        method: what is overridden; where a source has the scores in a method of their own, that alone. Default:
            ``"forward"``.
        inside: children, or theirs by a path, whose work is done without calling them; where one has hooks, or is
            replaced by one of another class, the original runs.
        reasons: why a module of these shapes is not what is known, in words; empty if it is.
        limits: where answers differ from the original's. Printed with the report.
        state: attributes that ``fused`` keeps on the module; the module's ``reset()`` and ``restore`` drop them.
        tolerance: of the probe, which is in float64; larger where the original turns to float32 inside.
        work: the size of a call, from the tensors given to the method; that of the largest by default.
        least: the smallest such size that is worth a fused call on the CPU, doubled where gradients are recorded;
            below it the original runs (``_small.py``).
    """

    name: str
    source: str
    fuses: str
    shapes: Mapping[str, Shape | None]
    fused: Callable[..., Any]
    probe: Callable[[Any, Sizes, Draw], Any]
    method: str = "forward"
    inside: tuple[str, ...] = ()
    reasons: Callable[[Any], list[str]] = no_reasons
    limits: str = ""
    state: tuple[str, ...] = ()
    tolerance: float = 1e-8
    work: Callable[..., int] = largest
    least: int = 1 << 16

    @property
    def package(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def class_name(self) -> str:
        return self.name.rpartition(".")[2]

    def __str__(self) -> str:
        return f"{self.name}: {self.fuses} ({self.source})"


def original(module: nn.Module, method: str = "forward") -> Callable[..., Any]:
    """The method of a replaced module before that, for what a fused one is not made for."""
    cls: Any = type(module)
    return getattr(cls._fusedattn_original, method).__get__(module)


# Comparison of a module with what an adapter knows


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _required(adapter: Adapter) -> list[str]:
    return [name for name in adapter.shapes if not name.endswith("?") and "*" not in name]


def match(adapter: Adapter, module: nn.Module) -> tuple[Sizes, list[str]]:
    """What the letters in ``shapes`` stand for, and in words where the module differs from them."""
    sizes: Sizes = {}
    reasons = []
    found = dict(_tensors(module))
    shapes = {name.removesuffix("?"): shape for name, shape in adapter.shapes.items()}
    reasons += [f"has no {name}" for name in _required(adapter) if name not in found]
    for name, t in found.items():
        known = name if name in shapes else next((p for p in shapes if fnmatchcase(name, p)), None)
        if known is None:
            reasons.append(f"has {name}, which the known source has not")
        elif (shape := shapes[known]) is not None and (reason := _differs(name, t, shape, sizes)):
            reasons.append(reason)
    return sizes, reasons


def resembles(adapter: Adapter, module: nn.Module) -> bool:
    """Whether they have a tensor's name in common, or may both have none: else a class is a mere namesake."""
    names = {name for name, _ in _tensors(module)}
    if not names:
        return not _required(adapter)
    return any(fnmatchcase(name, known.removesuffix("?")) for name in names for known in adapter.shapes)


def _differs(name: str, t: Tensor, expected: Shape, sizes: Sizes) -> str | None:
    if nn.parameter.is_lazy(t):
        return f"{name} is not initialised yet: call the module once before"
    shape = tuple(t.shape)
    fits = len(shape) == len(expected)
    for n, size in zip(shape, expected, strict=False):
        if isinstance(size, int):
            fits = fits and n == size
        else:
            times, letter = re.fullmatch(r"(\d*)([A-Z]+)", size).groups()  # type: ignore[union-attr]
            per = int(times or 1)
            fits = fits and n % per == 0 and sizes.setdefault(letter, n // per) == n // per
    if fits:
        return None
    known = ", ".join(f"{letter} = {n}" for letter, n in sizes.items())
    text = f"{name} has shape {shape}, expected ({', '.join(map(str, expected))})"
    return f"{text} with {known}" if known else text


_NAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _arguments(function: Callable[..., Any]) -> tuple[dict[str, Any], set]:
    """The arguments with their defaults, without the module itself, and the kinds of others."""
    _, *parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind in _NAMED}, {p.kind for p in parameters} - set(_NAMED)


def renamed(cls: type[nn.Module], adapter: Adapter) -> tuple[dict[str, str], list[str]]:
    """The adapter's names of arguments that the class calls otherwise, and why it cannot take them all."""
    method = getattr(cls, adapter.method)
    theirs, other_kinds = _arguments(method)
    ours, our_kinds = _arguments(adapter.fused)
    defaults = list(ours.values())[len(theirs) :]
    if len(theirs) > len(ours) or inspect.Parameter.empty in defaults or not other_kinds <= our_kinds:
        got, expected = (str(inspect.signature(f)) for f in (method, adapter.fused))
        return {}, [f"{adapter.method} takes {got}, that of the known source {expected}"]
    pairs = list(zip(theirs.items(), ours.items(), strict=False))
    same = (inspect.Parameter.empty,)  # the fused one may have a default where the known one has none
    wrong = [name for (name, default), (_, known) in pairs if default not in (*same, known)]
    reasons = [f"{adapter.method} has another default of {name} than that of the known source" for name in wrong]
    return {a: b for (a, _), (b, _) in pairs if a != b}, reasons


def descendant(module: nn.Module, path: str) -> nn.Module | None:
    """What is at a path in a module; None where nothing is."""
    found: nn.Module | None = module
    for name in path.split("."):
        found = None if found is None else found._modules.get(name)
    return found


def has_hooks(module: nn.Module | None) -> bool:
    """Whether somebody is told of its calls, or of those of what is in it."""
    if module is None:
        return False
    hooks = (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
    return bool(hooks) or any([has_hooks(child) for child in module._modules.values()])
