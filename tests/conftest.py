"""What holds for every test: uninitialised memory is NaN, work is split over threads, ids can be read."""

import os
from pathlib import Path

import choose
import pytest
import torch
from cuda_emulator import build
from device import BACKEND, DEVICE, INTERPRETED, force_backend, replace_in_package
from hypothesis import settings
from pairwise import EVERYTHING

import fusedattn
from fusedattn import _dispatch, _library

# The same draws every time; a night draws others.
settings.register_profile("project", deadline=None, derandomize=not EVERYTHING, database=None)
settings.load_profile("project")


def pytest_configure(config):
    config.addinivalue_line("markers", "levels: kernel tests, repeated at every CPU level (make test)")
    config.addinivalue_line("markers", "interpreted: kernel tests, repeated in Triton's interpreter (make test)")
    config.addinivalue_line("markers", "sanitized: emulated kernels, repeated under AddressSanitizer")
    config.addinivalue_line("markers", "races: emulated kernels on small shapes, repeated under ThreadSanitizer")
    config.addinivalue_line("markers", "sanitizers: the two markers before this one, repeated (make sanitize)")
    config.addinivalue_line("markers", "machinery: PyTorch's own, which takes seconds: see choose.py")
    config.addinivalue_line("markers", "compiled: runs what GPU kernels compile to, without a GPU (make gates)")
    # It keeps compiled derivatives by the graph of the forward pass alone, though operators have changed since.
    os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")
    # Two threads run every path that splits work, and cost little on the small tensors of tests.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(2)


if DEVICE == "standin":
    import standin

    replace_in_package(_dispatch.cuda_reasons, standin.cuda_reasons)
    standin.shorten_gradcheck()
if INTERPRETED:
    import triton_interpreter  # noqa: F401
if BACKEND != "auto":
    force_backend()


@pytest.hookimpl(trylast=True)  # of those that markers and names leave
def pytest_collection_modifyitems(config, items):
    if EVERYTHING:
        return
    if DEVICE == "standin":
        choose.keep(config, items, choose.each_value(items, standin.names_or_makes))
    elif choose.TESTS == "values":
        computing = [item for item in items if not item.get_closest_marker("machinery")]
        choose.keep(config, items, choose.each_value(computing))
    else:
        choose.keep(config, items, choose.machinery_once(items, apart=() if INTERPRETED else ("op",)))


def pytest_report_header():
    if _library.EXTENSION_ERROR is not None:
        return f"fusedattn: the extension did not load: {_library.EXTENSION_ERROR}"
    folder = Path(fusedattn.__file__).parent
    return (
        f"fusedattn {fusedattn.__version__} from {folder}, torch {torch.__version__}, "
        f"CPU level {_library.cpu_capability()}, {torch.get_num_threads()} threads"
    )


def pytest_make_parametrize_id(val, argname):
    """``float16``, ``is_causal`` or ``no_is_causal``, ``B2-Tq3-Tk5-D8-Dv8``, ``2x3x5``, ``2x3x5-1``."""
    if isinstance(val, torch.dtype):
        return str(val).removeprefix("torch.")
    if isinstance(val, bool):
        return argname if val else f"no_{argname}"
    if isinstance(val, dict) and "Tq" in val:
        return "-".join(f"{name}{size}" for name, size in val.items() if size is not None)
    if isinstance(val, tuple) and val:
        if all(type(n) is int for n in val):
            return "x".join(map(str, val))
        if isinstance(val[0], tuple):
            return "-".join(pytest_make_parametrize_id(x, argname) or str(x) for x in val)
    return None


@pytest.fixture
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def device_under_test():
    """Tensors that tests make without naming a device are made there."""
    torch.set_default_device(None if DEVICE == "cpu" else DEVICE)  # a mode costs, and changes what Dynamo does
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every fresh tensor, also one that C++ allocates, starts as NaN (integers: their largest value).

    What a kernel leaves unwritten then shows in any comparison. Deterministic algorithms are what switches
    torch's filling of uninitialised memory on.
    """
    # PyTorch itself has operators on GPUs, in references, without a deterministic form: they only warn.
    torch.use_deterministic_algorithms(True, warn_only=DEVICE != "cpu")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def emulated():
    """``emulated(name)``: the CUDA kernels that tests/cuda_emulator/bind_<name>.cpp binds, for the CPU."""
    if reason := build.missing():
        pytest.skip(reason)
    return build.load


@pytest.fixture(params=[0, 1, 2], ids=lambda seed: f"order{seed}")
def thread_order(request):
    """A seed for the order in which the emulator runs threads and blocks; 0 is ascending."""
    return request.param


@pytest.fixture
def reports():
    """What a backend of torch.compile reports, from nothing compiled before."""
    torch.compiler.reset()
    yield []
    torch.compiler.reset()
