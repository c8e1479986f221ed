# SPDX-License-Identifier: Apache-2.0
"""A file of results comes back as it was written, and what is none is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headinfer.bench.results import SCHEMA, Check, Results, Row, quantile, read, write
from headinfer.errors import InputError


def test_what_is_written_comes_back(synthetic: Results, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.json"
    synthetic.pending = ("decode-8b", "mixed", 42)
    synthetic.ended = [("decode-8b", "mixed", 42)]
    write(synthetic, path)
    assert read(path) == synthetic
    assert json.loads(path.read_text())["schema"] == SCHEMA
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda found: "not json", "is not JSON"),
        (lambda found: json.dumps([]), "reads schema 1"),
        (lambda found: json.dumps({**found, "schema": 99}), "has schema 99"),
        (lambda found: json.dumps({"schema": SCHEMA}), "is not complete"),
        (lambda found: json.dumps({**found, "pending": ["a"]}), "is not complete"),
        (
            lambda found: json.dumps({**found, "rows": [{**found["rows"][0], "speed": 1}]}),
            "Row has no speed",
        ),
        (
            lambda found: json.dumps({**found, "rows": [{**found["rows"][0], "status": "?"}]}),
            "status",
        ),
    ],
)
def test_another_file_is_refused(synthetic: Results, tmp_path: Path, change, says: str) -> None:
    path = tmp_path / "results.json"
    write(synthetic, path)
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(InputError, match=says):
        read(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read(tmp_path / "none.json")


def test_a_run_replaces_its_earlier_rows() -> None:
    results = Results(rows=[Row("a", "b", 1, "x"), Row("a", "b", 1, "y"), Row("a", "c", 1, "x")])
    results.put([Row("a", "b", 1, "z")])
    assert [(row.contestant, row.metric) for row in results.rows] == [("c", "x"), ("b", "z")]


def test_only_gating_checks_decide() -> None:
    good, bad = Check("good", True, 0.0, 1.0), Check("bad", False, 2.0, 1.0, gates=False)
    assert Results(checks=[good, bad]).verified
    assert not Results().verified
    assert not Results(checks=[bad]).verified
    failed = Results(checks=[good, Check("worse", False, 2.0, 1.0)])
    assert "worse" in failed.why_unverified()


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30))
def test_quantiles_are_ordered_and_inside(values: list[float]) -> None:
    low, middle, high = (quantile(values, share) for share in (0.2, 0.5, 0.8))
    assert min(values) <= low <= middle <= high <= max(values)
