"""Compiles a model with attention and FiLM into a package that a C++ program runs without Python: ``main.cpp``.

``python export.py model.pt2`` writes the package and says how to build and start the program.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.cpp_extension import include_paths, library_paths

import fusedattn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.film = fusedattn.FiLM(4, 6, channel_dim=2, activation="silu")
        self.attention = fusedattn.AdditiveAttention(6, 6, 8, num_heads=2)

    def forward(self, x, condition):
        x = self.film(x, condition)
        return self.attention(x, x)


def example_inputs():
    """Those of main.cpp."""
    return torch.linspace(-1, 1, 60).view(2, 5, 6), torch.linspace(0, 1, 8).view(2, 4)


def library() -> str:
    """The compiled library of fusedattn, which registers the operators that the package calls."""
    return fusedattn._library._C.__file__


def build_command(program: str) -> list[str]:
    folders = library_paths()
    return [
        *("c++", "-std=c++17", "-O1", str(Path(__file__).with_name("main.cpp")), "-o", program),
        *(f"-isystem{path}" for path in include_paths()),
        *(f"-L{path}" for path in folders),
        *(f"-Wl,-rpath,{path}" for path in folders),
        *("-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"),
    ]


def main(package: str) -> None:
    torch.manual_seed(0)
    model = Model().eval()
    nn.init.normal_(model.film.conditioner.weight)
    exported = torch.export.export(model, example_inputs())
    torch._inductor.aoti_compile_and_package(exported, package_path=package)
    print("build:", *build_command("main"))
    print("run: ./main", package, library())
    print(model(*example_inputs()).flatten().tolist())


if __name__ == "__main__":
    main(sys.argv[1])
