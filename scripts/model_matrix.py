#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Prints which model families answer the same streamed as resident, and how exactly.

    python scripts/model_matrix.py                       # the whole zoo, about a minute
    python scripts/model_matrix.py llama gemma2          # some of it
    python scripts/model_matrix.py --write docs/models.md

The exit status is 1 if a family fails, so the table is a check as well.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

import headinfer
from headinfer.errors import HeadInferError
from headinfer.testing.zoo import REFUSED, ZOO, Column, Entry, Kind, ModelAbsent
from headinfer.testing.zoo.measure import (
    BOUND,
    CHUNK_TOKENS,
    PROMPT_TOKENS,
    Cell,
    compare,
    run,
    streamed,
)

HEADINGS = ("family", "kind", "head-wise / all layers", "worst error", "tokens equal", "notes")


@dataclass(frozen=True, slots=True)
class Row:
    """One family: its cells, or why there are none."""

    entry: Entry
    cells: dict[Column, Cell]
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Every column within the bound; an absent model is no failure."""
        return not self.problem and all(cell.ok for cell in self.cells.values())

    @property
    def worst(self) -> float:
        """The largest relative error of the logits."""
        return max((cell.error for cell in self.cells.values()), default=float("nan"))

    def texts(self) -> tuple[str, ...]:
        """The cells of the printed table."""
        layers = f"{self.entry.head_wise} / {self.entry.layers}"
        if self.problem:
            return self.entry.name, self.entry.kind.value, layers, "", "", self.problem
        wrong = [c.value for c, cell in self.cells.items() if not cell.tokens_equal]
        tokens = "yes" if not wrong else "no: " + ", ".join(wrong)
        notes = "; ".join(notes_on(self.entry))
        return self.entry.name, self.entry.kind.value, layers, f"{self.worst:.1e}", tokens, notes


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="FAMILY", help="default: all")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also as a Markdown page")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in ZOO]
    if unknown:
        parser.error(f"not in the zoo: {', '.join(unknown)}")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.getLogger("headinfer").setLevel(logging.ERROR)

    console = Console(stderr=True)
    entries = [ZOO[name] for name in options.names or ZOO]
    found = [measured(entry) for entry in track(entries, "measuring", console=console)]
    rows = [row for row in found if row is not None]
    Console().print(table(rows))
    failed = [row.entry.name for row in rows if not row.ok]
    absent = [entry.name for entry, row in zip(entries, found, strict=True) if row is None]
    console.print(summary(rows, failed))
    if absent:
        console.print(f"not in transformers {transformers.__version__}: {', '.join(absent)}")
    if options.write:
        options.write.write_text(page(rows), encoding="utf-8")
        console.print(f"written: {options.write}")
    return 1 if failed else 0


def measured(entry: Entry) -> Row | None:
    """Every column of one family, resident against streamed; None if transformers does not have it."""
    try:
        model = entry.build()
    except ModelAbsent:
        return None
    columns = entry.columns()
    reference = {column: run(model, entry, column, resident=True) for column in columns}
    cells = {}
    try:
        for column in columns:
            with streamed(model):
                got = run(model, entry, column, resident=False)
            cells[column] = compare(reference[column], got)
    except (HeadInferError, RuntimeError, TypeError, ValueError) as error:
        return Row(entry, cells, f"{type(error).__name__}: {str(error).splitlines()[0]}")
    return Row(entry, cells)


def notes_on(entry: Entry) -> list[str]:
    """What a reader should know about the family."""
    notes = []
    if not entry.head_wise:
        notes.append("windows only: nothing to offload")
    if entry.unchunkable:
        notes.append(
            f"chunked prefill differs from one-shot with any cache: {entry.unchunkable.reason}"
        )
    missing = [column for column in Column if column not in entry.columns()]
    notes.extend(f"no {column.value}: {entry.skips[column].reason}" for column in missing)
    return notes


def table(rows: Iterable[Row]) -> Table:
    """For the terminal."""
    found = Table(title="streamed against resident keys and values, fp32")
    for heading in HEADINGS:
        found.add_column(heading, no_wrap=heading in ("family", "worst error"))
    for row in rows:
        found.add_row(*row.texts(), style=None if row.ok else "red")
    return found


def summary(rows: list[Row], failed: list[str]) -> str:
    """One line: how many, and which not."""
    good = {row.entry.model_type for row in rows if row.ok}
    line = f"{len(good)} model types within {BOUND:.0e}, tokens equal"
    return line + (f"; failed: {', '.join(failed)}" if failed else "; none failed")


def page(rows: list[Row]) -> str:
    """The page in the documentation."""
    good = {row.entry.model_type for row in rows if row.ok}
    worst = max(row.worst for row in rows if not row.problem)
    kinds = [row for row in rows if row.entry.kind is Kind.CAUSAL_LM]
    lines = [
        "# Models",
        "",
        f"{len(good)} model types of transformers answer the same with their keys and values streamed head by head as",
        f"with transformers' resident cache: largest relative error {worst:.1e} (bound {BOUND:.0e}), all tokens equal.",
        "",
        f"Tiny models with random weights ({len(kinds)} decoders, {len(rows) - len(kinds)} others), fp32 on a CPU, against `eager` attention",
        f"and `DynamicCache`; transformers {transformers.__version__}, headinfer {headinfer.__version__}. A prompt of {PROMPT_TOKENS} tokens, tiles of one KV head and",
        f"a few tokens through the staging ring. Columns: {', '.join(column.value for column in Column)};",
        f"chunks of {CHUNK_TOKENS} tokens. Error: largest difference of a logit over the largest logit. Layers that",
        "are not head-wise keep a window, a state or somebody else's keys; transformers handles them as ever.",
        "",
        "Written by `python scripts/model_matrix.py --write docs/models.md`; `tests/models` checks every cell.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "| --- | --- | ---: | ---: | --- | --- |",
    ]
    lines += ["| " + " | ".join(row.texts()) + " |" for row in rows]
    lines += [
        "",
        "## Refused",
        "",
        'These raise an error that says so. `on_unsupported="materialize"` gathers one layer at a time on the device',
        "and changes no bit, where the last column says exact.",
        "",
        "| model type | why | materialised |",
        "| --- | --- | --- |",
    ]
    for refused in REFUSED.values():
        exact = "exact" if refused.materializes else "no: use a stock cache"
        lines.append(f"| {refused.name} | {refused.reason} | {exact} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
