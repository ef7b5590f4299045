"""The tables of the results page, one function for each layout of result files; they take results by their names."""

from __future__ import annotations

import shlex
import statistics
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from benchmarks.summary import model_text, pairs_text, ratios, summarise, training_text, values_of

Results = Mapping[str, dict[str, Any]]
NONE = "–"


def training_table(results: Results) -> str:
    """Of `benchmarks.run`: a row for each stack, compared with the first stack that is not ours."""
    header = "model|training|stack|steps|step ms (p20–p80):|tokens/s:|faster (pairs)|against|peak GB:|loss difference:"
    rows, notes = [], []
    for name, result in results.items():
        settings, runs = result["settings"], result["runs"]
        stacks = summarise(runs)
        reference = next((stack for stack in stacks if "fastft" not in stack), None)
        compared = {row["stack"]: row for row in ratios(runs, reference)}
        accumulate = f" in {settings['accumulate']} batches" if settings["accumulate"] > 1 else ""
        training = f"{training_text(settings)}, {settings['tokens']:,} tokens{accumulate} of {settings['lengths']}"
        model = file = link(name, model_text(settings))
        for stack, numbers in stacks.items():
            rows.append([model, training, stack, *_stack_cells(result, stack, numbers, compared.get(stack))])
            model = training = ""  # said once
        notes += [
            f"{file}, {run['stack']}, repeat {run['repeat']}: {_problem(run['status'], run['error'])}"
            for run in runs
            if run["status"] != "ok"
        ]
        notes += _absent(name, result, "--stacks", stacks)
    return table(header, rows) + listed(notes)


def _stack_cells(
    result: dict[str, Any], stack: str, numbers: dict[str, Any] | None, compared: dict[str, Any] | None
) -> list[str]:
    if numbers is None:
        return ["failed", *[NONE] * 6]
    good = [run for run in result["runs"] if run["stack"] == stack and run["status"] == "ok"]
    plural = "s" if len(good) > 1 else ""
    turns = (
        f"{len(good)} turn{plural} of one process"
        if result.get("one_process")
        else f"{len(good)} process{plural and 'es'}"
    )
    step, speed = numbers["step_s"], compared and compared["tokens_per_s"]
    return [
        f"{sum(len(values_of(run, 'step_s')) for run in good)} in {turns}",
        f"{1e3 * step['p50']:,.1f} ({1e3 * step['p20']:,.1f}–{1e3 * step['p80']:,.1f})",
        f"{numbers['tokens_per_s']['p50']:,.0f}",
        f"**{speed['median']:.2f}×** ({pairs_text(speed['pairs'])})" if speed else NONE,
        compared["against"] if compared else NONE,
        gigabytes(numbers["peak_memory_bytes"]),
        f"{compared['loss_difference']:.1e}" if compared else NONE,
    ]


def block_table(results: Results) -> str:
    """Of `benchmarks.moe_block`: a row for each stack beside stock, of each shape and routing."""
    header = (
        "block|tokens:|experts|routing|stack|stock → stack, ms:|faster (pairs)|stock → stack, peak GB:|less memory:"
    )
    rows, notes = [], []
    for name, result in results.items():
        notes += [
            f"{link(name, peer)}: {_problem('failed', state['error'])}"
            for peer, state in result["peers"].items()
            if "error" in state
        ]
        for case in result["cases"]:
            shape = link(name, case["shape"])
            what = [shape, f"{case['tokens']:,}", case["mode"], case["routing"]]
            errors = {stack: state["error"] for stack, state in case["peers"].items() if "error" in state}
            notes += [f"{', '.join(what)}, {stack}: {_problem('failed', error)}" for stack, error in errors.items()]
            rows += [
                [*what, stack, *_block_cells(case, stack)]
                for stack in case["ms"]
                if stack != "stock" and stack not in errors
            ]
        there = {f"{case['shape']}:{case['tokens']}:{case['mode']}" for case in result["cases"]}
        notes += _absent(name, result, "--cases", there)
    return table(header, rows) + listed(notes)


def _block_cells(case: dict[str, Any], stack: str) -> list[str]:
    stock_ms, ms = case["ms"]["stock"], case["ms"][stack]
    stock, ours = statistics.median(stock_ms), statistics.median(ms)
    turns = [theirs / one for theirs, one in zip(stock_ms, ms, strict=True)]
    peak = case["peak"]
    sizes = [peak["stock"], peak[stack]] if stack in peak else []  # on a CPU there are none
    return [
        f"{stock:.2f} → {ours:.2f}",
        f"**{stock / ours:.2f}×** ({pairs_text(turns)})",
        " → ".join(f"{size / 1e9:.2f}" for size in sizes) or NONE,
        f"{sizes[0] / sizes[1]:.2f}×" if sizes else NONE,
    ]


def products_table(results: Results) -> str:
    """Of `benchmarks.grouped_products`: a row for each product, a column for each kernel."""
    every = [entry for result in results.values() for entries in result["shapes"].values() for entry in entries]
    kernels = list(dict.fromkeys(kernel for entry in every for kernel in entry["ms"]))
    header = "|".join(["block|tokens:|product", *(f"{kernel}, ms:" for kernel in kernels), "Triton / torch, speed:"])
    rows, notes = [], []
    for name, result in results.items():
        for shape, entries in result["shapes"].items():
            for entry in entries:
                ms = {kernel: statistics.median(times) for kernel, times in entry["ms"].items()}
                cells = [f"{ms[kernel]:.2f}" if kernel in ms else NONE for kernel in kernels]
                pair = [ms.get(kernel) for kernel in ("torch grouped_mm", "Triton")]
                share = f"{pair[0] / pair[1]:.2f}" if pair[0] and pair[1] else NONE
                rows.append([link(name, shape), f"{result['tokens']:,}", entry["product"], *cells, share])
                notes += [
                    f"{link(name, shape)}, {entry['product']}, {kernel}: {_problem('failed', problem)}"
                    for kernel, problem in entry["failed"].items()
                ]
        notes += _absent(name, result, "--shapes", result["shapes"])
    return table(header, rows) + listed(notes)


def sweep_tables(results: Results) -> str:
    """Of `benchmarks.checkpoint_sweep`: a table for each file, a row for each plan."""
    return "\n\n".join(_sweep_table(name, result) for name, result in results.items())


def _sweep_table(name: str, result: dict[str, Any]) -> str:
    header = (
        "plan|steps:|step ms (lowest–highest):|speed:|peak GB:|after forward GB:|copying hidden:|settling:|gradients"
    )
    plans, lengths = result["plans"], result["lengths"]
    rows = [[plan, *_plan_cells(outcome, plans.get("plain", {}))] for plan, outcome in plans.items()]
    why = [f"{plan}: {outcome['explanation']}" for plan, outcome in plans.items() if "explanation" in outcome]
    text = (
        f"{link(name)}: {sum(lengths):,} tokens in {len(lengths)} documents, one row, "
        f"weights of {gigabytes(result['weights_bytes'])} GB.\n\n{table(header, rows)}"
    )
    first = next((plan for plan, outcome in plans.items() if "gradients" in outcome), "plain")
    notes = [] if first == "plain" else [f"The gradients are compared with those of `{first}`."]
    text += listed(notes + _absent(name, result, "--plans", plans))
    if why:
        text += f"\n\n<details><summary>What fastft says about its plans</summary>{listed(why)}\n\n</details>"
    return text


def _plan_cells(outcome: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    """A plan that did not end well lacks some of its numbers, an older result the times in which it settled."""
    times, reference = outcome.get("step_ms"), plain.get("step_ms")
    settling, hidden = outcome.get("settling_s"), outcome.get("engine", {}).get("hidden_share")
    gradients = outcome.get("gradients", NONE)
    if outcome.get("distance"):
        gradients = f"**differ by {outcome['distance']:.1e}**"
    if outcome["status"] != "ok":
        gradients = f"{gradients}; {_problem(*outcome['status'].partition(': ')[::2])}"
    return [
        f"{len(times)}" if times else NONE,
        f"{statistics.median(times):,.1f} ({min(times):,.1f}–{max(times):,.1f})" if times else NONE,
        f"{statistics.median(reference) / statistics.median(times):.3f}×" if times and reference else NONE,
        gigabytes(outcome.get("peak_bytes")),
        gigabytes(outcome.get("after_forward_bytes")),
        f"{hidden:.1%}" if hidden is not None else NONE,
        f"{sum(settling):.1f} s, {len(settling)} steps" if settling else NONE,
        gradients,
    ]


def gradient_tables(results: Results) -> str:
    """Of `benchmarks.gradient_accuracy`: a table for each file, a row for each kind of parameter."""
    return "\n\n".join(_gradient_table(name, result) for name, result in results.items())


def _gradient_table(name: str, result: dict[str, Any]) -> str:
    settings, worst, lengths = result["settings"], result["worst"], result["lengths"]
    stocks = settings["stock"]
    header = "gradients of|fastft:" + "".join(f"|stock, {stock}:|fastft / stock:" for stock in stocks)
    rows = [[kind, *_error_cells(errors, stocks)] for kind, errors in result["kinds"].items()]
    flips = [f"{stack} {sum(shares) / len(shares):.2%}" for stack, shares in result["flips"].items()]
    text = (
        f"{link(name)}: {settings['shape']}, {settings['layers']} layers, {settings['dtype']}, "
        f"{' and '.join(f'{sum(draw):,}' for draw in lengths)} tokens of {settings['documents']} in "
        f"{' and '.join(f'{len(draw)}' for draw in lengths)} documents. Worst ratio **{worst['ratio']:.3f}** "
        f"({worst['kind']}, against {worst['stock']}; the limit was {settings['limit']:g}). "
        f"Peak {gigabytes(result.get('peak_bytes'))} GB. Experts that each run would have chosen otherwise: "
        f"{', '.join(flips)} of tokens and layers."
    )
    return f"{text}\n\n{table(header, rows)}"


def _error_cells(errors: dict[str, float], stocks: Sequence[str]) -> list[str]:
    cells = [f"{errors['fastft']:.2e}"]
    for stock in stocks:
        cells += [f"{errors[stock]:.2e}", f"{errors['fastft'] / errors[stock]:.3f}" if errors[stock] else NONE]
    return cells


def table(header: str, rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. In the header, columns are apart by `|`, and a colon at the end sets one to the right."""
    columns = header.split("|")
    lines = [
        [column.removesuffix(":") for column in columns],
        ["--:" if column[-1] == ":" else "---" for column in columns],
    ]
    lines += [[" ".join(cell.replace("|", r"\|").split()) for cell in row] for row in rows]  # a cell is one line
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def listed(notes: Sequence[str]) -> str:
    return "\n\n" + "\n".join(f"- {note}" for note in notes) if notes else ""


def link(name: str, text: str | None = None) -> str:
    return f"[{text or name}]({name}.json)"


def words_of(result: dict[str, Any]) -> list[str]:
    """The command, in words."""
    return shlex.split(str(result.get("command") or ""))


def gigabytes(size: int | None) -> str:
    return NONE if size is None else f"{size / 1e9:.1f}"


def _problem(status: str, error: str | None) -> str:
    return f"**{status}** `{textwrap.shorten((error or '').replace('`', ''), 120, placeholder=' …')}`"


def _absent(name: str, result: dict[str, Any], option: str, there: Collection[str]) -> list[str]:
    """What the command named and the file lacks, as that of a run which was ended early."""
    words = words_of(result)
    named = words[words.index(option) + 1].split(",") if option in words else []
    missing = [one for one in named if one not in there]
    return [f"{link(name)} has nothing of {', '.join(missing)}, which its command names"] if missing else []
