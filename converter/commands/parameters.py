"""From the fields of a request to the options of a typer command, and from what was typed to the request."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperOption
from typer.models import OptionInfo

from converter import __version__
from converter.commands.console import Console
from converter.commands.ending import print_text
from converter.commands.requests import SHOWN_AS
from converter.errors import UsageError
from converter.json_text import json_text
from converter.reporting import Reporter

R = TypeVar("R", bound="Any")


@dataclasses.dataclass(frozen=True)
class Output:
    """The output options of every command."""

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False

    @cached_property
    def reporter(self) -> Console:
        """Shows progress on stderr."""
        return Console(quiet=self.quiet, verbose=self.verbose)

    @property
    def answer(self) -> Reporter:
        """Shows the answer: on stdout, or with --json on stderr."""
        require_stdout(True)
        return self.reporter if self.as_json else Console(stdout=True)

    def json(self, content: Any) -> None:
        """Print the one JSON object where it was asked for."""
        if self.as_json:
            print_text(json_text(content))


def require_stdout(wanted: bool) -> bool:
    """Raise UsageError if a result is wanted and stdout is closed."""
    if wanted and sys.stdout is None:
        raise UsageError("The result cannot be written: stdout is closed.", "Leave it open, or leave out --json.")
    return wanted


def _silence_libraries(quiet: bool) -> bool:
    """Switch off the progress bars of huggingface_hub and datasets, which read these when they are imported."""
    if quiet:
        os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    return quiet


def show_version(wanted: bool) -> bool:
    """Print the version and end."""
    if wanted:
        print_text(f"mmod-convert {__version__}")
        raise typer.Exit
    return wanted


def _show_all(ctx: typer.Context, wanted: bool) -> bool:
    if wanted:
        for parameter in ctx.command.params:
            if isinstance(parameter, TyperOption):
                parameter.hidden = False
        typer.echo(ctx.get_help())
        raise typer.Exit
    return wanted


SHOWN = {
    "as_json": typer.Option(
        "--json", help="Print one JSON object on stdout; all else goes to stderr.", callback=require_stdout
    ),
    "quiet": typer.Option("--quiet", "-q", help="Show warnings and errors only.", callback=_silence_libraries),
    "verbose": typer.Option("--verbose", "-v", help="Show every step."),
    "debug": typer.Option("--debug", help="Show tracebacks of errors."),
    "version": typer.Option(
        "--version", help="Show the version.", callback=show_version, is_eager=True, hidden=True
    ),
}
# The placeholder of an option's value, where it is not the option's name.
_METAVARS = {
    **dict.fromkeys(("data", "held_out", "commit_message"), "TEXT"),
    **dict.fromkeys(("output", "folder", "folders"), "FOLDER"),
    **dict.fromkeys(("push_revision", "base_revision"), "REVISION"),
    "repo_id": "OWNER/NAME",
}
HELP_ALL = typer.Option("--help-all", help="Show all options.", callback=_show_all, is_eager=True)
_NO_VALUE = " "
for _option in (*SHOWN.values(), HELP_ALL):
    _option.metavar = _NO_VALUE


def register(
    name: str, request_type: type[R], *apps: typer.Typer
) -> Callable[[Callable[[R, Output], None]], Callable[[R, Output], None]]:
    """Make a function a command of typer applications, with an option or argument for each field of its request.

    Options in a help panel are shown by ``--help-all`` only.
    """

    def decorate(run: Callable[[R, Output], None]) -> Callable[[R, Output], None]:
        parameters = [*_parameters(request_type)]
        names = {parameter.name for parameter in parameters}
        has_more = any(get_args(parameter.annotation)[1].hidden for parameter in parameters)
        shown = SHOWN | ({"help_all": HELP_ALL} if has_more else {})
        parameters += [
            inspect.Parameter(
                key, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[bool, option], default=False
            )
            for key, option in shown.items()
        ]

        def command(**given: Any) -> None:
            values = {key: value for key, value in given.items() if key in names and value is not None}
            values = {key: _as_meant(value) for key, value in values.items()}
            run(request_type(**values), Output(given["as_json"], given["quiet"], given["verbose"]))

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        command.__doc__ = run.__doc__
        for app in apps:
            app.command(name, no_args_is_help=any(p.default is p.empty for p in parameters))(command)
        return run

    return decorate


def _as_meant(value: Any) -> Any:
    """A value of the command line for its request. Shells leave the ~ of ``--output=~/x`` as it is."""
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))
    return tuple(value) if isinstance(value, list) else value


def _parameters(request_type: type[Any]) -> Iterator[inspect.Parameter]:
    """A parameter for each field, the type's own before those it inherits."""
    hints = get_type_hints(request_type, include_extras=True)
    types = [kind.__annotations__ for kind in request_type.__mro__ if dataclasses.is_dataclass(kind)]
    fields = sorted(
        dataclasses.fields(request_type), key=lambda f: [f.name in names for names in types].index(True)
    )
    for field in fields:
        kind, info = get_args(hints[field.name])
        info = copy.copy(info)
        default: Any = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        if isinstance(info, OptionInfo):
            info.hidden = info.rich_help_panel is not None
            # In an annotation a first name given to Option is its ``default`` until typer reads it.
            if not isinstance(info.default, str):
                info.param_decls = ("--" + field.name.replace("_", "-"),)
        if info.parser is not None:
            kind = str | None if default is None else str
            default = SHOWN_AS[info.parser](default) if default else None
        elif get_origin(kind) is tuple:
            kind = list[get_args(kind)[0]]  # type: ignore[misc]
            default = None if default == () else default
        if "Literal" not in str(kind):
            usual = _METAVARS.get(field.name, field.name.upper().replace("_", "-"))
            info.metavar = info.metavar or (_NO_VALUE if kind is bool else usual)
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, info], default=default
        )
