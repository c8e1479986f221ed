# SPDX-License-Identifier: Apache-2.0
"""What the user sees beside the answer: notes, bars and tables, all on standard error."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from headinfer.budget import format_bytes
from headinfer.progress import ChunkCost, Event, ForwardStarted, PrefillClock

if TYPE_CHECKING:
    from headinfer.hf.demo_model import Step

stderr = Console(stderr=True, highlight=False)


def print_error(message: str) -> None:
    """One line, never wrapped: scripts read it too."""
    line = Text.assemble(("error: ", "bold red"), message)
    stderr.print(line, soft_wrap=True)


def print_note(message: str) -> None:
    stderr.print(Text(message, style="dim"), soft_wrap=True)


def write_answer(text: str) -> None:
    """A piece of the answer, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print_note(f"note: {record.getMessage()}")


def show_warnings() -> None:
    """Print what headinfer logs as warnings, once each."""
    logger = logging.getLogger("headinfer")
    if not any(isinstance(handler, _Notes) for handler in logger.handlers):
        logger.addHandler(_Notes(logging.WARNING))


@contextlib.contextmanager
def working(message: str) -> Iterator[None]:
    """A spinner on a terminal, a line elsewhere."""
    if not stderr.is_terminal:
        print_note(message)
        yield
        return
    with stderr.status(message):
        yield


class PreparationBar:
    """Shows the steps that prepare the demo model; silent if there are none."""

    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[bytes]}"),
            console=stderr,
            disable=not stderr.is_terminal,
        )
        self._name = ""
        self._task = self._progress.add_task("", total=None, bytes="", visible=False)

    def __enter__(self) -> PreparationBar:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.update(self._task, visible=False)
        self._progress.stop()

    def __call__(self, step: Step) -> None:
        if step.name != self._name:
            self._name = step.name
            self._progress.reset(self._task)
            if not stderr.is_terminal:
                print_note(step.name)
        counted = f"{format_bytes(step.done_bytes)} of {format_bytes(step.total_bytes)}"
        self._progress.update(
            self._task,
            description=step.name,
            completed=step.done_bytes,
            total=step.total_bytes or None,
            bytes=counted if step.total_bytes else "",
            visible=True,
        )


class _Remaining(ProgressColumn):
    """Counts down between chunks from what the clock last said."""

    max_refresh = 0.5

    def render(self, task: Any) -> Text:
        eta, at = task.fields["eta"], task.fields["at"]
        if task.finished:
            return Text("")
        if eta is None:
            return Text("timing the first chunk", style="dim")
        left = max(eta - (time.perf_counter() - at), 0.0)
        minutes, seconds = divmod(round(left), 60)
        return Text(f"{minutes}:{seconds:02d} left", style="cyan")


class PrefillBar:
    """An observer that shows a prefill: tokens, rate, and an ETA that knows attention's cost.

    It stays until decoding begins or somebody closes it: on a GPU the last chunk is still being
    computed when its forward pass returns.
    """

    def __init__(self, total_tokens: int) -> None:
        self._clock = PrefillClock(total_tokens)
        self._total = total_tokens
        self._resumed = 0
        self._started = time.perf_counter()
        self._progress = Progress(
            TextColumn("reading"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:,} of {task.total:,} tokens"),
            TextColumn("{task.fields[rate]}", style="dim"),
            _Remaining(),
            console=stderr,
            disable=not stderr.is_terminal,
            redirect_stdout=False,  # the answer goes there
        )
        self._task = self._progress.add_task(
            "", total=total_tokens, rate="", eta=None, at=self._started
        )
        self._open = False

    def expect(self, cost: ChunkCost, *, measured: bool, chunk_tokens: int) -> None:
        """What the cost model says of a chunk; see `PrefillClock`. Before the first one is read."""
        self._clock.cost, self._clock.measured = cost, measured
        self._clock.chunk_tokens = chunk_tokens
        self._progress.update(self._task, eta=self._clock.eta_s())

    def resume(self, done_tokens: int) -> None:
        """The first `done_tokens` need not be read again."""
        self._resumed = done_tokens
        self._clock.resume(done_tokens)
        self._progress.update(self._task, completed=done_tokens, eta=self._clock.eta_s())

    def __enter__(self) -> PrefillBar:
        self._started = time.perf_counter()
        self._progress.update(self._task, eta=self._clock.eta_s(), at=self._started)
        self._progress.start()
        self._open = True
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def on_event(self, event: Event) -> None:
        if not self._open:
            return
        if isinstance(event, ForwardStarted):
            if event.past_tokens >= self._total:
                self.close()
            return
        done, now = event.past_tokens + event.new_tokens, time.perf_counter()
        self._clock.observe(done, now - self._started)
        self._progress.update(
            self._task,
            completed=min(done, self._total),
            rate=f"{(done - self._resumed) / max(now - self._started, 1e-9):,.0f} tokens/s",
            eta=self._clock.eta_s(),
            at=now,
        )

    def close(self) -> None:
        """Take the bar off the terminal's last line; elsewhere, sum up in one line."""
        if not self._open:
            return
        self._open = False
        self._progress.stop()
        if not stderr.is_terminal and self._clock.done_tokens >= self._total:
            seconds = time.perf_counter() - self._started
            print_note(f"read {self._total - self._resumed:,} tokens in {seconds:.1f} s")


class AnswerStream:
    """Pieces of the answer to standard output, below a closed bar, and a line end after them."""

    def __init__(self, bar: PrefillBar, *, silent: bool) -> None:
        self._bar, self._silent, self._began = bar, silent, False

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        # An answer may be empty; an error before the first piece leaves no line behind.
        if not self._silent and (self._began or kind is None):
            write_answer("\n")

    def __call__(self, piece: str) -> None:
        self._bar.close()
        if not self._silent:
            self._began = True
            write_answer(piece)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", no_wrap=index > 0)
    for row in rows:
        table.add_row(*row)
    stderr.print(table)
