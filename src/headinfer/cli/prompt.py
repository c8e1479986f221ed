# SPDX-License-Identifier: Apache-2.0
"""Reads the prompt: from a file, from standard input, or from the command line itself."""

from __future__ import annotations

import sys
from pathlib import Path

from headinfer.errors import InputError


def read_prompt(file: str | None, text: str | None, question: str | None) -> str | None:
    """The document or prompt; None when there is only a question.

    Raises:
        InputError: no such file, not UTF-8 text, empty, two prompts, or none.
    """
    if file is not None and text is not None:
        raise InputError("--prompt and --prompt-file were both given; use one of them")
    if text is not None:
        return _not_empty(text, "--prompt")
    if file is not None and file != "-":
        return _not_empty(_read_file(file), file)
    if file == "-":
        return _not_empty(_decode(sys.stdin.buffer.read(), "standard input"), "standard input")
    return _piped(question)


def one_file(argument: str | None, option: str | None) -> str | None:
    """The prompt's file, named as an argument or with --prompt-file.

    Raises:
        InputError: both ways.
    """
    if argument is not None and option is not None:
        raise InputError(f"{argument} and --prompt-file {option} were both given; use one of them")
    return option if argument is None else argument


def _piped(question: str | None) -> str | None:
    """Standard input if something is piped into it, which an empty one is not."""
    if not sys.stdin.isatty():
        found = _decode(sys.stdin.buffer.read(), "standard input")
        if found.strip():
            return found
    if not (question or "").strip():
        raise InputError(
            "there is no prompt: give --prompt-file FILE, --prompt TEXT, --question TEXT, or pipe "
            "text to standard input"
        )
    return None


def _read_file(name: str) -> str:
    path = Path(name).expanduser()
    try:
        return _decode(path.read_bytes(), name)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(f"the prompt file {name} cannot be read: {reason}") from error


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start} of "
            f"{len(data)}. Convert it first, for example with `iconv -f latin1 -t utf-8`, or "
            "extract the text if it is a document such as a PDF"
        ) from error


def _not_empty(text: str, name: str) -> str:
    if not text.strip():
        raise InputError(f"the prompt is empty: {name} has {len(text)} characters, all blank")
    return text
