"""A plugin of pytest that runs a package's own tests with its modules replaced (CONTRIBUTING.md).

Every module that is called from outside of another one is replaced before its first call.
"""

import collections

import pytest
from torch import nn

from fusedattn import dropin
from fusedattn.dropin import _small

_CALL = nn.Module.__call__
_REPLACED: collections.Counter = collections.Counter()


@pytest.fixture(autouse=True)
def replaced(monkeypatch):
    """At any size, since those of tests are small."""
    depth = 0

    def call(self, *args, **kwargs):
        nonlocal depth
        if depth == 0:
            depth += 1
            try:
                found = dropin.replace(self).replaced
            finally:
                depth -= 1
            _REPLACED.update(entry.adapter.name for entry in found if entry.reason == "")
        depth += 1
        try:
            return _CALL(self, *args, **kwargs)
        finally:
            depth -= 1

    monkeypatch.setattr(nn.Module, "__call__", call)
    with _small.always_fused():
        yield


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"replaced: {dict(_REPLACED)}")
