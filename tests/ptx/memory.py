"""Memory of a launch. Every access is checked: bounds, alignment, and conflicts between threads.

Threads run in lockstep, which would hide a missing barrier: the value is always there. So shared memory remembers
which warp touched a byte since the last barrier, and an access that needs a barrier in between is an error.
"""

import ctypes

import numpy as np

from .parser import PtxError

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class OutOfBounds(PtxError):
    """An address outside every buffer, or not a multiple of the access."""


class Race(PtxError):
    """Two threads touch the same bytes with nothing that orders them."""


def _store(words: np.ndarray, index: np.ndarray, value: np.ndarray, where: str) -> None:
    words[index] = value
    if not np.array_equal(words[index], value):
        raise Race(f"threads store different values to one address of {where} in one instruction")


class GlobalMemory:
    """Buffers, each with its own bounds: an address outside all of them is an error.

    ``add`` copies an array to an address of its own, far from the others and beyond 32 bits; ``write_back``
    updates the array. ``add_host`` takes memory of this process where it is, for code that knows its addresses.
    """

    SPACING = 1 << 40

    def __init__(self):
        self.copies: list[tuple[np.ndarray, np.ndarray]] = []  # array, its copy
        self.names: list[str] = []
        self.starts, self.sizes = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        self.words: list[dict[int, np.ndarray]] = []

    def add(self, array: np.ndarray, name: str = "") -> int:
        """The address of a contiguous array's bytes."""
        data = array.reshape(-1).view(np.uint8)
        copy = np.zeros(-(-data.size // 16) * 16, np.uint8)
        copy[: data.size] = data
        self.copies.append((data, copy))
        address = len(self.copies) * self.SPACING
        self._add(address, data.size, copy, name or f"buffer {len(self.names)}")
        return address

    def add_host(self, address: int, size: int, name: str) -> None:
        """Memory of this process. Words are aligned, so that the pieces at its ends lie in the same page."""
        first, last = address // 16 * 16, -(-(address + size) // 16) * 16
        block = (ctypes.c_uint8 * (last - first)).from_address(first)
        self._add(address, size, np.frombuffer(block, np.uint8), name)

    def _add(self, address: int, size: int, block: np.ndarray, name: str) -> None:
        at = int(np.searchsorted(self.starts, np.uint64(address)))
        self.starts = np.insert(self.starts, at, np.uint64(address))
        self.sizes = np.insert(self.sizes, at, size)
        self.names.insert(at, name)
        self.words.insert(at, {size: block.view(word) for size, word in _WORDS.items()})

    def write_back(self) -> None:
        for array, copy in self.copies:
            array[:] = copy[: array.size]

    def _pieces(self, addresses: np.ndarray, size: int, span: int, action: str):
        """(words of a buffer, which accesses are in it, index of the word, name), for each buffer touched."""
        buffer = np.searchsorted(self.starts, addresses, side="right") - 1
        known = buffer >= 0
        start = self.starts[buffer] if self.starts.size else np.zeros_like(addresses)
        offset = np.where(known, (addresses - start).astype(np.int64), 0)
        beyond = offset + size > self.sizes[buffer] if self.sizes.size else True
        wrong = ~known | beyond
        if wrong.any():
            at = int(np.argmax(wrong))
            place = "in no buffer"
            if known[at]:
                place = f"byte {offset[at]} of {self.names[buffer[at]]} ({self.sizes[buffer[at]]} bytes)"
            raise OutOfBounds(f"{action} of {size} bytes at {int(addresses[at]):#x}: {place}")
        if (addresses % np.uint64(span)).any():
            at = int(addresses[np.argmax(addresses % np.uint64(span))])
            raise OutOfBounds(f"{action} of {span} bytes at {at:#x}: misaligned")
        word = (offset + (start % np.uint64(16)).astype(np.int64)) // size
        for b in np.unique(buffer):
            here = buffer == b
            yield self.words[b][size], here, word[here], self.names[b]

    def load(self, addresses: np.ndarray, size: int, span: int) -> np.ndarray:
        """Words of ``size`` bytes, parts of accesses of ``span`` bytes: span aligns the first word of each."""
        result = np.zeros(addresses.size, _WORDS[size])
        for words, here, index, _ in self._pieces(addresses, size, span, "load"):
            result[here] = words[index]
        return result

    def store(self, addresses: np.ndarray, size: int, span: int, values: np.ndarray) -> None:
        for words, here, index, name in self._pieces(addresses, size, span, "store"):
            _store(words, index, values[here], name)

    def atomic(self, addresses: np.ndarray, size: int, update) -> np.ndarray:
        """One access after the other: ``update(i, old)`` gives the new word. Returns the old ones."""
        result = np.zeros(addresses.size, _WORDS[size])
        for words, here, index, _ in self._pieces(addresses, size, size, "atomic access"):
            for i, at in zip(np.flatnonzero(here), index, strict=True):
                result[i] = words[at]
                words[at] = update(i, words[at : at + 1])
        return result


class PrivateMemory:
    """One row of bytes for every owner: shared memory of a block, local memory of a thread.

    ``actors`` switches the search for missing barriers on: accesses then name the warp. Fresh memory is NaN.
    """

    _NOBODY, _MANY = -1, -2

    def __init__(self, name: str, owners: int, size: int, actors: bool = False):
        self.name, self.size = name, size
        self.row_size = -(-size // 16) * 16
        data = np.full(owners * self.row_size, 255, np.uint8)
        self.words = {n: data.view(word) for n, word in _WORDS.items()}
        self.epoch = np.ones(owners, np.int64) if actors else None
        if actors:
            self.written = np.zeros(data.size, np.int64), np.full(data.size, self._NOBODY)
            self.read = np.zeros(data.size, np.int64), np.full(data.size, self._NOBODY)

    def barrier(self, owners: np.ndarray) -> None:
        if self.epoch is not None:
            self.epoch[owners] += 1

    def _index(self, owner, addresses, size, span, action):
        addresses = addresses.astype(np.int64)
        if (wrong := addresses + size > self.size).any():
            at = int(addresses[np.argmax(wrong)])
            raise OutOfBounds(f"{action} of {size} bytes at {at} of {self.size} bytes of {self.name} memory")
        if (addresses % span).any():
            at = int(addresses[np.argmax(addresses % span)])
            raise OutOfBounds(f"{action} of {span} bytes at {at} of {self.name} memory: misaligned")
        return owner * self.row_size + addresses

    def _touched_by_others(self, touches, at, epoch, actor):
        when, who = touches
        return ((when[at] == epoch) & (who[at] != actor)).any()

    def _check(self, at, size, owner, actor, writing):
        at = at[:, None] + np.arange(size)
        epoch, actor = self.epoch[owner][:, None], actor[:, None]
        if self._touched_by_others(self.written, at, epoch, actor):
            raise Race(f"{self.name} memory: no barrier since another warp wrote what is accessed here")
        if writing and self._touched_by_others(self.read, at, epoch, actor):
            raise Race(f"{self.name} memory: no barrier since another warp read what is overwritten here")
        when, who = self.written if writing else self.read
        same = (when[at] == epoch) & (who[at] != actor)
        who[at] = np.where(same, self._MANY, actor)
        # Several warps in one instruction: the last assignment won, the others see that it is not theirs.
        who[at[who[at] != actor]] = self._MANY
        when[at] = epoch

    def load(self, owner, addresses, size, span, actor=None) -> np.ndarray:
        at = self._index(owner, addresses, size, span, "load")
        if self.epoch is not None:
            self._check(at, size, owner, actor, writing=False)
        return self.words[size][at // size]

    def store(self, owner, addresses, size, span, values, actor=None) -> None:
        at = self._index(owner, addresses, size, span, "store")
        if self.epoch is not None:
            self._check(at, size, owner, actor, writing=True)
        _store(self.words[size], at // size, values, f"{self.name} memory")
