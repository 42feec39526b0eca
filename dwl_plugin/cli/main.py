"""The `dwl` command, and `axolotl dwl` through Axolotl's `axolotl.cli_commands` entry point.

Axolotl imports this module to print its own `--help`, so nothing heavier than click is imported before a command runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from dwl_plugin.cli.output import Console

__all__ = ["main"]


class _Commands(click.Group):
    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The first sentence of each command, to its end: click would cut it off at the width of the terminal."""
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(1000)) for name, command in commands.items() if command])

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _errors():
            return super().invoke(ctx)


@contextmanager
def _errors() -> Iterator[None]:
    """What goes wrong, for click to print: it quotes arguments as they are."""
    from dwl_plugin.errors import ConfigError, DWLError, printable

    try:
        yield
    except ConfigError as error:
        raise click.ClickException(error.told() if error.problems else str(error)) from error
    except DWLError as error:
        raise click.ClickException(str(error)) from error
    except click.UsageError as error:
        if type(error).__name__ != "NoArgsIsHelpError":  # the help, which has lines; click before 8.2 has no such error
            said = printable(error.format_message())
            error.format_message = lambda: said  # type: ignore[method-assign]
        raise


_INPUT = click.Path(exists=True, dir_okay=False, path_type=Path)
_OUTPUT = click.Path(dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)
_COUNT = click.IntRange(1, 10**9)

_config = click.argument("config", type=_INPUT)
_trust = click.option("--trust", is_flag=True, help="Go on although the config could run code or fetch things.")
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")


def _samples(default: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option("--samples", type=_COUNT, default=default, help="Rows of the data to look at.")


def _console() -> Console:
    from dwl_plugin.cli.output import Console

    return Console()


def _versions(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    from importlib.metadata import PackageNotFoundError, version

    if not asked or ctx.resilient_parsing:
        return
    for package in ("axolotl-dwl", "axolotl", "transformers", "torch"):
        try:
            click.echo(f"{package} {version(package)}")
        except PackageNotFoundError:
            click.echo(f"{package} is not installed")
    ctx.exit()


_version = click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_versions, help="Versions of this package and its hosts."
)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@_version
def main() -> None:
    """Class-weighted fine-tuning losses for Axolotl."""


@main.command()
@click.option("--for", "purpose", help="What to train for.", show_default=False)
@click.option("--card", help="What to train on.", show_default=False)
@click.option("--model", help="A name on the Hub or a folder.", show_default="the largest known one that fits the card")
@click.option("--data", metavar="FILE", help="Rows of `messages`, one a line.", show_default="a data set on the Hub")
@click.option("-o", "--out", type=_OUTPUT, default="train.yml", help="The file that is written; never over another.")
def init(purpose: str | None, card: str | None, model: str | None, data: str | None, out: Path) -> None:
    """Write a whole config, with comments, for a purpose and a card; without options, list what there is."""
    from dwl_plugin.cli.init import choices, init

    missing = [option for option, given in (("--for", purpose), ("--card", card)) if given is None]
    if len(missing) == 2 and model is None and data is None:
        choices(_console())
    elif purpose is None or card is None:
        raise click.UsageError(f"Say {' and '.join(missing)}, too; `dwl init` lists what there is.")
    else:
        init(_console(), purpose, card, model, data, out)


@main.command()
@click.argument("name", required=False)
@click.option("-o", "--out", type=_OUTPUT, help="Write it here instead of printing it; never over another file.")
def examples(name: str | None, out: Path | None) -> None:
    """The example configs; with NAME, one of them."""
    from dwl_plugin.cli.examples import examples, write_example

    if name is None:
        examples(_console())
    else:
        write_example(_console(), name, out)


@main.command()
@_config
@_samples(512)
@_trust
@_json
def check(config: Path, samples: int, trust: bool, as_json: bool) -> None:
    """All that is wrong with CONFIG, and what its classes are; trains nothing and loads no weights.

    The status is 0 if nothing is wrong, 1 if something is, and 2 if not all of it could be looked at.
    """
    from dwl_plugin.cli.check import check

    sys.exit(check(_console(), config, samples, trust, as_json))


@main.command()
@_config
@_samples(16)
@click.option("--html", type=_OUTPUT, help="Write one page here instead.")
@_trust
def inspect(config: Path, samples: int, html: Path | None, trust: bool) -> None:
    """The rows that CONFIG trains on, coloured by class: masks, truncation and packing as in the run."""
    from dwl_plugin.cli.inspect import inspect

    sys.exit(inspect(_console(), config, samples, html, trust))


@main.command()
@_config
@_samples(64)
@_trust
@_json
def preflight(config: Path, samples: int, trust: bool, as_json: bool) -> None:
    """How probable the base model of CONFIG finds its targets, and what the literature expects of `dft` there.

    Loads the model as training would: quantised, on the GPU if there is one.
    """
    from dwl_plugin.cli.preflight import preflight

    sys.exit(preflight(_console(), config, samples, trust, as_json))


@main.command()
@_config
@_samples(512)
@click.option("--model", "with_model", is_flag=True, help="Load the model, too, and measure p of the targets by class.")
@click.option("--weigh", metavar="PACK", default="", help="Put weight on the classes of this pack.", show_default=False)
@click.option("--write", is_flag=True, help="Put the block into CONFIG; no other line is touched.")
@_trust
@_json
def suggest(config: Path, samples: int, with_model: bool, weigh: str, write: bool, trust: bool, as_json: bool) -> None:
    """Which loss and classes the data of CONFIG speak for: a block to paste, each line with the count that it rests on.

    Trains nothing, and loads no weights without --model. The status is that of `dwl check`.
    """
    from dwl_plugin.cli.suggest import PACKS, suggest

    if weigh and weigh not in PACKS:
        raise click.UsageError(f"--weigh takes one of {', '.join(PACKS)}, and not {weigh!r}.")
    sys.exit(suggest(_console(), config, samples, trust, with_model, weigh, write, as_json))


@main.command()
@_config
@click.option("--out", type=_FOLDER, required=True, help="Folder for the scored rows; of a run that was cut off, the same again.")
@click.option("--model", help="Score under this one instead: a model, a checkpoint or an adapter, with the tokenizer of CONFIG.")
@click.option("--rows", type=_COUNT, help="Score only so many rows of the data.", show_default="all")
@click.option("--batch-tokens", type=_COUNT, default=4096, help="Tokens of a batch, padding counted.")
@_trust
def score(config: Path, out: Path, model: str | None, rows: int | None, batch_tokens: int, trust: bool) -> None:
    """Write the training data of CONFIG with nll and p of each target under its model, as `datasets` of another run.

    Loads the model as training would. A run that was cut off goes on where it was.
    """
    from dwl_plugin.cli.score import score

    sys.exit(score(_console(), config, out, rows, model, batch_tokens, trust))


@main.command()
@_config
@click.option("--steps", type=_COUNT, help="Optimizer steps of the run, where the YAML has no max_steps.")
@click.option("--epoch-steps", type=_COUNT, help="Optimizer steps of one epoch.")
@click.option("--plot", type=_OUTPUT, help="Draw the curves here: .png, .svg or .pdf.")
@click.option("--trust", is_flag=True, help="Go on although a pack has to be fetched.")
def schedule(config: Path, steps: int | None, epoch_steps: int | None, plot: Path | None, trust: bool) -> None:
    """How α will move over a run of CONFIG, before it runs. Reads only the YAML and its packs."""
    from dwl_plugin.cli.schedule import IMAGE_SUFFIXES, schedule

    if plot is not None and plot.suffix.lower() not in IMAGE_SUFFIXES:
        raise click.UsageError(f"--plot draws {', '.join(IMAGE_SUFFIXES)}, and not {plot.suffix or 'a file without suffix'!r}.")
    schedule(_console(), config, steps, epoch_steps, plot, trust)


@main.command()
@click.argument("runs", metavar="RUN_DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--html", type=_OUTPUT, help="Write a page with figures here, too.")
@click.option("--compare", is_flag=True, help="Lay several runs over one another; changes are against the first.")
def report(runs: tuple[Path, ...], html: Path | None, compare: bool) -> None:
    """What every token class learned in a run, after it or while it goes on.

    RUN_DIR is the `output_dir` of its YAML, or one checkpoint.
    """
    from dwl_plugin.cli.report import report

    if compare != (len(runs) > 1):
        raise click.UsageError("Name one run, or several with --compare: dwl report RUN_DIR --compare RUN_DIR...")
    report(_console(), runs, html)


@main.command()
@click.argument("run", metavar="RUN_DIR", type=click.Path(path_type=Path))
@click.option("--out", type=_OUTPUT, help="Write it here instead of printing it.")
def export(run: Path, out: Path | None) -> None:
    """A run as one config that somebody else trains again: `axolotl train FILE`.

    RUN_DIR is the `output_dir` of its YAML. Overrides and options are in their places and packs are written out; versions, data
    with its sha256 and results by class stand at its head. Accounts, projects, secrets and paths of this machine are left out,
    and listed.
    """
    from dwl_plugin.cli.export import export
    from dwl_plugin.cli.output import Console

    export(Console(stderr=True), run, out)


@main.command()
@click.option("--out", type=_FOLDER, default="dwl-quickstart", help="Folder for the data, the YAML and the trained adapter.")
@click.option("--steps", type=_COUNT, help="Optimizer steps, instead of the YAML's own number.")
@click.option("--compare", is_flag=True, help="Train plain SFT on the same rows, too, and show both beside one another.")
def quickstart(out: Path, steps: int | None, compare: bool) -> None:
    """Fine-tune a small real model on this machine's CPU and show what it learned, and what it was told not to."""
    from dwl_plugin.cli.quickstart import run

    run(_console(), out, steps, compare)


@main.group(cls=_Commands)
def packs() -> None:
    """Packs: classes that other people have defined and tested."""


@packs.command("list")
def packs_list() -> None:
    """The packs that can be used by name: of this package, and of others that are installed."""
    from dwl_plugin.cli.packs import list_packs

    list_packs(_console())


@packs.command("show")
@click.argument("pack")
@click.option("--raw", is_flag=True, help="Print the whole file as it is, for a file of your own: … --raw > my_pack.yml")
def packs_show(pack: str, raw: bool) -> None:
    """What PACK says: its classes, the suggested α, its sources.

    PACK is a name, a file, or hf://user/repo@<commit>/file.yml.
    """
    from dwl_plugin.cli.output import deliver
    from dwl_plugin.cli.packs import raw_pack, show_pack

    if raw:
        deliver(raw_pack(pack), None)
    else:
        show_pack(_console(), pack)


@packs.command("test")
@click.argument("packs", metavar="PACK...", nargs=-1, required=True)
def packs_test(packs: tuple[str, ...]) -> None:
    """Run the cases that each PACK brings for its own classes; exit status 1 if one fails."""
    from dwl_plugin.cli.packs import test_pack

    passed = [test_pack(_console(), pack) for pack in packs]
    sys.exit(0 if all(passed) else 1)


@packs.command("new")
@click.argument("name")
@click.option("--from", "config", type=_INPUT, required=True, help="The config whose classes and α become a pack.")
@_samples(64)
@click.option("--no-cases", is_flag=True, help="Put no text of the data into the file; Axolotl and the data are not looked at.")
@_trust
def packs_new(name: str, config: Path, samples: int, no_cases: bool, trust: bool) -> None:
    """Write NAME.yml: the classes and α of a config as a pack, with cases cut from rows of its data.

    The cases are text of your data: whoever gets the file reads them. The status is that of `dwl check`.
    """
    from dwl_plugin.cli.packs.new import new_pack

    sys.exit(new_pack(_console(), name, config, None if no_cases else samples, trust))


@packs.command("push")
@click.argument("file", type=_INPUT)
@click.argument("repo")
@click.option("--private", is_flag=True, help="If the repository is new, for you alone.")
@click.option("--untested", is_flag=True, help="Push it although a case fails, or there is none.")
def packs_push(file: Path, repo: str, private: bool, untested: bool) -> None:
    """Upload the pack in FILE to the Hugging Face Hub, and print the line that uses it at that commit.

    REPO is user/repo, or datasets/user/repo; it is made if it is not there. Its cases go with it, and a README.md if there is none.
    """
    from dwl_plugin.cli.packs.push import push_pack

    push_pack(_console(), file, repo, private, untested)


@main.command()
@click.option("--axolotl", is_flag=True, help="Describe Axolotl's own keys as well.")
def schema(axolotl: bool) -> None:
    """The JSON Schema of `loss`, `dft` and `dwl`, for editors."""
    import json

    from dwl_plugin.cli.progress import progress
    from dwl_plugin.config.schema import json_schema, merged_into
    from dwl_plugin.hosts.axolotl_preview import host_schema

    if axolotl:
        with progress("Axolotl is being loaded for its schema, 10 to 20 seconds"):
            found = merged_into(host_schema())
    else:
        found = json_schema()
    click.echo(json.dumps(found, indent=2, ensure_ascii=False))
