"""What the tests show of each feature: the rows of docs/integrations.md, and what a test must have seen to stand there."""

import importlib
import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
FUSED, EXACT = "fused", "exact"


def feature(name: str, how: str):
    """Marks a test as the one that shows how `name` runs: fused, or exactly as in the library itself, without us."""
    assert how in (FUSED, EXACT)

    def mark(test):
        test.feature = (name, how)
        return test

    return mark


def update(page: str) -> str:
    """The page, with the table of each test module in it made anew."""
    return re.sub(
        r"(<!-- (test_\w+): generated .*? -->\n).*?(<!-- /\2 -->)",
        lambda found: f"{found[1]}{table(importlib.import_module(found[2]))}{found[3]}",
        page,
        flags=re.DOTALL,
    )


def table(module) -> str:
    """A row for each test of `module` that is marked."""
    rows = ["| feature | runs | test |", "| --- | --- | --- |"]
    for name, test in vars(module).items():
        if name.startswith("test_") and hasattr(test, "feature"):
            what, how = test.feature
            rows.append(f"| {what} | {how} | `tests/{module.__name__}.py::{name}` |")
    return "\n".join([*rows, ""])


if __name__ == "__main__":
    PAGE.write_text(update(PAGE.read_text()))
