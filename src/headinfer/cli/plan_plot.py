# SPDX-License-Identifier: Apache-2.0
"""`headinfer plan --plot`: a forecast as a picture, without weights and without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from headinfer.budget import GIB
from headinfer.errors import InputError

if TYPE_CHECKING:
    from headinfer.hf.forecast import Forecast

KINDS = (".png", ".svg")
_METADATA = {".png": ("Software",), ".svg": ("Date", "Creator", "Format", "Type")}
"""What matplotlib would write into a file and shall not: equal forecasts give equal bytes."""


def draw(found: Forecast, path: Path) -> None:
    """`path` is a picture of predicted times and memory over the context.

    Raises:
        InputError: neither .png nor .svg, matplotlib is missing, or the file cannot be written.
    """
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise InputError(f"--plot {path}: the name has to end with {' or '.join(KINDS)}")
    try:
        import matplotlib
    except ImportError as error:
        raise InputError(
            "--plot needs matplotlib, which is not installed; install the extra headinfer[bench]"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = {"svg.hashsalt": "headinfer", "font.size": 10, "svg.fonttype": "path"}
    with plt.rc_context({**plt.rcParamsDefault, **settings, "backend": "Agg"}):
        figure = _figure(plt, found)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, metadata=dict.fromkeys(_METADATA[kind]))
        except OSError as error:
            raise InputError(f"--plot {path} cannot be written: {error.strerror}") from error
        finally:
            plt.close(figure)


def _figure(plt: Any, found: Forecast) -> Any:
    fitting = [outlook for outlook in found.outlooks if outlook.plan is not None]
    timed = [outlook for outlook in fitting if outlook.prediction is not None]
    figure, panels = plt.subplots(
        1, 3 if timed else 1, figsize=(13 if timed else 5, 4), layout="constrained", squeeze=False
    )
    name = f"{found.geometry.name}, predicted"
    source = "" if found.rates is None else f"\n{found.rates.machine}"
    figure.suptitle(f"{name}{source}", fontsize=10)
    memory, *times = panels[0]
    lengths = [outlook.tokens for outlook in fitting]
    plans = [outlook.plan for outlook in fitting if outlook.plan is not None]
    if any(plan.gpu_bytes for plan in plans):
        gpu = [plan.gpu_bytes / GIB for plan in plans]
        memory.plot(lengths, gpu, "o-", color="#0072B2", label="GPU peak, weights included")
    host = [plan.host_bytes / GIB for plan in plans]
    memory.plot(lengths, host, "s--", color="#D55E00", label="keys and values in host memory")
    _axis(memory, "memory", "GiB", lengths)
    memory.legend(fontsize=8)
    if times:
        shown = [(outlook.tokens, outlook.prediction) for outlook in timed if outlook.prediction]
        x = [tokens for tokens, _ in shown]
        times[0].plot(x, [each.prefill_s for _, each in shown], "o-", color="#009E73")
        _axis(times[0], "time to the first token", "seconds", x)
        times[1].plot(x, [each.decode_s for _, each in shown], "o-", color="#CC79A7")
        _axis(times[1], "time per token after it", "seconds", x)
        for panel in times:
            panel.set_yscale("log")
    return figure


def _axis(panel: Any, title: str, unit: str, lengths: list[int]) -> None:
    panel.set_title(title, fontsize=10)
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [f"{tokens / 1024:.4g}K" for tokens in lengths], fontsize=8)
    panel.set_xticks([], minor=True)
    panel.set_xlabel("tokens")
    panel.set_ylabel(unit)
    panel.grid(visible=True, alpha=0.3)
