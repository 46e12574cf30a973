"""Writes the table of model families into docs/models.md; `--check` only compares.

    python -m tools.update_model_table [--check]

Owns the table's form. Which families and variants there are is said by the lists behind the equality tests,
`tests/models/families.py`, `moe_families.py` and `text_part_families.py`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.models.families import FAMILIES
from tests.models.moe_families import MOE_FAMILIES
from tests.models.text_part_families import TEXT_PART_FAMILIES

PROVEN_FAMILIES = FAMILIES + MOE_FAMILIES + TEXT_PART_FAMILIES
MODELS = Path(__file__).resolve().parents[1] / "docs" / "models.md"
BEGIN = "<!-- families: written by tools/update_model_table.py -->"
END = "<!-- end of families -->"


def families_table() -> str:
    """The families as a Markdown table, dense ones first."""
    lines = ["| family | models | `architectures` | proven in these variants |", "| --- | --- | --- | --- |"]
    for family in PROVEN_FAMILIES:
        variants = "; ".join(family.variants)
        names = ", ".join(f"`{name}`" for name in (family.architecture, *family.older_architectures))
        lines.append(f"| {family.name} | {family.models} | {names} | {variants} |")
    return "\n".join(lines)


def with_current_families(text: str) -> str:
    """`text` with what stands between the two marks replaced. Raises ValueError without the marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"docs/models.md has no {BEGIN!r} ... {END!r}")
    return f"{before}{BEGIN}\n{families_table()}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the table of model families.")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 if it is not current"
    )
    check = parser.parse_args().check
    text = MODELS.read_text(encoding="utf-8")
    current = with_current_families(text)
    if current == text:
        return 0
    if check:
        print(
            "The table in docs/models.md is not current: run python -m tools.update_model_table",
            file=sys.stderr,
        )
        return 1
    MODELS.write_text(current, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
