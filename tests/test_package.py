"""The sdist holds every file of the repository, so that tests, docs and make run from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What setuptools adds.
ADDED = ("PKG-INFO", "setup.cfg")


def of_the_repository() -> set[str]:
    """Files that are committed or could be: not those that git ignores."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git, and a clone")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in done.stdout.split("\0") if name and (ROOT / name).exists()}


def test_the_sdist_is_what_git_has(tmp_path):
    expected = of_the_repository()
    # a file list that an earlier build has left would be added to
    command = "setup.py", "-q", "egg_info", "-e", tmp_path, "sdist", "-d", tmp_path
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "FUSED_EMA_NO_EXTENSION": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        files = [name for name in opened.getnames() if opened.getmember(name).isfile()]
    found = {name.partition("/")[2] for name in files}
    found = {name for name in found if name not in ADDED and ".egg-info/" not in name}
    assert found == expected
