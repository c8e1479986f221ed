# SPDX-License-Identifier: Apache-2.0
"""What importing headinfer costs and touches, each asked of a fresh process.

Static contracts see imports inside functions too, so they cannot prove that something is lazy.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

import headinfer

PURE_HALF = (
    "errors",
    "geometry",
    "budget",
    "options",
    "plan",
    "decision",
    "footprint",
    "chunks",
    "cost",
    "rates",
    "machines",
    "surroundings",
    "quantised",
    "reach",
    "layout",
    "store",
    "schedule",
    "progress",
)
HEAVY = ("torch", "numpy", "transformers", "triton", "safetensors", "gguf")


def fresh(code: str) -> str:
    """Standard output of `code` in a new interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_public_names_are_these() -> None:
    errors = [name for name in headinfer.__all__ if isinstance(getattr(headinfer, name), type)]
    errors = [name for name in errors if issubclass(getattr(headinfer, name), Exception)]
    names = (
        "Geometry HeadCache MemoryBudget Plan Session __version__ attach doctor load_context plan_for "
        "prefill read_context save_context"
    )
    assert sorted(set(headinfer.__all__) - set(errors)) == names.split()
    assert {"HeadInferError", "InputError", "PlanError", "BudgetTooSmall"} <= set(errors)


def test_importing_headinfer_takes_under_a_tenth_of_a_second_beyond_torch() -> None:
    code = "import torch, time; t = time.perf_counter(); import headinfer; print(time.perf_counter() - t)"
    # The best of a few: what is claimed is the cost of the import, not the load of the machine.
    assert min(float(fresh(code)) for _ in range(3)) < 0.1


def test_importing_headinfer_leaves_cuda_and_transformers_alone() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import headinfer; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(torch.cuda.is_initialized(), sorted(new & {'transformers', 'triton', 'gguf'}))"
    )
    assert fresh(code) == "False []"


def test_resolving_every_public_name_leaves_cuda_alone() -> None:
    code = (
        "import headinfer, torch; [getattr(headinfer, name) for name in headinfer.__all__]; "
        "print(torch.cuda.is_initialized())"
    )
    assert fresh(code) == "False"


@pytest.mark.parametrize("module", PURE_HALF)
def test_the_pure_half_needs_nothing_but_the_standard_library(module: str) -> None:
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in HEAVY)
    assert fresh(f"import sys; {blocked}; import headinfer.{module}; print('ok')") == "ok"


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = headinfer.no_such_name


def test_command_line_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; sys.argv = ['headinfer', '--help']\n"
        "from headinfer.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert fresh(code).splitlines()[-1] == "[]"
