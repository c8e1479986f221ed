# SPDX-License-Identifier: Apache-2.0
"""The commands as the user sees them: names, options, help. What they do is elsewhere."""

from __future__ import annotations

from typing import Annotated

import typer

import headinfer
from headinfer.cli import bench as benchmarks
from headinfer.cli import contexts, prose, saved
from headinfer.cli import demo as story
from headinfer.cli import options as opt
from headinfer.cli.job import Job, Memory
from headinfer.cli.program import FAILED, Program, exit_on_terminate
from headinfer.errors import InputError

app = typer.Typer(
    cls=Program,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(benchmarks.app, name="bench")


app.add_typer(contexts.app, name="contexts")


def main() -> None:
    """Entry point of the `headinfer` command."""
    exit_on_terminate()
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"headinfer {headinfer.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True, help=prose.ABOUT)
def about(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """What `headinfer` alone prints."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command(help=prose.DEMO)
def demo(
    question: Annotated[
        str,
        typer.Option(
            metavar="TEXT", help="What to ask about the story.", rich_help_panel=opt.PROMPT
        ),
    ] = story.QUESTION,
    max_new_tokens: opt.MaxNewTokens = 48,
    compare: Annotated[
        bool,
        typer.Option(
            help="Ask again with the whole cache resident, and compare.",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = True,
    gpu_memory: opt.GpuMemory = None,
    host_memory: opt.HostMemory = None,
    device: opt.Device = None,
    dtype: opt.DtypeOption = None,
    as_json: opt.AsJson = False,
) -> None:
    """Ask the embedded model about the story."""
    story.demo(
        Job(
            model="demo",
            text=story.document(),
            question=question,
            max_new_tokens=max_new_tokens,
            memory=Memory(gpu_memory, host_memory),
            device=device,
            dtype=opt.name(dtype),
            compare=compare,
            as_json=as_json,
        )
    )


@app.command(help=prose.RUN)
def run(
    model: opt.Model,
    file: opt.File = None,
    prompt_file: opt.PromptFile = None,
    prompt: opt.Prompt = None,
    question: opt.Question = None,
    chat: opt.Chat = None,
    allow_beyond_positions: opt.AllowBeyondPositions = False,
    max_new_tokens: opt.MaxNewTokens = 256,
    do_sample: opt.DoSample = False,
    temperature: opt.Temperature = None,
    top_p: opt.TopP = None,
    top_k: opt.TopK = None,
    seed: opt.Seed = None,
    num_beams: opt.NumBeams = 1,
    repetition_penalty: opt.RepetitionPenalty = None,
    gpu_memory: opt.GpuMemory = None,
    host_memory: opt.HostMemory = None,
    disk: opt.Disk = None,
    disk_memory: opt.DiskMemory = None,
    chunk_tokens: opt.ChunkTokens = None,
    kv_format: opt.KVFormatOption = None,
    on_unsupported: opt.OnUnsupportedOption = opt.OnUnsupported.error,
    save: opt.Save = None,
    context: opt.Context = None,
    append: opt.Append = False,
    checkpoint_every: opt.CheckpointEvery = "30s",
    restart: opt.Restart = False,
    other_versions: opt.OtherVersions = False,
    device: opt.Device = None,
    dtype: opt.DtypeOption = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    as_json: opt.AsJson = False,
) -> None:
    """Ask a model about a text."""
    from headinfer.cli.job import execute, print_comparison, print_json
    from headinfer.cli.prompt import one_file, read_prompt

    on_disk = saved.OnDisk(save, context, append, checkpoint_every, restart, other_versions)
    name = one_file(file, prompt_file)
    has_text = name is not None or prompt is not None
    saved.check(on_disk, has_text=has_text, question=question, num_beams=num_beams)
    text = None if on_disk.context is not None else read_prompt(name, prompt, question)
    if on_disk.save is not None and text is None:
        raise InputError("--save needs a text to read: name a FILE, or give --prompt TEXT")
    job = Job(
        model=model,
        text=text,
        question=question,
        max_new_tokens=max_new_tokens,
        memory=Memory(
            gpu_memory,
            host_memory,
            chunk_tokens,
            on_unsupported.value,
            disk,
            disk_memory,
            opt.name(kv_format),
        ),
        device=device,
        dtype=opt.name(dtype),
        trust_remote_code=trust_remote_code,
        chat=chat,
        sampling={
            "do_sample": do_sample,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "seed": seed,
            "num_beams": num_beams,
            "repetition_penalty": repetition_penalty,
        },
        beyond=allow_beyond_positions,
        as_json=as_json,
    )
    outcome = saved.execute(job, on_disk) if on_disk.wanted else execute(job)
    if as_json:
        print_json(outcome.as_dict())
    else:
        print_comparison(outcome)


@app.command(help=prose.PLAN)
def plan(
    model: opt.Model,
    tokens: Annotated[
        str,
        typer.Option(
            metavar="N",
            help="Length of the prompt; 128K and 1M are 2**17 and 2**20.",
            show_default=False,
        ),
    ],
    new_tokens: Annotated[
        int, typer.Option(metavar="N", min=0, help="Length of the answer.")
    ] = 256,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences at once.")] = 1,
    gpu: opt.Gpu = None,
    ram: opt.Ram = None,
    gpu_memory: opt.GpuMemory = None,
    host_memory: opt.HostMemory = None,
    disk: opt.Disk = None,
    disk_memory: opt.DiskMemory = None,
    chunk_tokens: opt.ChunkTokens = None,
    kv_format: opt.KVFormatOption = None,
    allow_beyond_positions: opt.AllowBeyondPositions = False,
    plot: opt.Plot = None,
    device: opt.Device = None,
    dtype: opt.DtypeOption = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    as_json: opt.AsJson = False,
) -> None:
    """Say what a run would take."""
    from headinfer.cli.examine import Elsewhere, show_plan

    show_plan(
        model,
        Memory(
            gpu_memory,
            host_memory,
            chunk_tokens,
            disk=disk,
            disk_memory=disk_memory,
            kv_format=opt.name(kv_format),
        ),
        Elsewhere(gpu, ram),
        tokens=opt.token_count(tokens),
        new_tokens=new_tokens,
        batch=batch,
        device=device,
        dtype=opt.name(dtype),
        trust_remote_code=trust_remote_code,
        beyond=allow_beyond_positions,
        plot=plot,
        as_json=as_json,
    )


@app.command(help=prose.DOCTOR)
def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Also compare this model's answers with and without headinfer.",
            show_default=False,
        ),
    ] = None,
    device: opt.Device = None,
    dtype: opt.DtypeOption = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Measure this machine's rates again; takes some seconds."),
    ] = False,
    disk: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Measure how fast this folder's disk is written and read, for plans with --disk.",
            show_default=False,
        ),
    ] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Examine the machine, and a model."""
    from headinfer.cli.examine import examine

    ok = examine(
        model,
        device=device,
        dtype=opt.name(dtype),
        trust_remote_code=trust_remote_code,
        probe=probe,
        disk=disk,
        as_json=as_json,
    )
    if not ok:
        raise typer.Exit(FAILED)
