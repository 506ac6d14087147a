"""Imported by the server that every measurement is forked from (fresh.py): what each would else do again.

Loads the parts of torch.compile and lets Inductor find out, once, what the C++ compiler and the CPU can do, which
takes it a second in every process. Nothing is compiled here: its threads would not survive the fork. These names
are PyTorch's own; in a version without them the server skips this module and measurements only start later.
"""

import torch._functorch._aot_autograd.graph_compile
import torch._inductor.codegen.cpp
import torch._inductor.compile_fx
import torch._inductor.graph  # noqa: F401
from torch._inductor.codecache import torch_key
from torch._inductor.cpu_vec_isa import pick_vec_isa

pick_vec_isa()
torch_key()
