"""Writes the README's table of flags from the config dataclasses; `--check` only compares.

    python -m tools.update_readme_flags [--check]

Owns the table's form. What a flag is called and what it says is `graphllm.cli.flags`'.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from graphllm import cli
from graphllm.config import EngineConfig, ServerConfig

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN = "<!-- flags: written by tools/update_readme_flags.py -->"
END = "<!-- end of flags -->"


def flags_table() -> str:
    """The flags of both config dataclasses as a Markdown table."""
    lines = ["| flag | default | what it does |", "| --- | --- | --- |"]
    for config in (EngineConfig, ServerConfig):
        lines += [_row(flag) for flag in cli.flags(config)]
    return "\n".join(lines)


def with_current_flags(readme: str) -> str:
    """`readme` with the text between the two marks replaced. Raises ValueError without the marks."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no {BEGIN!r} ... {END!r}")
    return f"{before}{BEGIN}\n{flags_table()}\n{END}{after}"


def _row(flag: cli.Flag) -> str:
    name = f"`{flag.name}`"
    if flag.type is bool:
        name += f" `--no-{flag.name.removeprefix('--')}`"
    elif flag.choices:
        name += " " + " ".join(f"`{choice}`" for choice in flag.choices)
    default = "" if flag.default is None else f"`{flag.default}`"
    return f"| {name} | {default} | {flag.help} |"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the README's table of flags.")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 if it is not current"
    )
    check = parser.parse_args().check
    readme = README.read_text(encoding="utf-8")
    current = with_current_flags(readme)
    if current == readme:
        return 0
    if check:
        print(
            "README.md: the table of flags is not current; run python -m tools.update_readme_flags",
            file=sys.stderr,
        )
        return 1
    README.write_text(current, encoding="utf-8")
    print("README.md: table of flags written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
