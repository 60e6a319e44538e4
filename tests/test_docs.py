"""The documentation runs: docstring examples, code blocks, and every path, test and command it names."""

import doctest
import importlib
import re
from pathlib import Path

import features
import pytest
import support_table

import lora_kernels.__main__ as command_line

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SOURCES = [path for folder in ("lora_kernels", "tests", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
WITH_EXAMPLES = [path for path in SOURCES if ">>>" in path.read_text() and path != Path(__file__).resolve()]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.name)
def test_docstring_examples_run(path, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "eager")
    file = path.parent if path.name == "__init__.py" else path.with_suffix("")
    module = importlib.import_module(".".join(file.relative_to(ROOT).parts))
    failed, attempted = doctest.testmod(module)
    assert attempted > 0
    assert failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run(page, monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "eager")
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, page.name, "exec"), {"__name__": page.stem})


def test_printed_comments_are_what_is_printed(capsys):
    """`print(...)  # text` in the README prints that text."""
    readme = (ROOT / "README.md").read_text()
    checked = 0
    for block in re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL):
        expected = re.findall(r"^print\(.*\)  # (.+)$", block, re.MULTILINE)
        if expected:
            exec(compile(block, "README.md", "exec"), {})
            assert capsys.readouterr().out.splitlines() == expected
            checked += len(expected)
    assert checked


@pytest.mark.parametrize("page", support_table.PAGES, ids=lambda page: page.name)
def test_the_tables_are_up_to_date(page):
    assert support_table.update(page.read_text()) == page.read_text(), "run: make readme"


def test_features_are_read_without_an_import(tmp_path):
    module = tmp_path / "test_it.py"
    module.write_text("""
import not_installed

@not_installed.mark("slow")
@feature("saving", f"{FUSED} (both ways)", stack="theirs")
@feature("loading", EXACT)
def test_files(): ...

def test_unmarked(): ...
""")
    assert features.table(module).splitlines()[2:] == [
        "| theirs | saving | fused (both ways) | `tests/test_it.py::test_files` |",
        "|  | loading | exact | `tests/test_it.py::test_files` |",
    ]
    module.write_text('@feature("saving", "perhaps")\ndef test_files(): ...')
    with pytest.raises(AssertionError, match="perhaps"):
        features.table(module)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
    text = page.read_text()
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    for name in re.findall(r"`((?:[\w.-]+/)+[\w.-]+)(?:::\w+)?`", text):
        if name.split("/")[0] in {path.name for path in ROOT.iterdir()} - {"out"} and not (ROOT / name).exists():
            missing.append(name)
    for name, test in re.findall(r"`(tests/\w+\.py)::(\w+)`", text):
        if not re.search(rf"^(?:def|class) {test}\b", (ROOT / name).read_text(), re.MULTILINE):
            missing.append(f"{name}::{test}")
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page):
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^    )make ([a-z-]+)\b", text, re.MULTILINE)) <= targets
    for command in re.findall(r"python -m lora_kernels ([a-z]+)", text):
        try:
            status = command_line.main([command, "--help"])
        except SystemExit as stop:
            status = stop.code
        assert status == 0


def test_pages_that_the_code_names_exist():
    named = {name for path in SOURCES for name in re.findall(r"docs/\w+\.md", path.read_text())}
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert not [page.name for page in PAGES if page.parent.name == "docs" and f"(docs/{page.name})" not in readme]
