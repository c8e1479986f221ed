# SPDX-License-Identifier: Apache-2.0
"""Plots are made from a file alone, the same bytes every time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from headinfer.bench.plots import plot
from headinfer.bench.results import Results, write
from headinfer.errors import InputError

needs_matplotlib = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import matplotlib"], capture_output=True).returncode
    != 0,
    reason="matplotlib is not installed; it is in the extra headinfer[bench]",
)


@needs_matplotlib
def test_the_same_results_give_the_same_pictures(synthetic: Results, tmp_path: Path) -> None:
    one = plot(synthetic, tmp_path / "one")
    two = plot(synthetic, tmp_path / "two")
    assert [path.name for path in one] == [
        "decode-8b-token.png",
        "decode-8b-token.svg",
        "decode-8b-peak.png",
        "decode-8b-peak.svg",
        "lossless-decode-8b-token.png",
        "lossless-decode-8b-token.svg",
    ]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    drawn = one[1].read_text()
    for said in ("seconds per token", "NVIDIA H100", "headinfer, mixed", "out of memory"):
        assert f"<!-- {said}" in drawn or said in drawn, said


@needs_matplotlib
def test_one_length_is_no_curve(synthetic: Results, tmp_path: Path) -> None:
    synthetic.rows = [row for row in synthetic.rows if row.context_tokens in (0, 131072)]
    with pytest.raises(InputError, match="two lengths"):
        plot(synthetic, tmp_path)


def test_without_matplotlib_it_says_what_to_install(
    synthetic: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"headinfer\[bench\]"):
        plot(synthetic, tmp_path)


@needs_matplotlib
def test_tables_and_plots_need_no_torch(synthetic: Results, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write(synthetic, path)
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from headinfer.cli.app import app\n"
        f"app(['bench', 'show', {str(path)!r}], standalone_mode=False)\n"
        f"app(['bench', 'plot', {str(path)!r}], standalone_mode=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "prefill of 128K" in done.stdout
    assert (tmp_path / "results" / "decode-8b-token.svg").exists()
