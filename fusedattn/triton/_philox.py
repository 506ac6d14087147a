"""Random words in Triton, those of ``fusedattn/_philox.py``, which says what belongs to which query and key."""

import triton
import triton.language as tl


@triton.jit
def random_words(seed, head, i, fours):
    """Four words, uint32, of keys 4 fours to 4 fours + 3.

    seed, head: int64 scalars. i: query numbers. fours: key numbers / 4. Both of at least 32 bits; their shapes
    broadcast.
    """
    low = (head & 0xFFFFFFFF).to(tl.uint32)
    high = ((head >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, fours.to(tl.uint32), i.to(tl.uint32), low, high)


@triton.jit
def random_word(seed, head, i, j):
    """A word, uint32, of each query i and key j, int32 [BLOCK_Q, 1] and [1, BLOCK_K].

    Each evaluates all four of its neighbours: some 40 instructions, where a score of 256 channels takes 800.
    """
    a, b, c, d = random_words(seed, head, i, j >> 2)
    is_odd = (j & 1) != 0
    return tl.where((j & 2) != 0, tl.where(is_odd, d, c), tl.where(is_odd, b, a))
