"""Memory that the CPU kernels keep from one step of training for the next: csrc/common/memory.cpp."""

import copy
import io
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fusedattn
from fusedattn import additive_attention, film

MIB = 1 << 20


def attention_gradients(Tk, Tq=1, B=1, D=256, seed=0, **options):
    """Gradients of query, key, value and weight; those of key and value take Tk * D * B * 4 bytes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, Tq, D), (B, Tk, D), (B, Tk, D), (D,)]
    inputs = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
    return torch.autograd.grad(additive_attention(*inputs, **options).square().sum(), inputs)


def film_gradients(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(s, generator=generator).requires_grad_() for s in ((2, 64, size), (2, 64), (2, 64))]
    return torch.autograd.grad(film(*inputs, channel_dim=1, activation="silu").sum(), inputs)


def test_the_next_gradients_take_the_memory_of_the_last():
    last = {t.data_ptr() for t in attention_gradients(8192)[1:3]}
    assert {t.data_ptr() for t in attention_gradients(8192)[1:3]} == last
    last = film_gradients(40_000)[0].data_ptr()
    assert film_gradients(40_000)[0].data_ptr() == last


def test_memory_in_use_is_not_lent_again():
    held = attention_gradients(8192, seed=1)
    before = [t.clone() for t in held]
    view = held[1][:, 5:9]
    others = attention_gradients(8192, seed=2)
    assert not {t.data_ptr() for t in held} & {t.data_ptr() for t in others}
    del held
    attention_gradients(8192, seed=3)
    assert torch.equal(view, before[1][:, 5:9])  # a view keeps the whole


@pytest.mark.parametrize(
    "gradients",
    [
        lambda: attention_gradients(2000, B=2, key_lengths=torch.tensor([1500, 0])),
        lambda: attention_gradients(3000, Tq=7, D=255),
        lambda: attention_gradients(2000, Tq=40, B=2, is_causal=True, softcap=3.0),
        lambda: attention_gradients(1200, Tq=1200, D=16),  # scores kept for backward are lent, too
        lambda: film_gradients(40_000),
    ],
    ids=["one_query", "few_queries", "many_queries", "kept_scores", "film"],
)
def test_what_lent_memory_held_does_not_show(gradients):
    first = gradients()
    expected = [t.clone() for t in first]
    for t in first:
        t.fill_(float("nan"))
    del first, t
    for actual, wanted in zip(gradients(), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_a_lent_gradient_is_a_tensor_like_any_other():
    gradient = attention_gradients(4096)[1]
    values = gradient.clone()
    assert torch.equal(copy.deepcopy(gradient), values)
    file = io.BytesIO()
    torch.save(gradient, file)
    file.seek(0)
    assert torch.equal(torch.load(file), values)
    array = gradient.numpy()
    gradient = gradient.add_(1).share_memory_()
    assert gradient.is_shared() and torch.equal(gradient, values + 1)
    assert array[0, 0, 0] == values[0, 0, 0] + 1


def test_threads_share_what_is_kept():
    sizes = [1500 + 100 * n for n in range(8)]
    expected = {size: attention_gradients(size, seed=size) for size in sizes}

    def steps(offset):
        wrong = 0
        for n in range(24):
            size = sizes[(n + offset) % len(sizes)]
            actual = attention_gradients(size, seed=size)
            wrong += not all(torch.equal(a, e) for a, e in zip(actual, expected[size], strict=True))
        return wrong

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(steps, range(4))) == [0] * 4


RESIDENT = """
import random, sys, torch
sys.path.insert(0, sys.argv[1])
from test_memory import MIB, attention_gradients

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024

attention_gradients(8)
start = resident()
sizes = [int(n * 1024) for n in eval(sys.argv[2])]  # keys: a MiB of each gradient is 1024 of them
for size in sizes:
    attention_gradients(size)
print(resident() - start)
"""


def run_resident(sizes, **variables):
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", **variables}
    command = [sys.executable, "-c", RESIDENT, os.path.dirname(__file__), repr(sizes)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def resident_after(sizes, **variables):
    """MiB that stay resident after steps whose key and value gradients take ``sizes`` MiB each."""
    result = run_resident(sizes, **variables)
    assert result.returncode == 0, result.stderr
    return float(result.stdout)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="resident memory is read from /proc")
def test_nothing_is_kept_where_that_is_not_wanted():
    assert resident_after([64], FUSEDATTN_REUSE_MEMORY="0") < 32
    assert resident_after([64], FUSEDATTN_REUSE_MEMORY="1") > 100


def test_another_value_of_the_variable_is_a_clear_error():
    result = run_resident([4], FUSEDATTN_REUSE_MEMORY="no")
    assert result.returncode != 0
    assert "FUSEDATTN_REUSE_MEMORY: expected 0 or 1, got 'no'" in result.stderr


def status(field):
    """MiB of this process."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


@pytest.fixture
def kept():
    """A function that tells how many MiB have become resident since nothing was kept."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("resident memory is read from /proc")
    fusedattn.empty_cache()
    before = status("VmRSS")
    yield lambda: status("VmRSS") - before
    fusedattn.empty_cache()


def gradients_of(size, D=256, dtype=torch.float32):
    """A function that makes new gradients of one query; those of key and value take ``size`` MiB each."""
    row = torch.zeros(1, 1, D, dtype=dtype)
    key = row.expand(1, size * MIB // row.nbytes, D)
    inputs = [t.requires_grad_() for t in (row.clone(), key, key.detach(), row[0, 0].clone())]
    return lambda: torch.autograd.grad(additive_attention(*inputs).sum(), inputs)


def test_no_more_is_kept_than_was_in_use_at_once(kept):
    # Had every block been kept, blocks too small for the next step would add up to some 350 MiB.
    start = time.monotonic()
    for size in (4, 6, 10, 16, 26, 42, 67):
        gradients_of(size)()
    found, at_once = kept(), time.monotonic() - start < 5  # what lies idle for longer is given back
    assert found < 170 and (found > 130 or not at_once)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_not_copied_to_single(dtype, kept):
    gradients_of(32, dtype=dtype)()
    assert 60 < kept() < 76  # the gradients alone


def test_what_was_made_once_is_given_back(kept):
    """But from the third step on, a step finds all the memory of the last."""
    gradients = gradients_of(19)

    def addresses():
        return {t.data_ptr() for step in [gradients() for _ in range(12)] for t in step[1:3]}

    held = [gradients() for _ in range(12)]
    assert kept() > 450
    del held
    assert kept() < 290
    for _ in range(3):
        last = addresses()
    assert addresses() == last


def test_empty_cache_gives_everything_back(kept):
    gradients_of(64)()
    assert kept() > 120
    fusedattn.empty_cache()
    assert kept() < 16


def test_what_nobody_asks_for_is_given_back_by_the_next_call(kept):
    gradients_of(64)()
    time.sleep(5.1)
    assert kept() > 120
    film(torch.ones(1, 1))
    assert kept() < 16


@pytest.fixture
def address_space():
    """A function that limits the memory of this process to so many MiB more than it has."""
    limits = resource.getrlimit(resource.RLIMIT_AS)

    def limit(more):
        resource.setrlimit(resource.RLIMIT_AS, (int(status("VmSize") + more) * MIB, limits[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_AS, limits)


def test_under_a_limit_nothing_is_kept_from_others(kept, address_space):
    address_space(1200)
    for _ in range(3):
        gradients_of(128)()
    assert torch.empty(1024 * MIB, dtype=torch.int8).numel() == 1024 * MIB


@pytest.mark.parametrize("size, count", [(1 << 13, 500), (1 << 22, 1)], ids=["small", "large"])
def test_what_is_kept_is_given_back_before_an_allocation_fails(size, count, kept, address_space):
    x = torch.ones(1, 16, size)
    gradients_of(100)()
    address_space(150)
    results = [film(x) for _ in range(count)]  # 250 MiB
    assert all(torch.equal(y, x) for y in results)


def test_huge_pages_end_with_the_results_that_lay_in_them(kept):
    def flagged():
        with open("/proc/self/smaps") as maps:
            return sum(line.startswith("VmFlags") and " hg" in line for line in maps)

    before = flagged()
    held = [film(torch.ones(1, n, 1024)) for n in range(2048, 16384, 1024)]
    held.append(additive_attention(*torch.ones(3, 1, 1100, 64), torch.ones(64), return_weights=True))
    assert flagged() > before
    del held
    fusedattn.empty_cache()
    assert flagged() == before


def test_without_reuse_the_c_library_still_keeps_blocks_of_a_few_mib():
    """A mapping of each result's own would be cleared page by page: five times the time of a small film."""
    program = """
import resource, torch
from fusedattn import film
x, faults = torch.ones(16, 256, 16, 16), [0]
for _ in range(4):
    for _ in range(20): film(x)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(min(after - before for before, after in zip(faults, faults[1:])))
"""
    command, environment = [sys.executable, "-c", program], os.environ | {"FUSEDATTN_REUSE_MEMORY": "0"}
    assert int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout) < 20


def test_out_of_memory_says_how_much_was_asked_for():
    x = torch.ones(1, 1, 1).expand(1, 1 << 40, 1)
    for call in (
        lambda: additive_attention(x[:, :1], x, x, x[0, 0, :1]),
        lambda: additive_attention(x[:, :1], x, x, x[0, 0, :1], return_weights=True),
        lambda: additive_attention(x, x[:, :1], x[:, :1], x[0, 0, :1]),
    ):
        with pytest.raises(RuntimeError, match=r"out of memory: tried to allocate \d{13} bytes"):
            call()


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="before 2.13 torch does not say what went wrong within it")
def test_errors_of_torch_itself_keep_their_message():
    x = torch.ones(1, 1, 1).expand(1, 1 << 40, 1)
    for call in (
        lambda: film(x, channel_dim=2),
        lambda: film(x[0].expand(1 << 40, 2), activation="silu"),
        lambda: torch.ops.fusedattn.film_bwd(
            x, x, None, None, None, None, channel_dim=2, gamma_offset=0.0, activation=0, output_mask=1
        ),
    ):
        with pytest.raises(RuntimeError, match=r"tried to allocate \d{13} bytes"):
            call()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_of_fork_computes_while_the_parent_does():
    done = threading.Event()

    def steps():
        while not done.is_set():
            for size in (10, 30, 90):  # each needs other blocks
                gradients_of(size)()

    threads = [threading.Thread(target=steps) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                torch.set_num_threads(1)
                gradients_of(2)()
                os._exit(0)
            end = time.monotonic() + 20
            while os.waitpid(child, os.WNOHANG) == (0, 0):
                if time.monotonic() > end:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    pytest.fail("the child hangs")
                time.sleep(0.001)
    finally:
        done.set()
        for thread in threads:
            thread.join()
