"""What a run tells the person who waits for it: lines and one progress bar, all on stderr."""

from __future__ import annotations

import sys
from typing import Any

from harness.files.shown import message, one_line, say


class Console:
    """Says nothing; what runs outside the command line get."""

    def say(self, line: str) -> None:
        """One line for the user."""

    def progress(self, label: str, done: int, total: int) -> None:
        """How far the job called `label` is; `harness.method.Progress`."""

    def mean(self, label: str, metric: str, value: float) -> None:
        """The mean so far of the main number of the samples that the job called `label` made."""

    def close(self) -> None:
        """Take the progress bars away."""


class Named(Console):
    """One of several jobs that another console hears of: lines and labels begin with its name."""

    def __init__(self, console: Console, name: str) -> None:
        self.console, self.name = console, name

    def say(self, line: str) -> None:
        self.console.say(f"{self.name}: {line}")

    def progress(self, label: str, done: int, total: int) -> None:
        self.console.progress(f"{self.name}: {label}", done, total)

    def mean(self, label: str, metric: str, value: float) -> None:
        self.console.mean(f"{self.name}: {label}", metric, value)

    def close(self) -> None:
        self.console.close()


def terminal_or_notebook() -> Console:
    """Where a Python session shows what it waits for."""
    return Notebook() if _in_notebook() else Terminal()


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


class Notebook(Console):
    """Lines and bars in the output of a Jupyter cell; needs no widgets."""

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}

    def say(self, line: str) -> None:
        say(message(line), stream=sys.stderr)

    def progress(self, label: str, done: int, total: int) -> None:
        from html import escape

        from IPython.display import HTML, display  # type: ignore[import-not-found, unused-ignore]

        bar = HTML(f'{escape(label)} <progress value="{done}" max="{total}"></progress> {done}/{total}')
        if label in self._bars:
            self._bars[label].update(bar)
        else:
            self._bars[label] = display(bar, display_id=True)

    def close(self) -> None:
        """Bars stay, as what a cell shows does; the next job of that name gets its own."""
        self._bars = {}


class Terminal(Console):
    """Lines on stderr, and bars where stderr is a terminal."""

    def __init__(self) -> None:
        self._bars: Any = None
        self._jobs: dict[str, Any] = {}
        self._means: dict[str, str] = {}

    def mean(self, label: str, metric: str, value: float) -> None:
        self._means[label] = one_line(f"{metric} {value:.4f}")

    def say(self, line: str) -> None:
        self.close()
        say(message(line), stream=sys.stderr)

    def progress(self, label: str, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            return
        if self._bars is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[pace]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[mean]}", markup=False),
            )
            # the time left by the pace of the last hour: a sample may take longer than rich's own 30 seconds
            self._bars = Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=3600)
            self._bars.start()
        if label not in self._jobs:
            for one in self._bars.tasks:  # of jobs that are done, those that came to a number stay
                if one.finished and not one.fields["mean"]:
                    self._bars.update(one.id, visible=False)
            self._jobs[label] = self._bars.add_task(one_line(label), total=total, pace="", mean="")
        job = self._jobs[label]
        self._bars.update(job, completed=done, total=total)
        speed = self._bars.tasks[self._bars.task_ids.index(job)].speed
        self._bars.update(job, pace=f"{speed:.3g}/s" if speed else "", mean=self._means.get(label, ""))

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars, self._jobs, self._means = None, {}, {}
