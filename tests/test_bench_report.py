"""The report says what the CSV files hold, and the documents are what it makes of them."""

from __future__ import annotations

import csv

import pytest

from bench import record, report
from bench.rows import Results, everything

TRAINING = {"scenario": "training", "batch": "8", "p10_ms": "90", "p90_ms": "110"}
SHARED = {"commit": "abc1234", "cpu": "Some CPU", "cores": "2", "threads": "2", "device": "cpu"}


def row(provider, time, over_ours, case="resnet18", scenario="step", **fields):
    own = {"provider": provider, "median_ms": time, "time_over_ours": over_ours, "case": case}
    return {**SHARED, **own, "scenario": scenario, "bytes_per_param": "36", **fields}


@pytest.fixture
def results(tmp_path):
    rows = [
        row("fused_ema native", "10", "1", share_of_bound="0.8", p10_ms="9", p90_ms="11"),
        row("torch fused + lerp", "9", "0.9", share_of_bound="0.9", torch_ops="5"),
        row("torch foreach + lerp", "40", "4.02", share_of_bound="0.2"),
        row("optimi + lerp", "", "", error="left out, optimi cannot be imported"),
        row("stream (bound)", "8", "0.8", share_of_bound="1"),
        row("fused_ema native", "5", "1", case="host_62", p10_ms="4", p90_ms="6"),
        row("fused_ema native", "", "", case="host_fit", host_us="3.5", host_us_per_tensor="0.125"),
        row("fused_ema native", "100", "1", step_share="0.025", **TRAINING),
        row("torch fused + lerp", "97", "0.97", step_share="0.05", **TRAINING),
    ]
    path = tmp_path / "machine.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, record.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return Results.read(path)


def test_documents_are_made_from_the_results():
    for path, text in report.documents().items():
        assert path.read_text() == text, f"{path.name}: run python -m bench.report"


def test_each_figure_is_there():
    for results in everything():
        text = report.page([results])
        for name in ("limit", "host", "training"):
            file = f"{results.name}-{name}.png"
            assert (file in text) == (report.FIGURES / file).exists(), file


def test_page_shows_losses_and_who_has_no_time(results):
    page = report.page([results])
    assert "Faster than ours: torch fused + lerp on ResNet-18 (0.90)." in page
    assert "No time for optimi + lerp on ResNet-18: left out, optimi cannot be imported." in page
    assert "| fused_ema native | **10.0 ms** |" in page
    assert "| torch foreach + lerp | 4.02× |" in page
    assert "| of the bound, ours | 80 % |" in page
    assert "| fused_ema native | new | 3.50 | 0.125 |" in page
    assert "| fused_ema native | 2.50 ms | 2.5 % | 94.8 ms | 100 ms |" in page
    assert "Faster than ours over them: torch fused + lerp on ResNet-18 (0.97), although" in page


def test_readme_is_replaced_between_its_comments(results):
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    new = report.readme(text, [results])
    assert new.startswith("before\n")
    assert new.endswith("\nafter\n")
    assert "old" not in new
    assert "12 to 12 million parameters, in multiples of our time: torch fused + lerp 0.90." in new
    assert "Faster than ours: torch fused + lerp on ResNet-18 (0.90)." in new
    assert report.readme(new, [results]) == new
    with pytest.raises(ValueError, match="lacks the comment"):
        report.readme("before", [results])


def test_figures_draw_what_there_is(results, tmp_path):
    figures = pytest.importorskip("bench.figures")
    drawn = [path.name for path in figures.draw(results, tmp_path)]
    assert drawn == ["machine-limit.png", "machine-host.png", "machine-training.png"]
    assert all((tmp_path / name).stat().st_size > 1000 for name in drawn)
