"""Compare training stacks on this machine: `python -m benchmarks.run --help`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.documents import describe, parse_lengths
from benchmarks.environment import SCHEMA as SCHEMA
from benchmarks.environment import describe_command
from benchmarks.measure import steps_of
from benchmarks.settings import SMOKE, Settings
from benchmarks.sft_names import HELP as SFT_HELP
from benchmarks.sft_names import is_unsloth
from benchmarks.shapes import SHAPES
from benchmarks.stacks import STACKS, find_stack
from benchmarks.summary import ratios, render, summarise
from benchmarks.weights import saved_weights
from benchmarks.worker import measure

_QUIET = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}  # there is nothing to ask or to tell anybody
START_UP_S = 120  # a process may take this long, beside its budget, to import and to end
_EPILOG = """\
stacks, the first one named being the reference of every ratio:
{stacks}
  {sft}

examples:
  python -m benchmarks.run --shape llama-1b --stacks stock-padded,fastft-padded --out llama-1b.json
  python -m benchmarks.run --shape qwen3-4b --stacks trl-flex-liger,trl-fastft-liger --steps 30 --out sft.json
"""


def main(arguments: list[str] | None = None) -> int:
    options, settings = parse(arguments)
    out = output_file(options)
    result: dict[str, Any] = {
        **describe_command("run", arguments),
        "one_process": options.one_process,
        "shared_caches": options.shared_caches,
        "settings": dataclasses.asdict(settings),
        "documents": describe(steps_of(settings)),
        "environment": None,
        "runs": [],
    }
    loads = settings.quantize is not None or any(map(is_unsloth, options.stacks))
    with (
        saved_weights(settings) if loads else contextlib.nullcontext(settings) as given,
        tempfile.TemporaryDirectory() if options.shared_caches else contextlib.nullcontext() as caches,
    ):
        for repeat in range(options.repeats):
            for stack in options.stacks:
                print(f"{stack}, repeat {repeat + 1} of {options.repeats} …", file=sys.stderr, flush=True)
                outcome = run_here(stack, given) if options.one_process else run_process(stack, given, caches)
                result["environment"] = result["environment"] or outcome.pop("environment", None)
                outcome.pop("environment", None)
                result["runs"].append({"stack": stack, "repeat": repeat, **outcome})
                result["summary"] = summarise(result["runs"])
                result["ratios"] = ratios(result["runs"])
                # Written after every process: what was measured survives an interrupted comparison.
                out.write_text(json.dumps(result, indent=1) + "\n")
    print(render(result))
    print(f"\nwritten to {out}")
    return 0 if all(run["status"] == "ok" for run in result["runs"]) else 1


def run_here(stack: str, settings: Settings) -> dict[str, Any]:
    """Measure one stack in this process. Stacks that only differ by milliseconds are told apart no other way."""
    # What the run before left: its frozen garbage would keep an old model in the GPU's memory.
    gc.unfreeze()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"status": "ok", "error": None, **measure(stack, settings)}


def run_process(stack: str, settings: Settings, shared: str | None = None) -> dict[str, Any]:
    """Measure one stack in a fresh process; a failure becomes part of the result.

    Its compiler caches are empty at first, unless ``shared`` is a folder where other processes have theirs.
    """
    with tempfile.TemporaryDirectory() as directory:
        settings_file, result_file = Path(directory, "settings.json"), Path(directory, "result.json")
        settings_file.write_text(json.dumps(dataclasses.asdict(settings)))
        caches = {
            name: str(Path(shared or directory, name)) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
        }
        worker = "benchmarks.unsloth_worker" if is_unsloth(stack) else "benchmarks.worker"
        command = [sys.executable, "-m", worker, stack, str(settings_file), str(result_file)]
        try:
            process = subprocess.run(
                command,
                cwd=directory,  # some write their caches to where they are
                env={**os.environ, **caches, **_QUIET, "PYTHONPATH": python_path()},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=settings.budget + START_UP_S,
            )
        except subprocess.TimeoutExpired:
            return {"status": "timeout", "error": f"not done after {settings.budget + START_UP_S:.0f} s"}
        if process.returncode != 0:
            lines = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
            return {"status": "failed", "error": lines[-1], "stderr": lines[-40:]}
        outcome: dict[str, Any] = json.loads(result_file.read_text())
    if not outcome["step_s"]:
        return {"status": "over budget", "error": f"no timed step within {settings.budget:.0f} s"}
    return {"status": "ok", "error": None, **outcome}


def python_path() -> str:
    """Where this process finds its modules, for one that starts in another folder."""
    return os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)


def output_file(options: argparse.Namespace) -> Path:
    """Return the file to write, in a folder that is there. A smoke run, which nobody keeps, has a temporary one."""
    if options.out is None:
        return Path(tempfile.mkdtemp(prefix="benchmark-") if options.smoke else "", "benchmark.json")
    file: Path = options.out
    try:
        file.parent.mkdir(exist_ok=True)
        with file.open("ab"):  # what is there stays until there is a result
            return file
    except OSError as error:
        sys.exit(f"--out {file}: cannot be written ({error.strerror})")


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, Settings]:
    """Return the options and the settings they make; what cannot be used ends the program with a message."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Compare training stacks on this machine. Each stack runs in processes of its own, in turn "
        "(A B A B), with empty compiler caches and on the same documents of random tokens.",
        epilog=_EPILOG.format(
            stacks="\n".join(f"  {name:<24} {stack.__doc__}" for name, stack in STACKS.items()),
            sft=SFT_HELP.replace("\n", "\n  "),
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Settings()
    add = parser.add_argument
    # Defaults live in Settings; what is not given here stays None, so that --smoke can supply its own.
    add("--shape", choices=SHAPES, help=f"model shape, random weights ({default.shape})")
    add("--layers", type=int, metavar="N", help="only this many layers of the shape")
    add("--stacks", type=_stacks, default=["stock-padded", "fastft-padded"], metavar="A,B", help="which to compare")
    add("--repeats", type=int, default=2, metavar="N", help="processes per stack (2)")
    add("--warmup", type=int, metavar="N", help=f"untimed steps first, at least one ({default.warmup})")
    add("--steps", type=int, metavar="N", help=f"timed steps ({default.steps})")
    add("--split-steps", type=int, metavar="N", help=f"more steps, timing forward and backward ({default.split_steps})")
    add("--tokens", type=int, metavar="N", help=f"real tokens of a step, about ({default.tokens})")
    add("--lengths", type=_lengths, metavar="NAME", help=f"loguniform-A-B, uniform-A-B or fixed-N ({default.lengths})")
    add("--accumulate", type=int, metavar="N", help="split a step into N batches (1)")
    add("--trainable", choices=["lora", "full"], help=f"LoRA r=16 on all linears, or all weights ({default.trainable})")
    add("--quantize", choices=["nf4"], help="train LoRA on 4-bit weights of bitsandbytes, as QLoRA does")
    add("--checkpointing", choices=["on", "off"], help="activation checkpointing (on)")
    add("--dtype", choices=["bf16", "fp16", "fp32"], help=f"of the weights ({default.dtype})")
    add("--device", choices=["auto", "cpu", "cuda"], help="auto: the GPU if there is one")
    add("--seed", type=int, metavar="N", help="of documents and weights (0)")
    add("--budget", type=float, metavar="SECONDS", help=f"of a process, then it stops ({default.budget:.0f})")
    add("--cap", type=float, metavar="GB", help="let a process use no more GPU memory than this")
    add("--out", type=Path, metavar="FILE", help="the result (benchmark.json; with --smoke in a temporary folder)")
    add("--one-process", action="store_true", help="take turns on one model in this process: for small differences")
    add("--shared-caches", action="store_true", help="one compiler cache for all: faster, but first steps mean nothing")
    add("--smoke", action="store_true", help="a tiny model on the CPU, a few steps: does the harness work?")
    options = parser.parse_args(arguments)
    if options.warmup is not None and options.warmup < 1:
        parser.error("--warmup is at least 1: the first step compiles and allocates")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA GPU here")
    if options.quantize is not None and find_spec("bitsandbytes") is None:
        parser.error(f"--quantize {options.quantize} needs bitsandbytes: pip install bitsandbytes")
    if options.cap is not None and not torch.cuda.is_available():
        parser.error("--cap limits a GPU's memory, and torch finds no CUDA GPU here")
    if options.cap is not None and options.cap <= 0:
        parser.error("--cap is above 0")
    if options.out is not None and (problem := _problem_of(options.out)):
        parser.error(f"--out {options.out}: {problem}")
    settings = settings_from(options)
    if settings.quantize is not None and settings.trainable != "lora":
        parser.error(f"--quantize {settings.quantize} trains adapters on frozen weights: --trainable lora")
    return options, settings


def _problem_of(file: Path) -> str | None:
    if file.is_dir():
        return "is a folder, not a file"
    # One new folder may be meant, a whole path of them is a typing error.
    folder = file.parent if file.parent.exists() else file.parent.parent
    return None if folder.is_dir() else f"there is no folder {folder}"


def settings_from(options: argparse.Namespace) -> Settings:
    given = {
        field.name: value
        for field in dataclasses.fields(Settings)
        if (value := getattr(options, field.name, None)) is not None
    }
    if "checkpointing" in given:
        given["checkpointing"] = given["checkpointing"] == "on"
    return Settings(**{**(SMOKE if options.smoke else {}), **given})


def _lengths(text: str) -> str:
    try:
        parse_lengths(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _stacks(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        try:
            find_stack(name)
        except ValueError:
            known = f"{', '.join(STACKS)}, and trl-… as --help says"
            raise argparse.ArgumentTypeError(f"unknown: {name} (there are: {known})") from None
    return names


if __name__ == "__main__":
    sys.exit(main())
