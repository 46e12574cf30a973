"""The documents say what the code is: every module has its line, and the table of flags is current."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.architecture.source_tree import REPOSITORY, read_package
from tools import update_api_fields, update_readme_flags

STRUCTURE = REPOSITORY / "docs" / "structure.md"
README = REPOSITORY / "README.md"


def listed_modules(structure: str) -> list[str]:
    """The paths that begin a list item: "- `graphllm/engine/engine.py`: ..."."""
    return re.findall(r"^- `(graphllm/[^`]+\.py)`: \S", structure, flags=re.MULTILINE)


def existing_modules() -> Iterable[str]:
    """Every module but an `__init__.py` that only opens its package: a docstring or less."""
    for source in read_package():
        if not source.is_package or len(source.tree().body) > 1:
            yield source.path


def broken_links(document: Path) -> list[str]:
    """Relative links of a Markdown file that lead nowhere."""
    links = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
    return [link for link in links if "://" not in link and not (document.parent / link).exists()]


def test_structure_has_a_line_for_each_module_and_no_other() -> None:
    listed = listed_modules(STRUCTURE.read_text(encoding="utf-8"))
    existing = set(existing_modules())
    assert existing - set(listed) == set(), "modules without a line"
    assert set(listed) - existing == set(), "lines without a module"
    assert len(listed) == len(set(listed))


def test_flags_in_the_readme_are_current() -> None:
    readme = README.read_text(encoding="utf-8")
    assert update_readme_flags.with_current_flags(readme) == readme


def test_the_page_of_request_fields_is_current() -> None:
    assert update_api_fields.PAGE.read_text(encoding="utf-8") == update_api_fields.page()


def test_an_outdated_table_of_flags_is_noticed() -> None:
    readme = README.read_text(encoding="utf-8")
    assert update_readme_flags.with_current_flags(readme.replace("| `--port` |", "| `--prt` |")) == readme


def test_a_readme_without_the_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="has no"):
        update_readme_flags.with_current_flags("# graphllm")


def test_list_items_that_name_a_module_are_found() -> None:
    structure = "- `graphllm/a.py`: does a.\n- `graphllm/b/c.py`: does c.\n`graphllm/d.py`: no item\n"
    assert listed_modules(structure) == ["graphllm/a.py", "graphllm/b/c.py"]


DOCUMENTS = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    assert broken_links(document) == []


def test_a_broken_link_is_noticed(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("[a](page.md) [b](https://example.org/x) [c](gone.md#part) [d](#part)")
    assert broken_links(document) == ["gone.md"]
