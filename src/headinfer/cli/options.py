# SPDX-License-Identifier: Apache-2.0
"""The options that several commands share, each written once."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from headinfer.budget import parse_bytes
from headinfer.errors import InputError


class OnUnsupported(enum.StrEnum):
    """What to do with a model whose attention cannot be streamed."""

    error = "error"
    materialize = "materialize"


class KVFormat(enum.StrEnum):
    """How keys and values are stored in host memory."""

    exact = "exact"
    lossless = "lossless"


MODEL, PROMPT, GENERATION, MEMORY, OUTPUT = "Model", "Prompt", "Generation", "Memory", "Output"
DISK = "On disk"


class Dtype(enum.StrEnum):
    """Types weights can be loaded as; auto is as stored."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    auto = "auto"


def name(choice: enum.StrEnum | None) -> str | None:
    return None if choice is None else str(choice.value)


def _size(value: str | None, param: typer.CallbackParam) -> str | None:
    """Refuse what is not a size while the command line is read."""
    if value is not None:
        name = f"--{(param.name or '').replace('_', '-')}"
        try:
            parse_bytes(value, name=name)
        except InputError as error:
            raise typer.BadParameter(str(error).removeprefix(f"{name}=")) from error
    return value


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder with safetensors weights, a GGUF file, the id of a model on a hub, or "
        "[bold]demo[/bold] for the small embedded one.",
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",  # named: typer 0.27 makes the name from a metavar that equals it
        metavar="DEVICE",
        help="cpu, cuda or cuda:N. Default: cuda where there is one.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(
        metavar="|".join(Dtype),
        help="Default: as stored; demo and GGUF on a CPU: float32.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the model. Read it first.",
        rich_help_panel=MODEL,
    ),
]
Gpu = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help='Plan for a GPU one does not have, e.g. "RTX 4090"; times are then estimates.',
        show_default=False,
        rich_help_panel=MEMORY,
    ),
]
Ram = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        callback=_size,
        help="Plan for a machine with this much memory, e.g. 64GiB.",
        show_default=False,
        rich_help_panel=MEMORY,
    ),
]
GpuMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        callback=_size,
        help="GPU memory this run may use, weights included, e.g. 24GiB. Default: what is free.",
        show_default=False,
        rich_help_panel=MEMORY,
    ),
]
HostMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        callback=_size,
        help="Host memory for keys and values, e.g. 100GiB. Default: most of what is free.",
        show_default=False,
        rich_help_panel=MEMORY,
    ),
]
KVFormatOption = Annotated[
    KVFormat | None,
    typer.Option(
        "--kv-format",
        metavar="|".join(KVFormat),
        help="How keys and values are stored in host memory and on disk; lossless takes three "
        "quarters of the bytes, for the same bits. Default: the plan decides.",
        show_default=False,
        rich_help_panel=MEMORY,
    ),
]
Disk = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Keys and values that host memory has no room for lie in a file here while it runs; a "
        "fast local disk.",
        show_default=False,
        rich_help_panel=MEMORY,
    ),
]
DiskMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        callback=_size,
        help="With --disk: how large that file may become, e.g. 200GiB. Default: what is free.",
        show_default=False,
        rich_help_panel=MEMORY,
    ),
]
ChunkTokens = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Prompt tokens per forward pass. Default: the plan decides.",
        show_default=False,
        rich_help_panel=MEMORY,
    ),
]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON object on standard output.", rich_help_panel=OUTPUT
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Draw time and memory over the context, as .png or .svg.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
PromptFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="UTF-8 text to read; - is standard input, also used when text is piped in.",
        rich_help_panel=PROMPT,
    ),
]
File = Annotated[
    str | None,
    typer.Argument(
        metavar="[FILE]",
        help="UTF-8 text to read, as with --prompt-file.",
        show_default=False,
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="The text itself.", rich_help_panel=PROMPT),
]
Question = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="What to ask about the text.", rich_help_panel=PROMPT),
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--raw",
        help="Use the tokenizer's chat template, or feed the text as it is. Default: the "
        "template if there is one.",
        show_default=False,
        rich_help_panel=PROMPT,
    ),
]
AllowBeyondPositions = Annotated[
    bool,
    typer.Option(
        "--allow-beyond-positions",
        help="Go on when the text is longer than the model was made for.",
        rich_help_panel=PROMPT,
    ),
]
MaxNewTokens = Annotated[
    int,
    typer.Option(metavar="N", min=1, help="Longest answer.", rich_help_panel=GENERATION),
]
DoSample = Annotated[
    bool,
    typer.Option("--do-sample", help="Sample instead of greedy.", rich_help_panel=GENERATION),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        min=1e-6,
        help="Above 1 more varied, below 1 less.",
        rich_help_panel=GENERATION,
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        min=0,
        max=1,
        help="Choose among the likeliest tokens that add up to this.",
        rich_help_panel=GENERATION,
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Choose among this many of the likeliest tokens.",
        rich_help_panel=GENERATION,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        max=2**64 - 1,  # what torch takes
        help="Makes sampling repeatable.",
        rich_help_panel=GENERATION,
    ),
]
NumBeams = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=1,
        help="Beam search; the answer then comes at once.",
        rich_help_panel=GENERATION,
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        min=1e-6,
        help="Above 1 discourages words that were there already.",
        rich_help_panel=GENERATION,
    ),
]
OnUnsupportedOption = Annotated[
    OnUnsupported,
    typer.Option(
        metavar="|".join(OnUnsupported),
        help="A model that computes attention in code of its own: refuse it, or give it whole "
        "layers, one at a time.",
        rich_help_panel=MEMORY,
    ),
]
Save = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Read the text into a context on disk, before any question; run again after an "
        "interruption, it goes on where it was.",
        show_default=False,
        rich_help_panel=DISK,
    ),
]
Context = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Ask about a context read with --save, which stays as it is.",
        show_default=False,
        rich_help_panel=DISK,
    ),
]
Append = Annotated[
    bool,
    typer.Option(
        "--append",
        help="With --context: question and answer stay in it.",
        rich_help_panel=DISK,
    ),
]
CheckpointEvery = Annotated[
    str,
    typer.Option(
        metavar="TIME|N",
        help="With --save: how often what was read becomes durable, as a time (30s, 5m) or in "
        "tokens.",
        rich_help_panel=DISK,
    ),
]
Restart = Annotated[
    bool,
    typer.Option("--restart", help="With --save: forget what is there.", rich_help_panel=DISK),
]
OtherVersions = Annotated[
    bool,
    typer.Option(
        "--other-versions",
        help="Accept a context that other versions of torch or transformers computed.",
        rich_help_panel=DISK,
    ),
]


def token_count(text: str) -> int:
    """Tokens from "131072", "128K" or "1M"; K is 1,024 and M its square.

    Raises:
        typer.BadParameter: not a whole number of at least 1.
    """
    cleaned = text.strip().replace(",", "").replace("_", "").lower()
    unit = {"k": 2**10, "m": 2**20}.get(cleaned[-1:], 1)
    digits = cleaned[:-1] if unit > 1 else cleaned
    if not digits.isascii() or not digits.isdigit() or int(digits) < 1:
        raise typer.BadParameter(
            f"{text!r} is not a number of tokens; write for example 131072, 128K or 1M",
            param_hint="--tokens",
        )
    return int(digits) * unit
