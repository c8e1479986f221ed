# SPDX-License-Identifier: Apache-2.0
"""The options that several commands share, each written once."""

from __future__ import annotations

import enum
from typing import Annotated

import typer

from headinfer.budget import parse_bytes
from headinfer.errors import InputError


class OnUnsupported(enum.StrEnum):
    """What to do with a model whose attention cannot be streamed."""

    error = "error"
    materialize = "materialize"


MODEL, PROMPT, GENERATION, MEMORY, OUTPUT = "Model", "Prompt", "Generation", "Memory", "Output"


class Dtype(enum.StrEnum):
    """Types weights can be loaded as; auto is as stored."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    auto = "auto"


def name(dtype: Dtype | None) -> str | None:
    return None if dtype is None else dtype.value


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
