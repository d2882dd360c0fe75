"""`autopar COMMAND ...`: parse, run, and turn what goes wrong into one line and an exit code.

0: done. 1: a plan that does not fit, or a check that fails. 2: a mistake in the call.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from autopar.cli import arguments, calibrate, check, diff, explain, inspect, plan, price, search, verify
from autopar.cli.flags import with_flags
from autopar.cli.terminal import quiet_libraries, wrapped
from passes.errors import AutoparError, NoFeasiblePlanError

COMMANDS = (inspect, plan, search, price, explain, diff, check, verify, calibrate)

_ABOUT = "Lay a PyTorch model out over many devices: plan it, read the plan, prove it."
_EPILOG = """\
MODEL is a preset (llama3-8b, gpt3-175b, mixtral-8x7b, ...; dimensions only), a Hugging Face config.json
or its folder, or file.py:function, which returns a module, or a module and one data-parallel rank's inputs.

example:
  autopar plan llama3-8b --mesh dp=8,tp=8 --hardware h100 --batch 2 --seq 4096

exit code: 0 success; 1 a plan that does not fit, or a check that fails; 2 a mistake in the call
"""


def parser() -> argparse.ArgumentParser:
    """All commands."""
    top = _Parser("autopar", description=_ABOUT, epilog=_filled(_EPILOG), formatter_class=_Formatter)
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="command")
    for module in COMMANDS:
        about, _, rest = (module.__doc__ or "").partition("\n\n")
        name = module.__name__.rpartition(".")[2]
        one = commands.add_parser(
            name, help=module.HELP, description=_filled(about), epilog=_filled(rest.strip()), formatter_class=_Formatter
        )
        module.add_arguments(one)
        one.set_defaults(run=module.run, flags=getattr(module, "FLAGS", arguments.FLAGS))
    return top


def _filled(text: str) -> str:
    """Paragraphs as wide as the terminal; an example is left as it is, since its lines are to be copied."""
    return "\n\n".join(each if each.startswith("example:") else wrapped(each) for each in text.split("\n\n"))


class _Parser(argparse.ArgumentParser):
    """Says what was wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help\n")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help as wide as the terminal, with examples as they are written."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: nobody looks on, and no file that is written may take its number
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    try:
        given, unknown = parser().parse_known_args(_joined(sys.argv[1:] if argv is None else argv))
    except SystemExit as stop:  # argparse has said why
        return int(stop.code or 0)
    if unknown:
        words = " ".join(unknown)
        return _said(given.command, f"unrecognized arguments: {words}; see autopar {given.command} --help", 2)
    with quiet_libraries():
        return _run(given)


def _joined(words: Sequence[str]) -> list[str]:
    """A flag and a value below zero (`--memory-budget -5GiB`) as one word: else argparse takes it for another flag, and
    says that the value is missing."""
    joined: list[str] = []
    for word in words:
        flag = joined[-1] if joined else ""
        if re.match(r"-\.?\d", word) and re.fullmatch(r"--[a-z-]+", flag):
            joined[-1] = f"{flag}={word}"
        else:
            joined.append(word)
    return joined


def _run(given: argparse.Namespace) -> int:
    try:
        code: int = given.run(given)
        sys.stdout.flush()
        return code
    except NoFeasiblePlanError as error:
        return _said(given.command, with_flags(str(error), given.flags), 1)
    except (AutoparError, ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 0
        if not isinstance(error, AutoparError) and not _of_the_call(error):
            raise
        told = error if isinstance(error, OSError) else with_flags(str(error), given.flags)
        return _said(given.command, told, 2)
    except KeyboardInterrupt:
        return _said(given.command, "stopped", 130)


def _of_the_call(error: BaseException) -> bool:
    """Whether one of our packages raised it, as it does for what a caller got wrong; else it is a bug of ours."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    module = last.tb_frame.f_globals.get("__name__", "") if last is not None else ""
    return isinstance(error, OSError) or module.partition(".")[0] in ("autopar", "passes", "costmodel")


def _said(command: str, error: object, code: int) -> int:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    print(f"autopar {command}: {text}", file=sys.stderr)
    return code
