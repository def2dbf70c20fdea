"""The README's examples run as they stand, and do what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)


def test_examples_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert float(capsys.readouterr().out)
    assert set(torch.load("ema.pt", weights_only=True)) == {"weight", "bias"}


def test_equivalent_to_torch_at_kappa_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ours, theirs = BLOCKS[0], BLOCKS[-1]
    assert "kappa=4" in ours
    assert "torch.optim.AdamW" in theirs
    names: dict[str, object] = {}
    torch.manual_seed(0)
    exec(ours.replace("kappa=4", "kappa=1"), names)
    model = names["model"]
    averages = [names["opt"].state[p]["ema"] for p in model.parameters()]
    weights = [p.detach().clone() for p in model.parameters()]
    torch.manual_seed(0)
    names["model"] = torch.nn.Linear(8, 1)
    exec(theirs, names)
    for found, expected in zip(weights, names["model"].parameters(), strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
    for found, expected in zip(averages, names["ema"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "path", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(path):
    text = (ROOT / path).read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith("http"):
            assert ((ROOT / path).parent / target).exists(), target
