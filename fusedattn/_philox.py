"""Random words for dropout and sampling, the same on every backend, tile size and number of threads.

Philox-4x32-10 (Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3") makes four words
of 32 bits of a counter and a key. Query i and key j of head number n = b H + h get word j % 4 of::

    counter (j // 4, i, n, n >> 32)     key (seed, seed >> 32)     each modulo 2^32, the lowest first

The seed is an int64 tensor (1,), drawn by PyTorch's generator (:func:`draw_seed`). All numbers are those of the
whole, of which a call may compute a part (:class:`Place`). What is made of a word::

    dropout with probability p      kept where word >= p 2^32, rounded (:func:`threshold`), times 1 / (1 - p)
    a uniform number in (0, 1)      (word + 1/2) / 2^32

In C++ ``csrc/common/philox.h`` (``philox_simd.h`` for CPU kernels), in Triton ``fusedattn/triton/_philox.py``. Raw
operator: ``fusedattn::philox_words(seed, like, *Place())``, on the CPU. Tests: ``tests/test_philox.py``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedattn import _library

_32_BITS = 0xFFFFFFFF


class Place(NamedTuple):
    """Where in the whole a call computes: the last arguments of raw operators that take random words."""

    first_head: int = 0  # counted over B x H
    heads: int = 0  # of the whole; 0: as many as the call has
    first_query: int = 0
    first_key: int = 0


EVERYTHING = Place()


def place_of(options: Any) -> Place:
    """That of an op's options."""
    return Place(*(getattr(options, name) for name in Place._fields))


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """A seed, int64 (1,), drawn on the device by ``generator`` or PyTorch's default one; nothing waits for it."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device, generator=generator)


def philox(counter: Sequence[Tensor], seed: Tensor) -> list[Tensor]:
    """The four words of a counter, int64 tensors of numbers below 2^32, that broadcast with each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _32_BITS, seed >> 32 & _32_BITS
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # modulo 2^64: the lower half is right, and so are the upper bits
        c0, c2 = (b >> 32 & _32_BITS) ^ c1 ^ k0, (a >> 32 & _32_BITS) ^ c3 ^ k1
        c1, c3 = b & _32_BITS, a & _32_BITS
        k0, k1 = k0 + 0x9E3779B9 & _32_BITS, k1 + 0xBB67AE85 & _32_BITS
    return [c0, c1, c2, c3]


def words(seed: Tensor, shape: Sequence[int], place: Place = EVERYTHING) -> Tensor:
    """Random words, int64, of a shape (B, H, Tq, Tk) or (B, Tq, Tk), in plain PyTorch on any device.

    seed is (S,): one for each H / S heads, which then count from 0.
    """
    *lead, Tq, Tk = shape
    B, H, S = lead[0], lead[1] if len(lead) == 2 else 1, seed.shape[0]
    of_seed = H // S

    def count(first, n, dim):
        numbers = torch.arange(first, first + n, dtype=torch.int64, device=seed.device)
        return numbers.view(-1, *(1,) * (-1 - dim))

    first_four = place.first_key // 4
    fours = count(first_four, (place.first_key + Tk + 3) // 4 - first_four, -1)
    head = (
        place.first_head + count(0, B, -5) * (place.heads or of_seed) + count(0, of_seed, -3)
    )  # (B, 1, H / S, 1, 1)
    counter = fours, count(place.first_query, Tq, -2) & _32_BITS, head & _32_BITS, head >> 32
    found = torch.stack(philox(counter, seed.view(S, 1, 1, 1)), -1).flatten(-2)
    skipped = place.first_key - 4 * first_four
    return found[..., skipped : skipped + Tk].reshape(shape)


def threshold(p: float) -> int:
    """The least word that dropout with probability p in [0, 1) keeps."""
    return min(round(p * 2**32), _32_BITS)


def keeps(seed: Tensor, like: Tensor, p: float, place: Place = EVERYTHING) -> Tensor:
    """bool, of the shape of ``like``, (B, H, Tq, Tk) or (B, Tq, Tk): what dropout with probability p keeps."""
    if like.device.type == "cpu" and _library.EXTENSION_ERROR is None and not _is_transformed():
        return torch.ops.fusedattn.philox_words(seed, like, *place) >= threshold(p) - 2**31
    return words(seed, like.shape, place) >= threshold(p)


def dropout(weights: Tensor, p: float, seed: Tensor, place: Place = EVERYTHING) -> Tensor:
    """What the kernels' dropout makes of weights (B, [H,] Tq, Tk): keep / (1 - p) times each, differentiable."""
    return torch.where(keeps(seed, weights, p, place), weights * (1 / (1 - p)), 0.0)


def _is_transformed() -> bool:
    return torch._C._are_functorch_transforms_active()


if _library.EXTENSION_ERROR is None:
    _implementations = torch.library.Library("fusedattn", "IMPL")
    _implementations.impl(
        "philox_words", torch.library.fallthrough_kernel, "Autograd"
    )  # integers have no gradient

    @torch.library.register_fake("fusedattn::philox_words")
    def _(seed, like, *place):
        return torch.empty(like.shape, dtype=torch.int32, device=like.device)
