"""Whether the libraries of a wheel load where manylinux_2_28 promises: glibc 2.28, the libstdc++ of GCC 8.

``python tests/needed_symbols.py WHEEL``; read with objdump, of binutils.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LATEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


def too_new(table: str) -> list[str]:
    """Symbols in the output of ``objdump -T`` that a library needs of versions past ``LATEST``."""
    found = []
    for name, version, symbol in re.findall(r"\*UND\*.* \(?([A-Z]+)_(\d[\d.]*)\)? +(\S+)$", table, re.MULTILINE):
        if name in LATEST and tuple(map(int, version.split("."))) > LATEST[name]:
            found.append(f"{symbol} ({name}_{version})")
    return sorted(found)


def of_library(library: Path) -> list[str]:
    return too_new(subprocess.check_output(["objdump", "-T", str(library)], text=True))


def main(wheel: str) -> None:
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        libraries = [archive.extract(name, folder) for name in archive.namelist() if name.endswith(".so")]
        found = {library: of_library(Path(library)) for library in libraries}
    if not found:
        sys.exit(f"{wheel}: no library in it")
    for library, symbols in found.items():
        print(f"{Path(library).name}: {', '.join(symbols) or 'loads with glibc 2.28'}")
    if any(found.values()):
        sys.exit(f"{wheel} needs later libraries than manylinux_2_28 has")


if __name__ == "__main__":
    main(sys.argv[1])
