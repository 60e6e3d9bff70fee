"""The command ``xdit-launch``. Nothing here imports torch: help, plans and refusals are instant."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from xdit_core.errors import UsageError, XditError
from xdit_core.printable import printable
from xdit_launcher import completion, hints
from xdit_launcher.backends import registry
from xdit_launcher.commands import listings
from xdit_launcher.node.signals import INTERRUPTED
from xdit_launcher.printing import UNEXPECTED, print_lines, report_unexpected
from xdit_launcher.run_folders import run_folder

if TYPE_CHECKING:
    from xdit_core.plan import Plan
    from xdit_launcher.backends.base import Backend


SERVE_PACKAGES = ("fastapi", "starlette", "pydantic", "uvicorn", "python_multipart")  # of the extra ``serve``
COMMAND_LINE = "xdit.command_line"  # of the words, in what click keeps for a call


class Main(click.Group):
    """``xdit-launch [run] ...``: what does not start with the name of a command is a run."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Add the command ``run`` where it was left out."""
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help", "--version"):
            args = ["run", *args]
        ctx.meta[COMMAND_LINE] = [ctx.info_name or "xdit-launch", *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete commands, and what a run takes, since the command may be left out."""
        return [
            *super().shell_complete(ctx, incomplete),
            *completion.words(ctx, self.commands["run"].params[0], incomplete),
        ]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the options of a run too, because most people mean a run."""
        records = [
            r for p in run.get_params(ctx) if not isinstance(p, click.Argument) and (r := p.get_help_record(ctx))
        ]
        with formatter.section("Options of a run"):
            formatter.write_dl([r for r in records if "--help" not in r[0]])
        super().format_options(ctx, formatter)

    def invoke(self, ctx: click.Context) -> Any:
        """Print errors of xdit as sentences, never as tracebacks."""
        try:
            return super().invoke(ctx)
        except XditError as error:
            click.echo(str(error), err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)
        except click.ClickException as error:
            error.message = printable(error.message)  # type: ignore[misc]
            raise
        except (click.Abort, click.exceptions.Exit, BrokenPipeError):
            raise
        except Exception as error:
            report_unexpected(error)
            ctx.exit(UNEXPECTED)

    def make_context(self, *args: Any, **more: Any) -> click.Context:
        """Read the command line; Ctrl-C ends it as it ends a run."""
        try:
            return super().make_context(*args, **more)
        except click.ClickException as error:
            error.message = printable(error.message)  # type: ignore[misc]
            raise
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)


class RunCommand(click.Command):
    """A command whose help lists the settings of every run."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the words of the command, and explain how settings are written where one is written as an option."""
        words = list(args)  # click takes them away one by one
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            meant = f"; did you mean {error.possibilities[0]}?" if error.possibilities else "."
            if setting := hints.meant_setting(error.option_name, words):
                raise UsageError(
                    f"there is no option {error.option_name}; settings are written without dashes: {setting}."
                ) from error
            raise UsageError(
                f"there is no option {error.option_name}{meant} Settings are written key=value, such as steps=20 or "
                "usp.ulysses=2; a prompt that starts with a dash comes after --."
            ) from error

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the settings, from their classes."""
        from xdit_core.settings import ModelSettings, RunSettings
        from xdit_launcher.commands.show import settings_help

        with formatter.section("Settings"):
            for line in [*settings_help(RunSettings), *settings_help(ModelSettings, "model.")]:
                formatter.write(f"  {line}\n")
            formatter.write(
                "\n  model=NAME: see xdit-launch models; settings of a plugin: see xdit-launch plugins show NAME\n"
            )


def print_version(ctx: click.Context, option: click.Parameter, value: bool) -> None:
    """``xdit-launch 0.1.0``."""
    if value and not ctx.resilient_parsing:
        try:
            version = metadata.version("xdit")
        except metadata.PackageNotFoundError:
            version = "not installed"
        click.echo(f"xdit-launch {version}")
        ctx.exit()


@click.group(
    cls=Main,
    subcommand_metavar="[COMMAND] [KEY=VALUE | PROMPT]...",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
)
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=print_version, help="Show the version."
)
def cli() -> None:
    """Draw pictures with a diffusion transformer on several devices.

    \b
    xdit-launch model=emoji "red heart"
    xdit-launch --plugins usp,pipefusion model=sd3 steps=20 "a red fox"
    xdit-launch --plugins usp --dry-run model=sd3 usp.ulysses=4

    Words with = are settings (xdit-launch run --help lists them), all others are prompts. Without a command, run is
    meant.
    """


def shared(command: Any) -> Any:
    """The options and words that say what to run and where."""
    for option in (
        click.argument("words", nargs=-1, metavar="[KEY=VALUE | PROMPT]...", shell_complete=completion.words),
        registry.options,
        click.option("--config", metavar="FILE", help="A YAML file with settings; those of the command line win."),
        click.option(
            "--plugins",
            multiple=True,
            metavar="A,B",
            shell_complete=completion.plugins,
            help="Parallel methods, in any order; without any, one serial process runs.",
        ),
    ):
        command = option(command)
    return command


def parse_request(
    words: tuple[str, ...],
    plugins: tuple[str, ...],
    config: str | None,
    backend: str | None,
    options: dict[str, str | None],
) -> tuple[list[str], dict[str, Any], Backend]:
    """Names of plugins, settings, and the backend, from the words and options of a command."""
    from xdit_launcher.arguments import names_in, values_of

    values, named = values_of(words, config)
    if "model" not in values:
        hints.refuse_unknown_command(words, cli.commands)
    on, values = registry.choose(backend, options, values)
    return [name for item in plugins for name in names_in(item)] if plugins else list(named), values, on


@cli.command(cls=RunCommand)
@shared
@click.option("--dry-run", is_flag=True, help="Show the plan and start nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print the plan as JSON, as a worker reads it.")
@click.option("--trace", is_flag=True, help="Write what every rank did and when, with a summary and a picture.")
@click.option("--profile", is_flag=True, help="Write the same, and run torch's profiler on every rank.")
@click.pass_context
def run(
    ctx: click.Context,
    /,
    words: tuple[str, ...],
    plugins: tuple[str, ...],
    config: str | None,
    backend: str | None,
    dry_run: bool,
    as_json: bool,
    trace: bool,
    profile: bool,
    **options: str | None,
) -> None:
    """Draw the prompts (the default command)."""
    from xdit_core.outputs.names import targets
    from xdit_core.planning.planner import make_plan

    if as_json and not dry_run:
        raise UsageError("--json shows a plan; add --dry-run.")
    chosen, values, on = parse_request(words, plugins, config, backend, options)
    flags = [name for name, wanted in (("trace", trace), ("profile", profile)) if wanted]
    values |= dict.fromkeys(flags, "yes")
    devices = on.devices()
    plan = make_plan(chosen, values, devices=devices, weights=not dry_run)
    targets(plan.run, plan.facts.video)  # refuses an out= whose suffix does not fit
    if not plan.run.prompt:
        raise UsageError('there is no prompt; write what to draw, such as "red heart".')
    if dry_run:
        for_the_run = [word for word in words if not word.startswith(f"{on.name}.")]
        command = [*(["--plugins", ",".join(chosen)] if chosen else []), *(["--config", config] if config else [])]
        command += [*(f"--{name}" for name in flags), *for_the_run]
        target = option_words({"on": backend, **options}) + [word for word in words if word not in for_the_run]
        print_plan(plan, command, on, target, as_json, on_this_machine=devices is None)
        return
    on.check(plan)
    with run_folder(plan, ctx.meta[COMMAND_LINE]) as folder:
        print_notes(plan, words, bool(values.get("prompt") or values.get("prompts")))
        ctx.exit(on.start(plan, folder))


def option_words(options: Mapping[str, str | None]) -> list[str]:
    """The words of the options that are given, such as ``--node-rank 0``."""
    given = {name: value for name, value in options.items() if value}
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]


def print_plan(
    plan: Plan, command: Sequence[str], on: Backend, target: Sequence[str], as_json: bool, on_this_machine: bool
) -> None:
    """Print a plan: as JSON, as the document of the backend, or else in lines.

    Args:
        command, on, target, on_this_machine: as of `xdit_launcher.commands.show.plan_lines`.
    """
    from xdit_core.outputs.names import all_files, targets
    from xdit_launcher.commands import show

    document = plan.to_json() if as_json else on.document(plan, command).rstrip()
    if document:
        click.echo(document)
        return
    files = all_files(plan.run, targets(plan.run, plan.facts.video))
    print_lines(show.plan_lines(plan, files, command, on, target, on_this_machine))


@cli.command(cls=RunCommand)
@shared
@click.pass_context
def verify(
    ctx: click.Context,
    /,
    words: tuple[str, ...],
    plugins: tuple[str, ...],
    config: str | None,
    backend: str | None,
    **options: str | None,
) -> None:
    """Run a plan and a serial process, and compare.

    The exit code is 0 if the plan computes what it should, within rounding: what the serial process does, or for a
    displaced plan what its schedule gives in one process. It is 4 if not; then the first block and step that differ
    are named.
    """
    from xdit_launcher.commands import verify as command

    chosen, values, on = parse_request(words, plugins, config, backend, options)
    with contextlib.ExitStack() as stack:
        ctx.exit(
            command.verify(
                chosen, values, on, lambda plan: stack.enter_context(run_folder(plan, ctx.meta[COMMAND_LINE]))
            )
        )


@cli.command(cls=RunCommand)
@shared
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others need a key.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--data", default="serve-data", show_default=True, metavar="DIR", help="Where jobs and results are kept.")
@click.option("--keys", metavar="FILE", help="Keys of clients, one a line; or the variable XDIT_API_KEYS.")
@click.option("--loras", metavar="FILE", help="LoRAs that clients may ask for, NAME = PATH or hub id on each line.")
@click.option(
    "--replicas",
    default="1",
    show_default=True,
    metavar="N",
    help="Gangs that answer requests, each with all ranks of the plan; 1..4 for as many as the queue needs.",
)
@click.pass_context
def serve(
    ctx: click.Context,
    /,
    host: str,
    port: int,
    data: str,
    keys: str | None,
    loras: str | None,
    replicas: str,
    words: tuple[str, ...],
    plugins: tuple[str, ...],
    config: str | None,
    backend: str | None,
    **options: str | None,
) -> None:
    """Answer requests over HTTP with ranks that stay: OpenAI's API of pictures and videos, and one of our own.

    Settings of the server are written serve.queue=100; see the page on serving.
    """
    chosen, values, on = parse_request(words, plugins, config, backend, options)
    if values.get("prompt") or values.get("prompts"):
        raise UsageError("serve takes no prompt, clients send theirs; leave it out.")
    if hasattr(on.module, "service"):
        print_service(chosen, values, on, words, config, replicas, data, loras)
        return
    try:
        from xdit_launcher.serve import command
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in SERVE_PACKAGES:
            raise
        raise UsageError(f"serve needs {error.name}; install it: pip install 'xdit[serve]'.") from error
    ctx.exit(command.serve(chosen, values, on, host, port, data, keys, replicas, loras))


def print_service(
    chosen: Sequence[str],
    values: Mapping[str, Any],
    on: Backend,
    words: Sequence[str],
    config: str | None,
    replicas: str,
    data: str,
    loras: str | None,
) -> None:
    """Print the manifests of a server; see `serve` for the arguments."""
    from xdit_core.planning.planner import make_plan
    from xdit_launcher.serve.gangs.replicas import Replicas

    count = Replicas.parse(replicas)
    plan = make_plan(chosen, {k: v for k, v in values.items() if not k.startswith("serve.")}, devices=on.devices())
    command = [*(["--plugins", ",".join(chosen)] if chosen else []), *(["--config", config] if config else [])]
    command += [word for word in words if not word.startswith(f"{on.name}.")]
    command += ["--loras", loras] if loras else []
    click.echo(on.service(plan, command, (count.least, count.most), data).rstrip())


@cli.command(cls=RunCommand)
@shared
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_context
def doctor(
    ctx: click.Context,
    /,
    as_json: bool,
    words: tuple[str, ...],
    plugins: tuple[str, ...],
    config: str | None,
    backend: str | None,
    **options: str | None,
) -> None:
    """Look at all machines before a run: versions, devices, model, network.

    With --plugins and settings such as model=sd3 it also checks what that run needs. The exit code is 1 if something
    must be repaired.
    """
    from xdit_core.planning.planner import make_plan
    from xdit_launcher.commands import doctor as command

    chosen, values, on = parse_request(words, plugins, config, backend, options)
    ctx.exit(
        command.doctor(
            on, make_plan(chosen, values, devices=on.devices(), weights=False) if values or chosen else None, as_json
        )
    )


def print_notes(plan: Plan, words: Sequence[str], prompted: bool) -> None:
    """Print what was decided for the user."""
    from xdit_launcher.arguments import is_setting

    if note := hints.loose_words([word for word in words if not is_setting(word)]):
        print_lines([note], err=True)
    if not prompted:
        print_lines([f"no prompt given; drawing {plan.model}'s sample: {plan.run.prompt[0]}"], err=True)
    for note in plan.notes:
        print_lines([note], err=True)


cli.add_command(listings.plugins)
cli.add_command(listings.models)


def main() -> None:
    """The console script."""
    completion.install()
    try:
        cli(prog_name="xdit-launch")
    except BrokenPipeError:  # such as ``xdit-launch plugins | head -1``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
