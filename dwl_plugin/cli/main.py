"""The `dwl` command, and `axolotl dwl` through Axolotl's `axolotl.cli_commands` entry point.

Axolotl imports this module to print its own `--help`, so nothing heavier than click is imported before a command runs.
"""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Class-weighted fine-tuning losses for Axolotl."""


@main.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("dwl-quickstart"),
    show_default=True,
    help="Folder for the data, the YAML and the trained adapter.",
)
@click.option(
    "--steps", type=click.IntRange(min=1), default=None, help="Optimizer steps, instead of the YAML's own number."
)
def quickstart(out: Path, steps: int | None) -> None:
    """Fine-tune a small real model on this machine's CPU and show what every token class learned."""
    from dwl_plugin.cli.quickstart import run
    from dwl_plugin.errors import DWLError

    try:
        run(out, steps)
    except DWLError as error:
        raise click.ClickException(str(error)) from error
