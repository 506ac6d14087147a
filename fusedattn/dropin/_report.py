"""What became of a model's modules, to read and to print."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from fusedattn.dropin._adapter import Adapter


@dataclass(frozen=True)
class Entry:
    """A module of a model.

    Attributes:
        names: its paths in the model; several where it is shared. That of the model itself is ``""``.
        class_name: of the module.
        adapter: what knows it by name.
        replaced: whether it is fused now.
        reason: why it is not; where it was so before, that it was.
        is_chosen: whether ``only`` and ``exclude`` let it be replaced.
    """

    names: tuple[str, ...]
    class_name: str
    adapter: Adapter
    replaced: bool
    reason: str = ""
    is_chosen: bool = True

    @property
    def name(self) -> str:
        """Its paths as one text."""
        return " = ".join(name or "(the model)" for name in self.names)


@dataclass(frozen=True)
class Rewrite:
    """A pattern in a graph.

    Attributes:
        name: the module that it is in, as far as the graph tells, and its node.
        fuses: what runs fused, or would.
        replaced: whether it was rewritten.
        reason: why it was not, or not all of it.
        limits: where answers differ from those before.
    """

    name: str
    fuses: str
    replaced: bool
    reason: str = ""
    limits: str = ""


Found = TypeVar("Found", Entry, Rewrite)


class _Findings(Generic[Found]):
    """What a report iterates over, parted."""

    def __iter__(self) -> Iterator[Found]:
        raise NotImplementedError

    @property
    def replaced(self) -> tuple[Found, ...]:
        """Those that are fused, those that were before included."""
        return tuple(found for found in self if found.replaced)

    @property
    def not_replaced(self) -> tuple[Found, ...]:
        """Those that are known by name, or nearly match, and are left as they are."""
        return tuple(found for found in self if not found.replaced)


@dataclass(frozen=True)
class Report(_Findings[Entry]):
    """The modules of a model that are known by name: those replaced, and those not replaced with the reason.

    Iterates over its entries. ``print(report)`` has a line for each, or for each kind of layers that are numbered,
    and says where answers differ from the originals'.
    """

    entries: tuple[Entry, ...]
    unknown: int = 0  # modules whose class no adapter knows

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __str__(self) -> str:
        if not self.entries:
            known = "fusedattn.dropin.supported() lists what is"
            return f"fusedattn.dropin: none of the {self.unknown} modules is known ({known})"
        lines = []
        for entry in self.entries:
            note = f" ({entry.reason})" if entry.reason else ""
            text = entry.adapter.fuses + note if entry.replaced else entry.reason
            lines.append((entry.replaced, entry.name, f"{entry.adapter.name}: {text}"))
        notes = {e.adapter.name: e.adapter.limits for e in self.replaced if e.adapter.limits}
        for names, text in self._small_calls().items():
            notes[names] = f"{notes[names]}; {text}" if names in notes else text
        title = f"{len(self.replaced)} of {len(self.entries)} known modules are fused"
        return _table(title, lines, notes)

    def _small_calls(self) -> dict[str, str]:
        """Which calls remain the originals', by the names of adapters."""
        names: dict[int, list[str]] = {}
        for adapter in dict.fromkeys(entry.adapter for entry in self.replaced):
            names.setdefault(adapter.least, []).append(adapter.name)
        text = "below {:,} elements on the CPU, {:,} in training, the original runs, which is faster there"
        return {", ".join(names[least]): text.format(least, 2 * least) for least in sorted(names)}


@dataclass(frozen=True)
class GraphReport(_Findings[Rewrite]):
    """The patterns in a graph: those rewritten, and those that nearly were with the reason why not.

    Iterates over them; ``print`` has a line for each, or for each kind of layers that are numbered.
    """

    rewrites: tuple[Rewrite, ...]

    def __iter__(self) -> Iterator[Rewrite]:
        return iter(self.rewrites)

    def __str__(self) -> str:
        if not self.rewrites:
            return "fusedattn.dropin: no pattern is in the graph"
        lines = []
        for found in self.rewrites:
            note = f" ({found.reason})" if found.reason else ""
            lines.append((found.replaced, found.name, found.fuses + note if found.replaced else found.reason))
        limits = {found.fuses: found.limits for found in self.replaced if found.limits}
        return _table(f"{len(self.replaced)} of {len(self.rewrites)} patterns are fused", lines, limits)


def _table(title: str, entries: list[tuple[bool, str, str]], limits: dict[str, str]) -> str:
    """A line for each (fused or not, name, text), those of one text whose names differ in numbers together."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for fused, name, text in entries:
        key = "fused" if fused else "left", re.sub(r"(?<![^.])\d+(?![^.])", "*", name), text
        rows.setdefault(key, []).append(name)
    rows = dict(sorted(rows.items(), key=lambda row: row[0][0]))
    labels = {key: names[0] if len(names) == 1 else f"{key[1]} ({len(names)})" for key, names in rows.items()}
    width = max(map(len, labels.values()))
    lines = [f"fusedattn.dropin: {title}"]
    lines += [f"  {key[0]:<5}  {label:<{width}}  {key[2]}" for key, label in labels.items()]
    return "\n".join(lines + [f"  note   {name}: {text}" for name, text in limits.items()])
