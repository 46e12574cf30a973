"""The command line: flags generated from the config dataclasses, then the command runs.

`serve` is the default command, `plan` says what fits on a GPU. Owns how fields become flags and how
errors become exit codes: 2 for a flag that cannot work, 1 for a server that cannot start. Owns no
default, no help text and no check of its own: those are the dataclasses'. Whatever is slow to import is
imported after the arguments are understood.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from graphllm import __version__
from graphllm.config import EngineConfig, PlanConfig, ServerConfig, parse_bytes
from graphllm.errors import ConfigError, StartupError

PROGRAM = "graphllm"
EXIT_STARTUP_ERROR = 1
EXIT_USAGE_ERROR = 2
EXIT_INTERRUPTED = 130

Config = TypeVar("Config", EngineConfig, ServerConfig, PlanConfig)
AnyConfig = type[EngineConfig] | type[ServerConfig] | type[PlanConfig]


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


def flags(config: AnyConfig) -> list[Flag]:
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
    """The command line of `serve`. Every value is None unless it was given."""
    parser = _parser(
        f"{PROGRAM} [serve] [options]\n       {PROGRAM} plan --gpu CARD [options]",
        description="Serve a language model over the OpenAI API. 'plan' says what fits on a GPU.",
        groups={"model and engine": EngineConfig, "server": ServerConfig},
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    return parser


def build_plan_parser() -> argparse.ArgumentParser:
    """The command line of `plan`: its own flags and the engine's."""
    return _parser(
        f"{PROGRAM} plan --gpu CARD [options]",
        description="Say what a model takes on a GPU and what fits beside it. Needs no GPU and reads no "
        "weights; --model may be a config.json.",
        groups={"plan": PlanConfig, "model and engine": EngineConfig},
    )


def parse_configs(argv: Sequence[str]) -> tuple[EngineConfig, ServerConfig]:
    """What arguments of `serve` ask for. Raises ConfigError; exits for what argparse refuses or answers."""
    # A leading word, not an argparse positional, which would swallow the value of a misspelt flag.
    arguments = build_parser().parse_args(argv[1:] if argv[:1] == ["serve"] else argv)
    return _build(EngineConfig, arguments), _build(ServerConfig, arguments)


def parse_plan_configs(argv: Sequence[str]) -> tuple[EngineConfig, PlanConfig]:
    """What arguments of `plan`, without that word, ask for. Raises and exits as `parse_configs` does."""
    arguments = build_plan_parser().parse_args(argv)
    return _build(EngineConfig, arguments), _build(PlanConfig, arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the return value is the process's exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _plan(argv[1:]) if argv[:1] == ["plan"] else _serve(argv)
    except ConfigError as error:
        _print_error(error.message)
        return EXIT_USAGE_ERROR
    except StartupError as error:
        _print_error(error.message)
        return EXIT_STARTUP_ERROR
    except KeyboardInterrupt:
        # Before the server listens for signals there is nothing to drain.
        return EXIT_INTERRUPTED


def _serve(argv: Sequence[str]) -> int:
    engine_config, server_config = parse_configs(argv)
    # Here, not above: --help and --version must not wait for torch.
    from graphllm.server.app import serve

    return serve(engine_config, server_config)


def _plan(argv: Sequence[str]) -> int:
    """Prints the plan, also of what does not fit; the exit code is then that of a flag that cannot work."""
    engine_config, plan_config = parse_plan_configs(argv)
    from graphllm.engine.planning import as_json, as_text, plan_capacity

    capacity = plan_capacity(engine_config, plan_config)
    print(json.dumps(as_json(capacity), indent=2) if plan_config.json else as_text(capacity))
    return 0 if capacity.plan is not None else EXIT_USAGE_ERROR


class _OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage of thirty flags would bury it."""

    def error(self, message: str) -> NoReturn:
        _print_error(f"{message} (see {PROGRAM} --help)")
        sys.exit(EXIT_USAGE_ERROR)


class _HelpFormatter(argparse.HelpFormatter):
    """Never breaks a flag's name at its hyphens: `--max-num-seqs` stays in one piece to copy."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def _parser(usage: str, *, description: str, groups: Mapping[str, AnyConfig]) -> argparse.ArgumentParser:
    """A parser with the flags of config dataclasses, by the title of their group."""
    parser = _OneLineParser(
        prog=PROGRAM,
        usage=usage,
        description=description,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    for title, config in groups.items():
        group = parser.add_argument_group(title)
        for flag in flags(config):
            _add_flag(group, flag)
    return parser


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
    is_list = flag.type is tuple
    group.add_argument(
        flag.name,
        dest=flag.field,
        type=_argument_type(convert),
        nargs="+" if is_list else None,
        action=_Joined if is_list else "store",
        choices=None if flag.choices is None else [convert(choice) for choice in flag.choices],
        metavar=flag.metavar or (None if flag.choices else _METAVARS[flag.type]),
        help=help,
    )


class _Joined(argparse.Action):
    """The parts of a tuple, given as one argument or as several."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, tuple(itertools.chain.from_iterable(values)))


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
    """`int | None` to int, `tuple[int, ...]` to tuple."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = [argument for argument in get_args(hint) if argument is not type(None)]
    hint = get_origin(hint) or hint
    assert hint in (bool, int, float, str, tuple), hint
    return hint  # type: ignore[no-any-return]


def _default_text(default: Any, parse: Callable[[str], Any] | None) -> str | None:
    if default is None:
        return None
    if isinstance(default, bool):
        return "on" if default else "off"
    if parse is parse_bytes and default % 1024**2 == 0:
        return f"{default // 1024**2}MiB"
    if isinstance(default, float) and not default.is_integer():
        return f"{default:g}"
    return f"{default:.0f}" if isinstance(default, float) else str(default)


def _print_error(message: str) -> None:
    print(f"{PROGRAM}: error: {message}", file=sys.stderr)
