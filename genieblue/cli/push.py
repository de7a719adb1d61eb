"""`genieblue push`: check a model and publish it with a card, as one commit."""

from pathlib import Path
from typing import Annotated

import typer

from genieblue.cli.qnn import is_bundle
from genieblue.cli.terminal import quiet_hub


def push(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Folder of a GenieBlue, a quantized base, an export or a bundle."),
    ],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Name on the Hub: you/model.")],
    base: Annotated[
        str | None, typer.Option(help="Hub id of a base that was local: you/base or you/base@commit.")
    ] = None,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Visibility of a new repository.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Publish a quantized model whose verdict is that it failed.")
    ] = False,
    token: Annotated[str | None, typer.Option(help="Default: HF_TOKEN, or the token from `hf auth login`.")] = None,
) -> None:
    """Publish a GenieBlue, its base or an export on the Hub.

    Of bases only quantized ones; NPU bundles are exports, too. The folder is checked first, and the upload is a single
    commit. A GenieBlue's base must already be on the Hub, or inside its folder. If the folder names a local base,
    --base gives its repository, whose files must be identical.
    """
    from hub_cards.exports import publish_export, read_export
    from hub_cards.model_folder import read_base_quantization
    from hub_cards.publish import publish_folder
    from hub_cards.publish_base import publish_quantized_base

    quiet_hub()
    options = {
        "private": private, "token": token, "revision": revision, "commit_message": message, "create_pr": create_pr,
    }  # fmt: skip
    if is_bundle(str(folder)):
        from conversion.qnn.bundle.publish import publish_bundle

        if base is not None:
            raise typer.BadParameter(f"{folder} needs no base to run: leave out --base.", param_hint="--base")
        commit = publish_bundle(folder, repo_id, accept_loss=accept_loss, **options)
    elif read_export(folder) is not None:
        if accept_loss:
            raise typer.BadParameter(f"{folder} is an export, which has no verdict.", param_hint="--accept-loss")
        commit = publish_export(folder, repo_id, base=base, **options)
    elif read_base_quantization(folder) is None:
        commit = publish_folder(folder, repo_id, base=base, accept_loss=accept_loss, **options)
    elif base is None:
        commit = publish_quantized_base(folder, repo_id, accept_loss=accept_loss, **options)
    else:
        raise typer.BadParameter(f"{folder} is a base itself: leave out --base.", param_hint="--base")
    typer.echo(commit.pr_url or commit.commit_url)
