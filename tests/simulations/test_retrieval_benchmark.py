"""The retrieval benchmark: both libraries, its equality, its command."""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fedoppu.client.retrieval import words
from fedoppu.common.config import RetrieverSettings
from fedoppu.common.errors import UsageError
from fedoppu.simulations.benchmarks.others import require_packages
from fedoppu.simulations.benchmarks.retrieval import app
from fedoppu.simulations.benchmarks.retrieval_rows import COMPARED, Scores, compare, history

SETTINGS = RetrieverSettings()
needs_both = pytest.mark.skipif(
    not (find_spec("rank_bm25") and find_spec("bm25s")), reason="rank_bm25 or bm25s is missing"
)


def test_history_has_about_53_words_an_item_and_is_the_same_each_time() -> None:
    texts = history(200)
    assert texts == history(200)
    assert 50 < np.mean([len(words(text)) for text in texts]) < 56
    assert len({word for text in texts for word in words(text)}) > 1500


@needs_both
@pytest.mark.parametrize("name", COMPARED)
def test_both_libraries_score_and_rank_as_ours(name: str) -> None:
    distance, otherwise = compare(history(40), SETTINGS, COMPARED[name])
    assert distance < 1e-12
    assert otherwise == 0


def test_another_ranking_is_seen() -> None:
    def reversed_scores(split: Sequence[Sequence[str]], _: RetrieverSettings) -> Iterator[Scores]:
        for i in range(1, len(split)):
            yield np.arange(i, dtype=np.float64)

    distance, otherwise = compare(history(20), SETTINGS, reversed_scores)
    assert distance > 1
    assert otherwise > 10


@needs_both
def test_command_prints_a_table_and_writes_a_file(tmp_path: Path) -> None:
    target = tmp_path / "retrieval.json"
    arguments = ["--items", "20", "--pairs", "1", "--json", str(target)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    assert "rank_bm25 rebuilt for each" in result.stdout
    rows = json.loads(target.read_text())["rows"]
    assert len(rows) == 6
    # the goal is one of a thousand items; equality holds for any number
    assert all(row["goal"] is None for row in rows[::3])
    assert all(row["met"] for row in rows if row["goal"] is not None)


def test_a_missing_library_is_told_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UsageError, match=r"needs no_such_module, which is not installed"):
        require_packages(("json", "no_such_module"), extra="bench")
    monkeypatch.setitem(sys.modules, "bm25s", None)
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 2
    assert re.search(r"needs .*bm25s, which is not installed", result.stderr)
    assert "pip install 'fedoppu[bench]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_history_of_one_item_is_refused() -> None:
    result = CliRunner().invoke(app, ["--items", "1"])
    assert result.exit_code == 2
    assert "--items must be at least 2, got 1" in result.stderr
