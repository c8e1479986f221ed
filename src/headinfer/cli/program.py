# SPDX-License-Identifier: Apache-2.0
"""How the program ends: one line and an exit status for every way a command can fail.

0 done, 1 it could not be done, 2 the command line is wrong, 130 interrupted, 143 terminated.
A traceback appears only with HEADINFER_DEBUG=1.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from headinfer.cli.console import print_error
from headinfer.errors import HeadInferError

FAILED, WRONG_USAGE, INTERRUPTED, PIPE_CLOSED, TERMINATED = 1, 2, 130, 141, 143

# typer brings its own copy of click in some versions: the base class is reached through typer.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
_THEIRS: tuple[type[Exception], ...] = (typer.Exit, typer.Abort, _UsageError)


class Program(TyperGroup):
    """A command group whose errors are single lines."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        try:
            status = super().main(
                args, "headinfer", complete_var, False, windows_expand_args, **extra
            )
        except _UsageError as error:
            print_error(_usage_line(error))
            status = WRONG_USAGE
        except typer.Abort:
            status = INTERRUPTED
        if standalone_mode:
            sys.exit(status or 0)
        return status

    def invoke(self, ctx: Any) -> Any:
        with _one_line_errors():
            return super().invoke(ctx)


def exit_on_terminate() -> None:
    """Let SIGTERM unwind the stack, so that temporary files go and the terminal is restored."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(TERMINATED)

    signal.signal(signal.SIGTERM, leave)


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        print_error("interrupted")
        raise typer.Exit(INTERRUPTED) from error
    except BrokenPipeError as error:
        # The reader of our output left; Python must not complain about it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(PIPE_CLOSED) from error
    except _THEIRS:
        raise
    except Exception as error:
        if os.environ.get("HEADINFER_DEBUG") == "1":
            raise
        print_error(_line(error))
        raise typer.Exit(FAILED) from error


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, HeadInferError):
        return _OPTION.sub(_as_typed, text)
    if isinstance(error, MemoryError):
        return f"the machine ran out of memory: {text or 'no more could be allocated'}"
    kind = type(error).__name__
    return f"{kind}: {text} (unexpected: HEADINFER_DEBUG=1 shows where it happened)"


_OPTION = re.compile(
    r"\b(gpu_memory|host_memory|disk_memory|disk(?==)|chunk_tokens|on_unsupported|kv_format)\b(=?)"
)
"""Names of Python arguments in messages, where the command line has an option of that name."""


def _as_typed(found: re.Match[str]) -> str:
    name, given = found.groups()
    return f"--{name.replace('_', '-')}{' ' if given else ''}"


def _usage_line(error: Any) -> str:
    context = error.ctx
    where = f" ({context.command_path} --help)" if context and context.parent else ""
    return " ".join(str(error.format_message()).split()) + (where or " (headinfer --help)")
