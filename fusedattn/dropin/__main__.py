"""``python -m fusedattn.dropin path/to/module.py:build``: what ``replace`` would make of the model of build().

``package.module:name`` does, too; the name is that of a module, or of what makes one without arguments. Without an
argument: the list of what is known.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

from torch import nn

from fusedattn.dropin import replace, supported


def _load(target: str) -> nn.Module:
    where, _, name = target.rpartition(":")
    if not where:
        sys.exit(f"expected path/to/module.py:build or package.module:build, got {target!r}")
    if where.endswith(".py"):
        sys.path.insert(0, str(Path(where).resolve().parent))
        spec = importlib.util.spec_from_file_location(Path(where).stem, where)
        if spec is None or spec.loader is None or not Path(where).is_file():
            sys.exit(f"expected a Python file, got {where!r}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, "")
        module = importlib.import_module(where)
    found = getattr(module, name)
    model = found if isinstance(found, nn.Module) else found()
    if not isinstance(model, nn.Module):
        sys.exit(f"expected {target} to make a torch.nn.Module, got {type(model).__name__}")
    return model


def main(arguments: list[str]) -> None:
    if len(arguments) > 1 or arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
    elif arguments:
        print(replace(_load(arguments[0])))
    else:
        print("\n".join(map(str, supported())))


if __name__ == "__main__":
    main(sys.argv[1:])
