"""The documentation: the site builds, links have targets, README stays short, and quoted messages exist."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from xmc_trainer.builders.engine import NAMES as ENGINE
from xmc_trainer.builders.inputs import NAMES as DATA

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs pip install -e '.[docs]'")
def test_the_site_builds_without_a_warning(tmp_path):
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "-f",
        DOCS / "site/mkdocs.yml",
        "-d",
        tmp_path,
    ]
    done = subprocess.run(command, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "api.html").read_text(encoding="utf-8")
    assert "the k best labels of each text" in api  # a docstring of XMCModel


def test_readme_stays_short():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 250 and len(readme.split()) <= 2200


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_links_to_files_have_targets(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).is_file(), f"{page.name}: no {target}"


def test_notebooks_are_stored_without_output():
    notebooks = [json.loads(path.read_text(encoding="utf-8")) for path in (DOCS / "notebooks").glob("*.ipynb")]
    cells = [cell for notebook in notebooks for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells and not any(cell["outputs"] or cell["execution_count"] for cell in cells)


def test_quoted_messages_are_in_the_code():
    """Check the text in backticks in the tables' first column, without its variable parts (..., N, M, NAME)."""
    sources = [*(ROOT / "xmc_trainer").rglob("*.py"), *(ROOT / "launchers").glob("*.py")]
    # Join messages that are written as several adjacent strings.
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in sources))
    # Messages name parameters in backticks; `errors.naming` replaces them by settings.
    for name, setting in (ENGINE | DATA).items():
        code = code.replace(f"`{name}`", setting)
    checked = 0
    for cells in re.findall(r"^\| (.+?) \| ", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.M):
        for message in re.findall(r"`([^`]+)`", cells):
            for part in re.split(r"'\.\.\.'|\.\.\.|\b(?:N|M|NAME)\b", message):
                if len(part.strip()) > 4:
                    checked += 1
                    assert part.strip() in code, (
                        f"docs/troubleshooting.md quotes {part.strip()!r}, which the code does not say"
                    )
    assert checked > 30
