"""What became of a model's modules, to read and to print."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

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
class Report:
    """The modules of a model that are known by name: those replaced, and those not replaced with the reason.

    Iterates over its entries. ``print(report)`` has a line for each, or for each kind of layers that are numbered,
    and says where answers differ from the originals'.
    """

    entries: tuple[Entry, ...]
    unknown: int = 0  # modules whose class no adapter knows

    @property
    def replaced(self) -> tuple[Entry, ...]:
        """Those that are fused, those that were before included."""
        return tuple(entry for entry in self.entries if entry.replaced)

    @property
    def not_replaced(self) -> tuple[Entry, ...]:
        """Those that are known by name and left as they are."""
        return tuple(entry for entry in self.entries if not entry.replaced)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __str__(self) -> str:
        if not self.entries:
            known = "fusedattn.dropin.supported() lists what is"
            return f"fusedattn.dropin: none of the {self.unknown} modules is known ({known})"
        rows: dict[tuple[str, str, str], list[str]] = {}
        for entry in self.entries:
            adapter, kind = entry.adapter, "fused" if entry.replaced else "left"
            note = f" ({entry.reason})" if entry.reason else ""
            text = adapter.fuses + note if entry.replaced else entry.reason
            key = kind, re.sub(r"(?<![^.])\d+(?![^.])", "*", entry.name), f"{adapter.name}: {text}"
            rows.setdefault(key, []).append(entry.name)
        rows = dict(sorted(rows.items(), key=lambda row: row[0][0]))
        labels = {key: names[0] if len(names) == 1 else f"{key[1]} ({len(names)})" for key, names in rows.items()}
        width = max(map(len, labels.values()))
        lines = [f"fusedattn.dropin: {len(self.replaced)} of {len(self.entries)} known modules are fused"]
        lines += [f"  {key[0]:<5}  {label:<{width}}  {key[2]}" for key, label in labels.items()]
        limits = {e.adapter.name: e.adapter.limits for e in self.replaced if e.adapter.limits}
        return "\n".join(lines + [f"  note   {name}: {text}" for name, text in limits.items()])
