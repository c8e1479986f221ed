# SPDX-License-Identifier: Apache-2.0
"""`headinfer bench` and what belongs to it: a shell over `headinfer.bench`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headinfer.cli import prose
from headinfer.cli.program import FAILED

if TYPE_CHECKING:
    from rich.console import RenderableType

UNFINISHED = 3
WIDTH = 180
"""Of tables that do not go to a terminal."""

app = typer.Typer(
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

ResultFile = Annotated[
    Path,
    typer.Argument(
        metavar="RESULTS", help="A file written by headinfer bench.", show_default=False
    ),
]
CHOICE, RUNNING = "Choice", "Running"
BenchDevice = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="cpu|cuda",
        help="cpu leaves a GPU alone. Default: all there is.",
        show_default=False,
        rich_help_panel=RUNNING,
    ),
]


@app.callback(invoke_without_command=True, help=prose.BENCH)
def bench(
    ctx: typer.Context,
    case: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A case by name or pattern; repeatable. Default: those for this machine.",
            show_default=False,
            rich_help_panel=CHOICE,
        ),
    ] = None,
    contestant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A contestant by name or pattern; repeatable. Default: all of the case.",
            show_default=False,
            rich_help_panel=CHOICE,
        ),
    ] = None,
    contexts: Annotated[
        str | None,
        typer.Option(
            metavar="LENGTHS",
            help="Context lengths in tokens, such as 32K,128K. Default: those of the case.",
            show_default=False,
            rich_help_panel=CHOICE,
        ),
    ] = None,
    list_: Annotated[
        bool,
        typer.Option(
            "--list", help="List cases and contestants and leave.", rich_help_panel=CHOICE
        ),
    ] = False,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="Where the results go, after every run.",
            rich_help_panel=RUNNING,
        ),
    ] = Path("headinfer-bench.json"),
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with FILE: what is in it is not measured again.",
            rich_help_panel=RUNNING,
        ),
    ] = False,
    max_seconds: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Stop after that time; a run under way is given up. Default: no limit.",
            show_default=False,
            rich_help_panel=RUNNING,
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Fewer repeats and tokens per run.", rich_help_panel=RUNNING),
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Of the order of contestants and the weights.",
            rich_help_panel=RUNNING,
        ),
    ] = 0,
    commit: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Commit to record. Default: what git says.",
            show_default=False,
            rich_help_panel=RUNNING,
        ),
    ] = None,
    device: BenchDevice = None,
) -> None:
    """Measure."""
    if ctx.invoked_subcommand is not None:
        return
    if list_:
        _show(_listing())
        return
    from headinfer.bench.cases import parse_contexts
    from headinfer.bench.program import Request
    from headinfer.bench.program import bench as run
    from headinfer.bench.tables import report
    from headinfer.cli.console import print_note

    request = Request(
        out=out,
        cases=tuple(case or ()),
        contestants=tuple(contestant or ()),
        contexts=parse_contexts(contexts) if contexts else (),
        resume=resume,
        max_seconds=max_seconds,
        quick=quick,
        seed=seed,
        device=device,
        command=" ".join(["headinfer", *sys.argv[1:]]),
        commit=commit,
    )
    ended = run(request, print_note)
    _show(report(ended.results))
    print_note(f"results are in {out}")
    if ended.why:
        print_note(f"{ended.left} runs are left: {ended.why}; go on with --resume")
        raise typer.Exit(UNFINISHED)
    if not ended.results.verified:
        raise typer.Exit(FAILED)


@app.command(help=prose.BENCH_VERIFY)
def verify(device: BenchDevice = None) -> None:
    """Exactness only."""
    from headinfer.bench.program import verify_only
    from headinfer.cli.console import print_note

    results = verify_only(device, print_note)
    failed = [check.name for check in results.checks if check.gates and not check.ok]
    typer.echo(f"{len(results.checks)} checks, {len(failed)} failed")
    if failed:
        raise typer.Exit(FAILED)


@app.command(help=prose.BENCH_SHOW)
def show(
    results: ResultFile,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Bounds and times as tables for a page.")
    ] = False,
) -> None:
    """Tables of a file."""
    from headinfer.bench.results import read
    from headinfer.bench.tables import markdown, report

    found = read(results)
    if as_markdown:
        typer.echo(markdown(found))
    else:
        _show(report(found))


@app.command(help=prose.BENCH_PLOT)
def plot(
    results: ResultFile,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where the pictures go. Default: beside RESULTS, named after it.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Pictures of a file."""
    from headinfer.bench.plots import plot as draw
    from headinfer.bench.results import read

    for path in draw(read(results), out or results.with_suffix("")):
        typer.echo(path)


def _listing() -> RenderableType:
    from rich.console import Group
    from rich.table import Table

    from headinfer.bench.cases import CASES, KNOWN

    cases = Table("case", "needs", "what", "contestants", title="cases", title_justify="left")
    for case in CASES.values():
        cases.add_row(case.name, case.device, str(case), ", ".join(case.contestants))
    people = Table("contestant", "", title="contestants", title_justify="left")
    for contestant in KNOWN.values():
        people.add_row(contestant.name, contestant.label)
    return Group(cases, people)


def _show(what: RenderableType) -> None:
    """On standard output: tables are the answer here."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    console.print(what)
