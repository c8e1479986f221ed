# SPDX-License-Identifier: Apache-2.0
"""Bars on a terminal and lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from headinfer.cli import console
from headinfer.progress import ForwardFinished, ForwardStarted


@pytest.fixture(params=[True, False], ids=["terminal", "file"])
def screen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    out = io.StringIO()
    fake = Console(file=out, force_terminal=request.param, width=100, _environ={})
    monkeypatch.setattr(console, "stderr", fake)
    return out


def test_a_prefill_counts_tokens_and_ends_with_the_prompt(screen: io.StringIO) -> None:
    bar = console.PrefillBar(300)
    with bar:
        for past in (0, 100, 200):
            bar.on_event(ForwardStarted(past, 100))
            bar.on_event(ForwardFinished(past, 100, 0.01))
        bar.on_event(ForwardStarted(300, 1))  # decoding: the bar is gone
        before = screen.getvalue()
        bar.on_event(ForwardFinished(300, 1, 0.01))
        assert screen.getvalue() == before
    assert "300" in before
    assert "tokens" in before


def test_the_remaining_time_grows_with_attention() -> None:
    bar = console.PrefillBar(4000)
    for done in (1000, 2000):
        bar._clock.observe(done, done + done**2 / 1000)
    eta = bar._clock.eta_s()
    assert eta is not None
    assert eta == pytest.approx(4000 + 4000**2 / 1000 - (2000 + 2000**2 / 1000))


def test_an_expected_time_is_there_before_the_first_chunk_and_follows_what_comes() -> None:
    def cost(past: int, new: int) -> tuple[float, float]:
        return new / 100, new * past / 1e5

    bar = console.PrefillBar(4000)
    assert bar._progress.tasks[0].fields["eta"] is None
    bar.expect(cost, measured=True, chunk_tokens=1000)
    whole = sum(sum(cost(past, 1000)) for past in range(0, 4000, 1000))
    assert bar._progress.tasks[0].fields["eta"] == pytest.approx(whole)
    bar.resume(2000)
    assert bar._progress.tasks[0].fields["eta"] < whole
    shape = console.PrefillBar(4000)
    shape.expect(cost, measured=False, chunk_tokens=1000)
    assert shape._progress.tasks[0].fields["eta"] is None
    shape._clock.observe(1000, 5.0)
    assert shape._clock.eta_s() == pytest.approx(0.5 * (whole - 10))


def test_preparation_steps_are_shown(screen: io.StringIO) -> None:
    from headinfer.hf.demo_model import Step

    with console.PreparationBar() as preparation:
        preparation(Step("fetching", 0, 2**20))
        preparation(Step("fetching", 2**20, 2**20))
        preparation(Step("converting"))
    assert "fetching" in screen.getvalue()


def test_no_preparation_shows_nothing(screen: io.StringIO) -> None:
    with console.PreparationBar():
        pass
    assert not any(word in screen.getvalue() for word in ("fetching", "0%", "━"))


def test_an_error_is_never_wrapped(screen: io.StringIO) -> None:
    console.print_error("x" * 300 + " [bold]not markup[/bold]")
    assert screen.getvalue().count("\n") == 1
    assert "[bold]" in screen.getvalue()


def test_the_answer_follows_a_closed_bar(
    screen: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = console.PrefillBar(10)
    with bar, console.AnswerStream(bar, silent=False) as stream:
        bar.on_event(ForwardFinished(0, 10, 0.01))
        stream("one ")
        before = screen.getvalue()
        stream("two")
    assert capsys.readouterr().out == "one two\n"
    assert screen.getvalue() == before


@pytest.mark.parametrize(("pieces", "left"), [((), ""), (("half",), "half\n")])
def test_an_interrupted_answer_ends_its_line(
    pieces: tuple[str, ...], left: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer() -> None:
        with console.AnswerStream(console.PrefillBar(10), silent=False) as stream:
            for piece in pieces:
                stream(piece)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer()
    assert capsys.readouterr().out == left
