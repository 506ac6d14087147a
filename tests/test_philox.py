"""Random words: the known answers of their authors, the same words everywhere, and what is made of them."""

import pytest
import torch
from device import DEVICE, INTERPRETED, cpu_alone, not_on_the_standin

from fusedattn import _philox
from fusedattn._philox import EVERYTHING, Place

pytestmark = pytest.mark.levels

# counter, key and words, of Random123's kat_vectors.
ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
PLACES = {
    "whole": ((2, 3, 5, 70), 1, EVERYTHING),
    "without heads": ((3, 2, 9), 1, EVERYTHING),
    "part": ((2, 2, 3, 77), 1, Place(first_head=2**33 - 1, heads=7, first_query=2**31 - 1, first_key=2**33 + 7)),
    "seeds": ((2, 6, 3, 5), 3, Place(first_key=2)),
    "large": ((1, 512, 600), 1, EVERYTHING),  # in memory that is lent
    "empty": ((2, 0, 3, 5), 1, EVERYTHING),
}


if INTERPRETED:
    import triton
    import triton.language as tl

    from fusedattn.triton._philox import random_word

    @triton.jit
    def random_word_kernel(seed, out, head, first_query, first_key, BLOCK: tl.constexpr):
        i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
        word = random_word(tl.load(seed), head, first_query + i, first_key + j)
        tl.store(out + i * BLOCK + j, word)


def numbers(text):
    return [int(number, 16) for number in text.split()]


def signed(number):
    return number - 2**64 if number >= 2**63 else number


def seed_of(words):
    low, high = words
    return torch.tensor([signed(low | high << 32)])


def by_operator(seed, shape, place=EVERYTHING):
    return torch.ops.fusedattn.philox_words(seed, torch.empty(shape), *place).long() + 2**31


@pytest.mark.parametrize(("counter", "key", "answer"), ANSWERS)
def test_known_answers(counter, key, answer):
    found = _philox.philox([torch.tensor([c]) for c in numbers(counter)], seed_of(numbers(key)))
    assert [int(word) for word in found] == numbers(answer)


@pytest.mark.parametrize("words", [_philox.words, pytest.param(by_operator, marks=cpu_alone)])
@pytest.mark.parametrize(("counter", "key", "answer"), ANSWERS[::2])  # heads are counted below 2^63
def test_a_pair_has_the_word_of_its_counter(words, counter, key, answer):
    four, query, low, high = numbers(counter)
    place = Place(first_head=low | high << 32, first_query=query, first_key=4 * four)
    assert words(seed_of(numbers(key)), (1, 1, 4), place).tolist() == [[numbers(answer)]]


@cpu_alone
@pytest.mark.parametrize("case", PLACES)
def test_the_operator_makes_the_words_of_the_reference(case):
    shape, seeds, place = PLACES[case]
    seed = torch.randint(-(2**63), 2**63 - 1, (seeds,))
    assert torch.equal(by_operator(seed, shape, place), _philox.words(seed, shape, place))


def test_a_part_has_the_words_that_the_whole_has_there():
    seed = _philox.draw_seed(torch.device(DEVICE))
    whole = _philox.words(seed, (3, 4, 6, 21))
    part = _philox.words(seed, (1, 2, 3, 10), Place(first_head=2 * 4 + 1, heads=4, first_query=2, first_key=9))
    assert torch.equal(part, whole[2:, 1:3, 2:5, 9:19])


def test_seeds_stand_for_samples():
    seed = torch.randint(2**62, (3,))
    together = _philox.words(seed, (2, 6, 4, 5)).view(2, 3, 2, 4, 5)
    for sample in range(3):
        assert torch.equal(together[:, sample], _philox.words(seed[sample : sample + 1], (2, 2, 4, 5)))


@not_on_the_standin("has no generators")
def test_the_generators_decide_the_seed():
    device = torch.device(DEVICE)
    torch.manual_seed(7)
    first, second = (_philox.draw_seed(device) for _ in range(2))
    torch.manual_seed(7)
    assert torch.equal(first, _philox.draw_seed(device)) and not torch.equal(first, second)
    generators = [torch.Generator(device).manual_seed(7) for _ in range(2)]
    assert torch.equal(*(_philox.draw_seed(device, generator) for generator in generators))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999])
def test_dropout_keeps_as_many_as_it_says(p):
    weights = torch.ones(4, 8, 64, 129)
    dropped = _philox.dropout(weights, p, _philox.draw_seed(weights.device))
    n, kept = weights.numel(), dropped.count_nonzero()
    assert abs(kept - (1 - p) * n) <= 4 * (n * p * (1 - p)) ** 0.5
    assert torch.equal(dropped[dropped != 0], weights.view(-1)[:kept] * (1 / (1 - p)))


def test_thresholds():
    assert [_philox.threshold(p) for p in (0.0, 2**-32, 0.5, 1 - 1e-12)] == [0, 1, 2**31, 2**32 - 1]


def test_dropout_has_its_gradient():
    weights = torch.rand(2, 3, 4, requires_grad=True)
    seed = _philox.draw_seed(weights.device)
    keep = _philox.keeps(seed, weights, 0.25)
    (grad,) = torch.autograd.grad(_philox.dropout(weights, 0.25, seed).sum(), weights)
    assert torch.equal(grad, keep / 0.75)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_draws_as_randomness_says(randomness):
    def dropped(weights):
        return _philox.dropout(weights, 0.5, _philox.draw_seed(weights.device))

    a, b = torch.vmap(dropped, randomness=randomness)(torch.ones(2, 3, 16, 16))
    assert torch.equal(a, b) == (randomness == "same")
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(dropped)(torch.ones(2, 3, 16, 16))


@cpu_alone
def test_operator_checks():
    op = torch.ops.fusedattn.philox_words.default
    torch.library.opcheck(op, (torch.tensor([1]), torch.rand(2, 3, 4, requires_grad=True), *Place(1, 2, 3, 4)))
    with pytest.raises(RuntimeError, match=r"seed: expected an int64 .* S dividing the 3 heads"):
        op(torch.tensor([1, 2]), torch.empty(1, 3, 1, 1), *EVERYTHING)
    with pytest.raises(RuntimeError, match="first_query"):
        op(torch.tensor([1]), torch.empty(1, 1, 1), *Place(first_query=-1))
    with pytest.raises(RuntimeError, match="like: expected shape"):
        op(torch.tensor([1]), torch.empty(1, 1), *EVERYTHING)


@cpu_alone
def test_compiled():
    weights, seed = torch.ones(2, 5, 33), torch.tensor([11])
    compiled = torch.compile(_philox.dropout, fullgraph=True)
    assert torch.equal(compiled(weights, 0.5, seed), _philox.dropout(weights, 0.5, seed))


@pytest.mark.interpreted
@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_triton_makes_the_same_words():
    _, seeds, place = PLACES["part"]
    seed = torch.randint(-(2**63), 2**63 - 1, (seeds,))
    found = torch.empty(16, 16, dtype=torch.int64)
    random_word_kernel[(1,)](seed, found, place.first_head, place.first_query, 2**30 + 7, BLOCK=16)
    expected = _philox.words(seed, (1, 16, 16), place._replace(first_key=2**30 + 7))
    assert torch.equal(found, expected[0])
