"""The commands that list what is installed: ``plugins``, ``models``."""

from __future__ import annotations

import click

from xdit_launcher import completion
from xdit_launcher.printing import print_lines

json_option = click.option("--json", "as_json", is_flag=True, help="Print as JSON.")


@click.group(invoke_without_command=True)
@click.option("--matrix", "table", is_flag=True, help="Show which of them can be combined, as a Markdown table.")
@click.option(
    "--model",
    default="emoji",
    show_default=True,
    metavar="NAME",
    shell_complete=completion.models,
    help="With --matrix: for which model.",
)
@click.option(
    "--device", default="cuda", show_default=True, metavar="NAME", help="With --matrix: on which device, cpu or cuda."
)
@json_option
@click.pass_context
def plugins(ctx: click.Context, table: bool, model: str, device: str, as_json: bool) -> None:
    """List the parallel methods that are installed; ``plugins show NAME`` lists the settings of one."""
    from xdit_launcher.commands import matrix, pages, show

    values = {"model": model, "device": device}
    if table:
        print_lines(pages.as_json(pages.pairs(values)) if as_json else matrix.lines(values))
    elif ctx.invoked_subcommand is None:
        print_lines(pages.as_json(pages.strategies()) if as_json else show.plugin_list())


@plugins.command("show")
@click.argument("name", shell_complete=completion.plugins)
@json_option
def plugins_show(name: str, as_json: bool) -> None:
    """Describe one parallel method: what it owns, and its settings."""
    from xdit_core.registry.registry import STRATEGIES, Registry
    from xdit_launcher.commands import pages, show
    from xdit_launcher.inspection import inspect_strategy

    if as_json:
        print_lines(pages.as_json(pages.strategy(inspect_strategy(Registry().pick(STRATEGIES, name)))))
    else:
        print_lines(show.plugin_page(name))


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def models(ctx: click.Context, as_json: bool) -> None:
    """List the models that are installed; ``models show NAME`` says what one takes."""
    from xdit_launcher.commands import pages, show

    if ctx.invoked_subcommand is None:
        print_lines(pages.as_json(pages.model_list()) if as_json else show.model_list())


@models.command("show")
@click.argument("name", shell_complete=completion.models)
@click.argument("words", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=completion.words)
@json_option
def models_show(name: str, words: tuple[str, ...], as_json: bool) -> None:
    """Describe one model: its defaults, the settings that it takes, the parallel methods that fit.

    With model.path=DIR the parallel methods are tried on that checkpoint.
    """
    from xdit_core.settings import parse_words
    from xdit_launcher.commands import pages

    values = parse_words(words)
    print_lines(pages.as_json(pages.model(name, values)) if as_json else pages.model_page(name, values))
