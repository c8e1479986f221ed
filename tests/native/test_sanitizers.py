# SPDX-License-Identifier: Apache-2.0
"""The native library under ThreadSanitizer, AddressSanitizer and UndefinedBehaviorSanitizer.

driver.cpp, linked with the library's sources, runs every instruction level from several threads on
memory that ends at an unreadable page, and holds the results against double precision;
packed_driver.cpp does so with packed blocks, whole and damaged, against the kernel over plain ones.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)

WARNINGS = "-Wall -Wextra -Wno-maybe-uninitialized -Wno-uninitialized -Werror"
"""GCC 12 takes its own intrinsics for reads of uninitialised variables."""


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    everything = {**os.environ, **environment}
    return subprocess.run(command, env=everything, capture_output=True, text=True, timeout=500)


def require(flags: str, tmp_path: Path) -> None:
    """Skip unless there is a compiler whose programs run with `flags`."""
    if COMPILER is None:
        pytest.skip("no C++ compiler (c++, g++, clang++)")
    source, program = tmp_path / "empty.cpp", tmp_path / "empty"
    source.write_text("int main() { return 0; }\n")
    built = run([COMPILER, *flags.split(), str(source), "-o", str(program)])
    if built.returncode or run([str(program)]).returncode:
        pytest.skip(f"{COMPILER} makes no programs that run with {flags}: {built.stderr.strip()}")


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the library's sources are compiled once for both drivers, by flags."""
    return tmp_path_factory.mktemp("objects")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "arguments"),
    [
        ("-O3", []),
        # ThreadSanitizer does not follow a fork, which any argument leaves out.
        ("-fsanitize=thread -O1 -g", ["without a fork"]),
        ("-fsanitize=address,undefined -fno-sanitize-recover=all -O1 -g", []),
    ],
    ids=["plain", "threads", "addresses"],
)
@pytest.mark.parametrize("driver", ["driver", "packed_driver"])
def test_the_kernel_is_clean_and_right(
    flags: str, arguments: list[str], driver: str, tmp_path: Path, objects: Path
) -> None:
    require(flags, tmp_path)
    program = tmp_path / "driver"
    built = run(
        [str(ROOT / "scripts" / "build_native"), str(program)],
        CXX=str(COMPILER),
        CXXFLAGS=f"{flags} {WARNINGS}",
        HEADINFER_OBJECTS=str(objects / "".join(filter(str.isalnum, flags))),
        HEADINFER_MAIN=str(ROOT / "tests" / "native" / f"{driver}.cpp"),
    )
    assert built.returncode == 0, built.stderr
    done = run([str(program), *arguments])
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["ok"]), (
        done.stdout + done.stderr
    )
