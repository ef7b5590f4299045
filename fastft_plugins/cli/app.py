"""The commands and their options."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="fastft",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print("fastft-plugins", version("fastft-plugins"))
        except PackageNotFoundError:  # used from a source tree
            print("fastft-plugins, not installed")
        raise typer.Exit()


@app.callback()
def _program(
    is_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Faster fine-tuning inside the trainer you already use."""


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def run(
    command: Annotated[
        list[str],
        typer.Argument(help="A script and its arguments, -m and a module, or a launcher: torchrun, accelerate, ..."),
    ],
    settings: Annotated[
        list[str] | None, typer.Option("--config", metavar="FIELD=VALUE", help="A setting; may be repeated.")
    ] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Save the last report as JSON.")] = None,
) -> None:
    """Run a training script that knows nothing of fastft, with fastft on in every Trainer that it makes.

    Transformers, TRL and Lightning, all processes included. The report is printed when training has ended.
    """
    from fastft_plugins.cli.launch import launch

    launch(command, settings or (), report)


@app.command()
def doctor(
    model: Annotated[
        Path | None, typer.Argument(metavar="[MODEL]", help="A local model folder, or its config.json.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(metavar="NAME", help="A well-known model in its place, such as qwen3-14b.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show for a model, without loading its weights, what would be on here, why, and what it can win.

    Exit code: 0 if all was decided and the dry run passed; 1 if the model or the options are wrong; 3 if the dry run
    failed.
    """
    from shutil import get_terminal_size

    from fastft_plugins.cli.doctor import examine
    from fastft_plugins.cli.doctor_text import as_text
    from fastft_plugins.cli.meta_model import read_config
    from fastft_plugins.errors import FastFTConfigError

    try:
        found = examine(*read_config(model, shape))
    except FastFTConfigError as error:
        print(f"fastft: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    print(json.dumps(found, indent=2) if as_json else as_text(found, min(get_terminal_size().columns, 100)))
    if found["dry_run"].startswith("failed"):
        raise typer.Exit(3)


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, hardware, settings and plugins, ready to paste into an issue."""
    from fastft_plugins.cli.environment import as_text, environment

    found = environment()
    # Plain print: rich would wrap and colour what is going to be pasted or parsed.
    print(json.dumps(found, indent=2) if as_json else as_text(found))


@app.command()
def plugins() -> None:
    """List the plugins that were found, and why one is not in use."""
    from rich.console import Console

    from fastft_plugins.cli.plugins import table
    from fastft_plugins.manager import get_plugin_manager

    Console().print(table(get_plugin_manager().statuses))


@app.command()
def report(file: Annotated[Path, typer.Argument(help="A saved report, or the report.json of a demo.")]) -> None:
    """Show a saved report as a table, and save a plot of it beside it: report.png for report.json."""
    from rich.console import Console

    from fastft_plugins.cli.plots import save_beside
    from fastft_plugins.cli.saved import show_saved
    from fastft_plugins.errors import FastFTError

    draw = show_saved(file, Console())
    try:
        print(f"saved {save_beside(file, draw)}", file=sys.stderr)
    except FastFTError as error:  # the table has been shown
        print(f"fastft: {error}", file=sys.stderr)


@app.command(
    add_help_option=False,  # the benchmarks' own help is shown
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
def bench(
    arguments: Annotated[list[str] | None, typer.Argument(help="--help shows them.")] = None,
) -> None:
    """Compare training stacks on this machine's GPU: stock, its peers, and fastft. In a checkout of the repository."""
    from fastft_plugins.cli.bench import bench as run_benchmarks

    run_benchmarks(arguments or ())


@app.command()
def demo(
    model: Annotated[
        Path | None,
        typer.Option(
            help="A folder with a Hugging Face model and its tokenizer, as save_pretrained() of both writes it.",
            show_default="SmolLM2-135M-Instruct",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help='JSON records, one a line: {"messages": ...}, {"prompt": ..., "completion": ...} or {"text": ...}',
            show_default="Python's standard library",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Training steps.", show_default="5, with a GPU 40"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Documents a step.")] = 8,
    max_length: Annotated[
        int | None,
        typer.Option(help="Longest document, in tokens.", show_default="384, with a GPU 1024"),
    ] = None,
    trainable: Annotated[str, typer.Option(help="lora or full: which weights are trained.")] = "lora",
    out: Annotated[Path, typer.Option(help="Folder for report.json and plot.png.")] = Path("fastft-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the data sample, the order and LoRA's start.")] = 0,
) -> None:
    """Fine-tune a real model on real data twice, with the stock Trainer and with fastft, and compare."""
    from rich.console import Console

    from fastft_plugins.demo import DemoSettings, run_demo
    from fastft_plugins.demo.output import check_output, save
    from fastft_plugins.demo.show import show

    settings = DemoSettings(model, data, steps, batch_size, max_length, trainable, seed)
    check_output(out)
    console = Console()
    result = run_demo(settings, say=lambda line: console.print(line, style="dim", highlight=False, markup=False))
    show(result, console)  # before anything is saved: a full disk must not hide the result
    for file in save(result, out):
        console.print(f"saved {file}", highlight=False, markup=False)
