"""Makes modules fused in place, and undoes it.

A replaced module is an instance of a subclass of its class that overrides one method, most often ``forward``:
parameters, buffers, hooks and everything else stay where they are, ``isinstance`` stays true, and copies and
pickles are fused, too.
"""

import copyreg
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from fusedattn._dispatch import UnsupportedError
from fusedattn.dropin import _probe
from fusedattn.dropin._adapter import Adapter, descendant, has_hooks, match, renamed, resembles
from fusedattn.dropin._report import Entry, Report
from fusedattn.dropin._small import always_fused, is_small

Selection = str | type | Iterable[str | type] | None


def _original(module: nn.Module | None) -> type:
    """The class of a module, before it was replaced if it was."""
    return getattr(type(module), "_fusedattn_original", type(module))


def fused_class(module: nn.Module, adapter: Adapter) -> Any:
    """The class that makes a module fused."""
    cls: Any = type(module)
    inside = tuple(_original(descendant(module, name)) for name in adapter.inside)
    return _fused_class(cls, adapter, inside)


@functools.cache
def _fused_class(cls: Any, adapter: Adapter, inside: tuple[type, ...]) -> Any:
    """The subclass whose instances run ``adapter.fused``.

    They run the method of ``cls`` where a call is small, and where children whose work is done without them have
    hooks, or are no longer of the classes ``inside``: given an adapter of low rank, synchronised over processes,
    quantised.
    """
    method = getattr(cls, adapter.method)
    children = tuple(zip(adapter.inside, inside, strict=True))
    names, _ = renamed(cls, adapter)

    @functools.wraps(method)  # its signature
    def fused(self, *args, **kwargs):
        if is_small(adapter, args, kwargs):
            return method(self, *args, **kwargs)
        for name, known in children:
            child = descendant(self, name)
            if _original(child) is not known or has_hooks(child):
                return method(self, *args, **kwargs)
        if names:
            kwargs = {names.get(name, name): value for name, value in kwargs.items()}
        return adapter.fused(self, *args, **kwargs)

    def reduce(self, protocol):
        construct, args, *rest = super(fused_cls, self).__reduce_ex__(max(protocol, 2))
        if construct is copyreg.__newobj__ and args == (fused_cls,):  # which has no name to be found by
            construct, args = rebuild, (cls, adapter.name, inside)
        if adapter.state and rest and isinstance(rest[0], dict):  # what steps keep belongs to their graph
            rest[0] = {name: value for name, value in rest[0].items() if name not in adapter.state}
        return construct, args, *rest

    def reset(self):
        cls.reset(self)
        _forget(self, adapter)

    namespace = {
        adapter.method: fused,
        "__reduce_ex__": reduce,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_fusedattn_original": cls,
        "_fusedattn_adapter": adapter,
    }
    if adapter.state and hasattr(cls, "reset"):  # which begins a new loop
        namespace["reset"] = functools.wraps(cls.reset)(reset)
    fused_cls = type(cls)(cls.__name__, (cls,), namespace)
    return fused_cls


def rebuild(cls: Any, name: str, inside: tuple[type, ...]) -> nn.Module:
    """An empty replaced module, for pickle and copy."""
    from fusedattn.dropin import supported

    adapter = next(adapter for adapter in supported() if adapter.name == name)
    return object.__new__(_fused_class(cls, adapter, inside))


def _adapter_of(module: nn.Module) -> Adapter | None:
    """Of a module that was replaced."""
    return getattr(type(module), "_fusedattn_adapter", None)


def _forget(module: nn.Module, adapter: Adapter) -> None:
    for attribute in adapter.state:
        module.__dict__.pop(attribute, None)


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    object.__setattr__(module, "__class__", cls)  # packages have a __setattr__ of their own


def restore(model: nn.Module) -> list[str]:
    """Undoes :func:`replace`: every module gets its class back.

    Args:
        model: what was given to :func:`replace`, or what contains it.

    Returns:
        The paths of the modules that were replaced.

    Raises:
        UnsupportedError: a replaced module was given another class since, as ``fully_shard`` and ``parametrize``
            do: undo that before. Nothing is changed then.
    """
    fused = [(name, module) for name, module in model.named_modules() if _adapter_of(module) is not None]
    for name, module in fused:
        cls = type(module)
        if "_fusedattn_original" not in cls.__dict__:
            raise UnsupportedError(f"restore: {name or 'the model'} was made a {cls.__name__} after replace()")
    for _, module in fused:
        made: Any = type(module)
        _forget(module, made._fusedattn_adapter)
        _become(module, made._fusedattn_original)
    return [name for name, _ in fused]


class _Judge:
    """Says why a module is not what an adapter knows. Modules that are alike share one probe."""

    def __init__(self) -> None:
        self._verdicts: dict[Any, str | None] = {}

    def reasons(self, module: nn.Module, adapter: Adapter) -> list[str]:
        """Empty where the module can be replaced."""
        cls, method = type(module), adapter.method
        owner = next(base for base in cls.__mro__ if base.__name__ == adapter.class_name)
        if any(method in base.__dict__ for base in cls.__mro__[: cls.__mro__.index(owner)]):
            return [f"{cls.__name__} overrides the {method} of {owner.__name__}"]
        if method in module.__dict__:
            return [f"its {method} was set on the instance"]
        if not callable(getattr(cls, method, None)):
            return [f"has no method {method}"]
        sizes, reasons = match(adapter, module)
        reasons += renamed(cls, adapter)[1]
        if not reasons:
            try:
                reasons = adapter.reasons(module)
            except AttributeError as error:  # a namesake of the same parameters
                reasons = [f"differs from the known source: {error}"]
        hooked = [name for name in adapter.inside if has_hooks(descendant(module, name))]
        reasons += [f"{name} has hooks, which would not be called" for name in hooked]
        if reasons:
            return reasons
        key = cls, adapter, _structure(module)
        if key not in self._verdicts:
            self._verdicts[key] = self._probed(module, adapter, sizes)
        verdict = self._verdicts[key]
        return [] if verdict is None else [verdict]

    @staticmethod
    def _probed(module: nn.Module, adapter: Adapter, sizes: dict[str, int]) -> str | None:
        cls: Any = type(module)
        try:
            expected = _probe.answers(module, adapter, sizes, cls)
        except Exception as error:  # whatever is in a module that only looks like the known one
            return f"it fails on a probe: {type(error).__name__}: {error}"
        try:
            with always_fused():
                found = _probe.answers(module, adapter, sizes, fused_class(module, adapter))
        except Exception as error:
            return f"fused, it fails on a probe: {type(error).__name__}: {error}"
        return _probe.difference(expected, found, adapter.tolerance)


def _structure(module: nn.Module) -> tuple:
    """What decides how a module behaves, but for the values of its tensors."""
    plain = (bool, int, float, str, type(None))

    def shapes(tensors):
        return tuple((key, None if t is None else tuple(t.shape)) for key, t in tensors.items())

    return tuple(
        (
            name,
            type(child),
            tuple((key, value) for key, value in child.__dict__.items() if isinstance(value, plain)),
            shapes(child._parameters),
            shapes(child._buffers),
        )
        for name, child in module.named_modules()
    )


class _Chosen:
    """``only`` or ``exclude``: paths, as patterns, names of adapters, of their packages or classes, or classes."""

    def __init__(self, argument: str, selection: Selection):
        wanted = [selection] if isinstance(selection, (str, type)) else list(selection or ())
        for one in wanted:
            if not isinstance(one, (str, type)):
                raise TypeError(f"replace: {argument}: expected names and classes, got {type(one).__name__}")
        self._argument, self._wanted, self._met = argument, wanted, set[int]()

    def has(self, names: Sequence[str], module: nn.Module, adapter: Adapter) -> bool:
        def meets(one: str | type) -> bool:
            if isinstance(one, type):
                return isinstance(module, one)
            known = one in (adapter.name, adapter.package, adapter.class_name)
            return known or any(fnmatchcase(name, one) for name in names)

        met = {n for n, one in enumerate(self._wanted) if meets(one)}
        self._met |= met
        return bool(met)

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Raises where one of them is no adapter's name and met no module: most likely a typing error."""
        names = {name for a in adapters for name in (a.name, a.package, a.class_name)}
        for n, one in enumerate(self._wanted):
            if n not in self._met and one not in names:
                expected = "the path of a known module of this model or a name that supported() lists"
                raise ValueError(f"replace: {self._argument}: expected {expected}, got {one!r}")


def _of_that_name(module: nn.Module, by_class: dict[str, list[Adapter]]) -> Iterator[Adapter]:
    """The adapters for a class of its class's name, or of one that it derives from; our own are fused already."""
    for base in type(module).__mro__:
        if base.__module__.partition(".")[0] != "fusedattn":
            yield from by_class.get(base.__name__, ())


def plan(
    model: nn.Module, adapters: Sequence[Adapter], only: Selection, exclude: Selection
) -> tuple[Report, list[Callable[[], None]]]:
    """What would become of a model, and the changes that make it so."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace: model: expected a torch.nn.Module, got {type(model).__name__}")
    by_class: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        by_class.setdefault(adapter.class_name, []).append(adapter)
    paths: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), (module, []))[1].append(name)
    chosen, excluded, judge = _Chosen("only", only), _Chosen("exclude", exclude), _Judge()
    entries: list[Entry] = []
    changes: list[Callable[[], None]] = []
    unknown = 0
    for module, names in paths.values():

        def note(adapter, replaced, reason="", is_chosen=True, module=module, names=names):
            entries.append(Entry(tuple(names), type(module).__name__, adapter, replaced, reason, is_chosen))

        before = _adapter_of(module)
        known = (
            [a for a in _of_that_name(module, by_class) if resembles(a, module)] if before is None else [before]
        )
        selected = [a for a in known if only is None or chosen.has(names, module, a)]
        candidates = [a for a in selected if not excluded.has(names, module, a)]
        if before is not None:
            note(before, True, "it was before")
        elif not known:
            unknown += 1
        elif not candidates:
            note(known[0], False, "excluded" if selected else "not among those chosen", is_chosen=False)
        else:
            # Of several sources with a class of that name, the one that it differs least from.
            verdicts = [(judge.reasons(module, adapter), adapter) for adapter in candidates]
            reasons, adapter = min(verdicts, key=lambda verdict: len(verdict[0]))
            more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
            note(adapter, not reasons, "; ".join(reasons[:3]) + more)
            if not reasons:
                changes.append(functools.partial(_become, module, fused_class(module, adapter)))
    chosen.check(adapters)
    excluded.check(adapters)
    return Report(tuple(entries), unknown), changes
