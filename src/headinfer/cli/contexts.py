# SPDX-License-Identifier: Apache-2.0
"""`headinfer contexts`: what saved contexts there are, whether they are sound, and removing one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from headinfer.budget import format_bytes
from headinfer.cli import options as opt
from headinfer.cli import prose
from headinfer.cli.console import print_note, working, write_answer
from headinfer.errors import SnapshotError

app = typer.Typer(rich_markup_mode="rich", help=prose.CONTEXTS)

Folder = Annotated[
    str, typer.Argument(metavar="CONTEXT", help="The context's folder.", show_default=False)
]


@app.callback(invoke_without_command=True)
def about(ctx: typer.Context) -> None:
    """What `headinfer contexts` alone prints."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command("list", help=prose.CONTEXTS_LIST)
def list_contexts(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="Where to look; its folders, not theirs.")
    ] = ".",
    as_json: opt.AsJson = False,
) -> None:
    """One line per context."""
    from headinfer.snapshot import exists

    place = Path(folder).expanduser()
    if not place.is_dir():
        raise SnapshotError(f"there is no folder {place} to look for contexts in")
    found = [item for item in sorted(place.iterdir()) if item.is_dir() and exists(item)]
    told = [_told(item) for item in found]
    if as_json:
        write_answer(json.dumps(told, indent=2, ensure_ascii=False) + "\n")
        return
    if not told:
        print_note(f"no saved context in {place}")
    for item in told:
        write_answer(_line(item) + "\n")


@app.command("show", help=prose.CONTEXTS_SHOW)
def show(context: Folder, as_json: opt.AsJson = False) -> None:
    """What a context holds."""
    from headinfer.snapshot import Manifest

    folder = Path(context).expanduser()
    manifest = Manifest.read(folder)
    told = _told(folder)
    config = manifest.fingerprint.get("config", {})
    told |= {
        "id": manifest.id,
        "created": manifest.created,
        "written_by": f"headinfer {manifest.writer}",
        "rows": manifest.rows,
        "layers": len(manifest.layers),
        "chunk_tokens": manifest.chunk_tokens,
        "kv_format": manifest.kv_format,
        "dtype": manifest.fingerprint.get("dtype"),
        "model_type": config.get("model_type"),
        "versions": manifest.fingerprint.get("versions"),
        "questions_appended": manifest.prompt.get("turns", 0),
    }
    if as_json:
        write_answer(json.dumps(told, indent=2, ensure_ascii=False) + "\n")
        return
    for name, value in told.items():
        write_answer(f"{name.replace('_', ' ')}: {_said(name, value)}\n")


@app.command("verify", help=prose.CONTEXTS_VERIFY)
def verify(context: Folder, as_json: opt.AsJson = False) -> None:
    """Compare every byte with its checksum."""
    from headinfer.snapshot import Context, size_of

    folder = Path(context).expanduser()
    found = Context(folder)
    with working(f"reading {format_bytes(size_of(folder))}"):
        for _ in found.check_all():
            pass
    if as_json:
        write_answer(json.dumps({**_told(folder), "sound": True}, indent=2) + "\n")
        return
    write_answer(f"{folder} is sound: {found.manifest.tokens:,} tokens\n")


@app.command("remove", help=prose.CONTEXTS_REMOVE)
def remove(context: Folder) -> None:
    """Delete a context, and nothing else."""
    from headinfer.snapshot import remove_context, size_of

    folder = Path(context).expanduser()
    size = size_of(folder)
    left = remove_context(folder)
    print_note(f"{folder} is removed, {format_bytes(size)}")
    if left:
        print_note(f"{folder} stays: {', '.join(left)} in it is not part of the context")


def _told(folder: Path) -> dict[str, Any]:
    from headinfer.snapshot import Manifest, owner_of, size_of

    told: dict[str, Any] = {"path": str(folder)}
    try:
        manifest = Manifest.read(folder)
    except SnapshotError as error:
        return {**told, "problem": str(error)}
    return {
        **told,
        "tokens": manifest.tokens,
        "wanted_tokens": manifest.wanted_tokens,
        "disk_bytes": size_of(folder),
        "model": manifest.fingerprint.get("model"),
        "updated": manifest.updated,
        "writer_now": owner_of(folder),
    }


def _line(told: dict[str, Any]) -> str:
    if "problem" in told:
        return f"{told['path']}  {told['problem']}"
    tokens, wanted = told["tokens"], told["wanted_tokens"]
    length = f"{tokens:,} tokens" if tokens >= wanted else f"{tokens:,} of {wanted:,} tokens"
    parts = [told["path"], length, format_bytes(told["disk_bytes"]), told["model"], told["updated"]]
    if told["writer_now"]:
        parts.append(f"being written by {told['writer_now']}")
    return "  ".join(parts)


def _said(name: str, value: Any) -> str:
    if name == "disk_bytes":
        return format_bytes(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, int):
        return f"{value:,}"
    return "nobody" if value is None else str(value)
