"""`genieblue train`: run one of the two training stages."""

from pathlib import Path
from typing import Annotated, Any

import typer

from genieblue.cli.chat import load_chat
from genieblue.cli.options import Base, BaseCode, Dtype, Seed
from genieblue.cli.terminal import counted, note, quiet_transformers


def train(
    stage: Annotated[int, typer.Option(min=1, max=2, help="1: projector only; 2: everything GenieBlue adds.")],
    model: Annotated[str, typer.Option(help="Folder or Hub id of the GenieBlue to train.")],
    data: Annotated[
        list[Path], typer.Option(metavar="FILE", help="JSONL file of chats, or a folder saved by `datasets`.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the trained GenieBlue.")],
    image_folder: Annotated[
        Path | None, typer.Option(help="Folder that image paths are relative to; default: the JSONL file's folder.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data; default: 1.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per batch.")] = 8,
    gradient_accumulation: Annotated[int, typer.Option(min=1, help="Batches per optimizer step.")] = 1,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate; default: the paper's.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Maximum tokens per sample, including image tokens.")] = 4096,
    max_tiles: Annotated[
        int | None, typer.Option(help="Maximum tiles per image; default: 1 in stage 1, the model's own in stage 2.")
    ] = None,
    bf16: Annotated[
        bool | None, typer.Option("--bf16/--no-bf16", help="bfloat16 autocast; default: if the base is bfloat16.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Use less memory, about a third more time.")
    ] = False,
    save_steps: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0: no checkpoints.")] = 500,
    num_workers: Annotated[int, typer.Option(min=0, help="Data loading processes.")] = 0,
    seed: Seed = 42,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Skip bad samples instead of stopping.")] = False,
    base: Base = None,
    dtype: Dtype = "auto",
    trust_remote_code: BaseCode = False,
) -> None:
    """Run one of the two training stages; the base does not change."""
    from genieblue.training.chats import ChatDataset
    from genieblue.training.stages import TrainingSettings, check_output
    from genieblue.training.stages import train as run

    settings = TrainingSettings(
        stage=stage,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        learning_rate=learning_rate,
        max_length=max_length,
        max_tiles=max_tiles,
        bf16=bf16,
        gradient_checkpointing=gradient_checkpointing,
        save_steps=save_steps,
        num_workers=num_workers,
        seed=seed,
    )
    if len(data) > 1:
        raise typer.BadParameter(
            f"Only one data source is supported, got {len(data)}: merge them.", param_hint="--data"
        )
    out = out.expanduser()  # shells do not expand `--out=~/x`
    check_output(out.absolute())
    chats = ChatDataset(data_source(data[0]), image_folder=image_folder, skip_bad=skip_bad)
    quiet_transformers()
    chat = load_chat(model, base, None, dtype, "cpu", trust_remote_code)  # Trainer moves it to the GPU
    try:
        result = run(chat.model, chat.processor, chats, out, settings, resume=resume)
    except KeyboardInterrupt:
        note("\nThe run continues from its last checkpoint, if there is one, with the same command and --resume.")
        raise
    loss = "" if result.loss is None else f", last loss {result.loss:.4g}"
    steps, samples = counted(result.steps, "step"), counted(result.num_samples, "sample")
    typer.echo(f"{out}: stage {stage}, {steps} over {samples}{loss}.")
    note("The base's bytes are unchanged.")
    if stage == 1:
        note(f"Next: genieblue train --stage 2 --model {out} --data instructions.jsonl --out …")
    else:
        note(f"Next: genieblue chat {out} --image photo.jpg; genieblue verify {out}")


def data_source(data: Path) -> Any:
    """The input for `ChatDataset`: the path of a JSONL file, or the dataset that `datasets` saved in a folder."""
    if not data.is_dir():
        return data
    if not any((data / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise ValueError(f"{data} was not saved by `datasets`: give a JSONL file or a folder from `save_to_disk`.")
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(data))
    if isinstance(dataset, DatasetDict):
        splits = ", ".join(str(data / name) for name in dataset)
        raise ValueError(f"{data} has several splits: give the folder of one of them ({splits}).")
    return dataset


__all__ = ["data_source", "train"]
