"""The command line: flags generated from the config dataclasses, then the command runs.

Owns how fields become flags and how errors become exit codes: 2 for a flag that cannot work, 1 for a
server that cannot start. Owns no default, no help text and no check of its own: those are the
dataclasses'. Whatever is slow to import is imported after the arguments are understood.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from graphllm import __version__
from graphllm.config import EngineConfig, ServerConfig, parse_bytes
from graphllm.errors import ConfigError, StartupError

PROGRAM = "graphllm"
EXIT_STARTUP_ERROR = 1
EXIT_USAGE_ERROR = 2
EXIT_INTERRUPTED = 130

Config = TypeVar("Config", EngineConfig, ServerConfig)


@dataclasses.dataclass(frozen=True, slots=True)
class Flag:
    """One config field as the command line and the README show it.

    `default` is None where the help text itself says what happens by default.
    """

    field: str
    name: str
    type: type
    help: str
    default: str | None
    choices: tuple[str, ...] | None
    metavar: str | None
    parse: Callable[[str], Any] | None


def flags(config: type[EngineConfig] | type[ServerConfig]) -> list[Flag]:
    """The flags of a config dataclass, in the order of its fields."""
    hints = get_type_hints(config)
    found = []
    for field in dataclasses.fields(config):
        metadata = field.metadata
        choices = metadata.get("choices")
        found.append(
            Flag(
                field=field.name,
                name=metadata.get("flag") or "--" + field.name.replace("_", "-"),
                type=_plain_type(hints[field.name]),
                help=metadata["help"],
                default=_default_text(field.default, metadata.get("parse")),
                choices=None if choices is None else tuple(str(choice) for choice in choices),
                metavar=metadata.get("metavar"),
                parse=metadata.get("parse"),
            )
        )
    return found


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. Every value is None unless it was given."""
    parser = _OneLineParser(
        prog=PROGRAM,
        usage="%(prog)s [serve] [options]",
        description="Serve a language model over the OpenAI API.",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    for title, config in (("model and engine", EngineConfig), ("server", ServerConfig)):
        group = parser.add_argument_group(title)
        for flag in flags(config):
            _add_flag(group, flag)
    return parser


def parse_configs(argv: Sequence[str]) -> tuple[EngineConfig, ServerConfig]:
    """The configs that arguments ask for. Raises ConfigError; exits for what argparse refuses or answers."""
    # A leading word, not an argparse positional, which would swallow the value of a misspelt flag.
    arguments = build_parser().parse_args(argv[1:] if argv[:1] == ["serve"] else argv)
    return _build(EngineConfig, arguments), _build(ServerConfig, arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the return value is the process's exit code."""
    try:
        engine_config, server_config = parse_configs(sys.argv[1:] if argv is None else argv)
        # Here, not above: --help and --version must not wait for torch.
        from graphllm.server.app import serve

        return serve(engine_config, server_config)
    except ConfigError as error:
        _print_error(error.message)
        return EXIT_USAGE_ERROR
    except StartupError as error:
        _print_error(error.message)
        return EXIT_STARTUP_ERROR
    except KeyboardInterrupt:
        # Before the server listens for signals there is nothing to drain.
        return EXIT_INTERRUPTED


class _OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage of thirty flags would bury it."""

    def error(self, message: str) -> NoReturn:
        _print_error(f"{message} (see {PROGRAM} --help)")
        sys.exit(EXIT_USAGE_ERROR)


def _add_flag(group: argparse._ArgumentGroup, flag: Flag) -> None:
    help = flag.help.replace("%", "%%")
    if flag.default is not None:
        help += f" (default: {flag.default})"
    if flag.type is bool:
        group.add_argument(
            flag.name, dest=flag.field, action=argparse.BooleanOptionalAction, default=None, help=help
        )
        return
    convert: Callable[[str], Any] = flag.parse or flag.type
    group.add_argument(
        flag.name,
        dest=flag.field,
        type=_argument_type(convert),
        choices=None if flag.choices is None else [convert(choice) for choice in flag.choices],
        metavar=flag.metavar or (None if flag.choices else _METAVARS[flag.type]),
        help=help,
    )


_METAVARS = {int: "N", float: "X", str: "TEXT"}


def _argument_type(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """`convert`, with a ConfigError turned into what argparse reports beside the flag's name."""

    def argument(text: str) -> Any:
        try:
            return convert(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(error.message) from None

    # argparse says "invalid int value" from this.
    argument.__name__ = convert.__name__
    return argument


def _build(config: type[Config], arguments: argparse.Namespace) -> Config:
    names = [field.name for field in dataclasses.fields(config)]
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return config(**given)


def _plain_type(hint: Any) -> type:
    """`int | None` to int."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = [argument for argument in get_args(hint) if argument is not type(None)]
    assert hint in (bool, int, float, str), hint
    return hint  # type: ignore[no-any-return]


def _default_text(default: Any, parse: Callable[[str], Any] | None) -> str | None:
    if default is None:
        return None
    if isinstance(default, bool):
        return "on" if default else "off"
    if parse is parse_bytes and default % 1024**2 == 0:
        return f"{default // 1024**2}MiB"
    return f"{default:g}" if isinstance(default, float) else str(default)


def _print_error(message: str) -> None:
    print(f"{PROGRAM}: error: {message}", file=sys.stderr)
