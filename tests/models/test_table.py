"""The page of models and strategies is what the tests run, and the README quotes its sums."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="needs the source tree")


def test_the_page_is_what_is_run():
    from helpers.models.table import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/helpers/models/table.py --write"


def test_the_readme_quotes_the_sums():
    from helpers.models.table import XDIT, lines_of

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{sum(map(lines_of, XDIT))} lines" in readme
    assert f"{sum(XDIT.values()):,}" in readme
    for package in (*XDIT, "dit", "qwen_image", "z_image", "sdxl", "emoji"):
        assert len((ROOT / "models" / f"xdit_{package}" / "__init__.py").read_text(encoding="utf-8").splitlines()) <= 60
