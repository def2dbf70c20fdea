"""The pages' examples run as they stand, print what the pages show, and do what they say."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch

import fused_ema
from fused_ema import YoungAverageWarning

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# An example, and what it prints if the page shows that.
EXAMPLE = re.compile(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", flags=re.S)
# Pages whose examples need more than a process of their own, and the tests that run them.
ELSEWHERE = {
    "docs/adding-a-rule.md": None,  # a rule as it would be, in several files
    "docs/distributed.md": "distributed_checkpoints.py",
    "docs/migrating.md": "test_migrating.py",
    "docs/schedules.md": "test_schedules.py",
    "docs/api/averages.md": "test_ownership.py",
    "docs/frameworks/accelerate.md": "test_accelerate.py",
    "docs/frameworks/configs.md": "test_configs.py",
    "docs/frameworks/diffusers.md": "test_diffusers.py",
    "docs/frameworks/lightning.md": "test_lightning.py",
    "docs/frameworks/step-in-backward.md": "test_step_in_backward.py",
    "docs/frameworks/timm.md": "test_timm.py",
    "docs/frameworks/torchtitan.md": "test_torchtitan.py",
    "docs/frameworks/trainer.md": "test_trainer.py",
}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def examples(page: Path) -> list[tuple[str, str]]:
    return EXAMPLE.findall(page.read_text())


def run(page: Path) -> dict[str, object]:
    """All examples of a page one after the other, in one namespace; returns that."""
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", YoungAverageWarning)  # no page teaches it by accident
        for code, _ in examples(page):
            exec(compile(code, name_of(page), "exec"), names)
    return names


RUN_HERE = [page for page in PAGES if examples(page) and name_of(page) not in ELSEWHERE]


@pytest.mark.parametrize("page", RUN_HERE, ids=name_of)
def test_examples_run_and_print_what_the_page_shows(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run(page)
    printed = capsys.readouterr().out
    for _, shown in examples(page):
        assert shown in printed


@pytest.mark.parametrize("name", ELSEWHERE)
def test_other_pages_are_run_by_a_test(name):
    assert examples(ROOT / name)
    test = ELSEWHERE[name]
    assert test is None or Path(name).name in (ROOT / "tests" / test).read_text()


def test_the_first_example_learns_and_saves(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    code, _ = examples(ROOT / "README.md")[0]
    assert "kappa" not in code
    exec(compile(code, "README.md", "exec"), {})
    assert set(torch.load("ema.pt", weights_only=True)) == {"weight", "bias"}
    assert float(capsys.readouterr().out) == pytest.approx(8.0, abs=0.2)  # the sum of eight ones


def test_at_kappa_one_a_step_is_torchs_and_a_lerp():
    names = run(ROOT / "docs" / "kappa.md")
    ours, theirs, average, ema = (names[name] for name in ("model", "other", "average", "ema"))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(list(average.values()), ema, rtol=1e-5, atol=1e-5)


def test_the_reference_lists_every_public_name():
    pages = (ROOT / "docs" / "api").glob("*.md")
    listed = {
        n for page in pages for n in re.findall(r"^::: fused_ema\.(\w+)$", page.read_text(), re.M)
    }
    assert listed == set(fused_ema.__all__)


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "frameworks").glob("*.md")), ids=name_of)
def test_every_framework_is_linked(page):
    for name, link in (
        ("README.md", f"(docs/frameworks/{page.name})"),
        ("docs/index.md", f"(frameworks/{page.name})"),
        ("mkdocs.yml", f": frameworks/{page.name}\n"),
    ):
        assert link in (ROOT / name).read_text(), name


def anchors(page: Path) -> set[str]:
    """What a link may name after #: headings in lower case, with hyphens."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if target.startswith("http") or "api/" in name_of(page) + path:
            continue  # make docs looks at the reference
        other = page.parent / path if path else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target
