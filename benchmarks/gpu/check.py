"""What this machine is, and whether the CUDA kernels can run on it: status 1 if not."""

import sys

from fusedattn import info

from .device import backends, stamp
from .stages import record, rehearsing


def main() -> int:
    print(info.report(), flush=True)
    reasons = backends()
    missing = {name: why for name, why in reasons.items() if why}
    record(kind="check", reasons=reasons, **({} if missing.get("cuda") else {"machine": stamp()}))
    for name, why in missing.items():
        print(f"{name} cannot run: {'; '.join(why)}", file=sys.stderr)
    return int("cuda" in missing and not rehearsing())


if __name__ == "__main__":
    sys.exit(main())
