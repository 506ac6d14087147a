"""Progress that suits where it goes: a bar on a terminal, a few lines in a file or a CI log."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Tracker:
    """A bar on a terminal, redrawn once a second; elsewhere one line per tenth of the work. A context manager."""

    def __init__(self, console: Console, title: str, total: int):
        self._terminal = (
            console.file.isatty()
        )  # FORCE_COLOR, common in CI, makes console.is_terminal true in a log
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self._bar = Progress(*columns, console=console, refresh_per_second=1, disable=not self._terminal)
        self._task = self._bar.add_task(title, total=total)
        self._console, self._title, self._total = console, title, total
        self._done, self._what, self._start = 0, "", time.monotonic()

    def __enter__(self) -> "Tracker":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def describe(self, what: str) -> None:
        """Says what comes next, or how it stands."""
        self._what = what
        self._bar.update(self._task, description=f"{self._title}: {what}")

    def advance(self) -> None:
        tenth = 10 * self._done // self._total
        self._done += 1
        self._bar.advance(self._task)
        if not self._terminal and 10 * self._done // self._total > tenth:
            seconds = time.monotonic() - self._start
            self._console.print(
                f"{self._title}: {self._done} of {self._total}, {self._what} ({seconds:.0f} s)", highlight=False
            )
