"""Uploads a model's files to the Hub as one commit, without overwriting other people's work."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from hub_cards.model_card import is_as_generated
from modeling_genieblue.model_files_genieblue import CARD_NAME

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Upload:
    """The contents of an upload.

    Attributes:
        files: path in the repository -> the file, or its content.
        message: of the commit, unless the user gives one.
        card: text of the folder's own README, or `None`.
        render_card: renders the card for a repository's name.
        stale: patterns of files from earlier pushes to delete; a star does not match `/`.
        foreign: patterns of another model's files, which would be loaded instead of these.
    """

    files: dict[str, Path | bytes]
    message: str
    card: str | None
    render_card: Callable[[str], str]
    stale: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()


def send(
    upload: Upload,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Creates the commit, and the repository if needed; `ValueError` if it contains another model's weights.

    A generated, unedited card is rendered again for `repo_id`, but never replaces one that was edited on the Hub.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and revision != "main" and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    # Everything below depends on the current head: if somebody else commits in between, this commit fails.
    head = api.model_info(repo_id, revision=revision)
    remote = {file.rfilename for file in head.siblings or ()}
    if foreign := sorted(path for path in remote if matches(path, upload.foreign)):
        raise ValueError(
            f"{repo_id} already contains another model ({', '.join(foreign[:3])}): use a separate repository."
        )

    additions = [
        CommitOperationAdd(path, content) for path, content in sorted(upload.files.items()) if path != CARD_NAME
    ]
    card = _card_to_send(api, upload, repo_id, head.sha, remote)
    if card is not None:
        additions.append(CommitOperationAdd(CARD_NAME, card.encode()))
    sent = {addition.path_in_repo for addition in additions}
    deletions = [CommitOperationDelete(path) for path in sorted(remote - sent) if matches(path, upload.stale)]
    if deletions:
        names = ", ".join(deletion.path_in_repo for deletion in deletions)
        logger.warning("Deleting files of an earlier push from %s: %s", repo_id, names)

    # Not `upload_folder`: with Xet it splits uploads of more than five minutes into several commits, and in between
    # the repo would have new code with old weights.
    return api.create_commit(
        repo_id,
        operations=[*deletions, *additions],
        commit_message=commit_message or upload.message,
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
        parent_commit=head.sha,
    )


def _card_to_send(api: HfApi, upload: Upload, repo_id: str, revision: str | None, remote: set[str]) -> str | None:
    """Text of the card for this push; None to keep the one on the Hub."""
    if upload.card is not None and not is_as_generated(upload.card):
        return upload.card
    if CARD_NAME in remote:
        published = Path(api.hf_hub_download(repo_id, CARD_NAME, revision=revision)).read_text(encoding="utf-8")
        if not is_as_generated(published):
            logger.warning("The card of %s was edited on the Hub and is kept.", repo_id)
            return None
    # The card in the folder was rendered when the model was saved, before the repo's name was known.
    return upload.render_card(repo_id)


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether a path matches a pattern; unlike plain `fnmatch`, a star does not match `/`."""
    return any(path.count("/") == pattern.count("/") and fnmatchcase(path, pattern) for pattern in patterns)


def read_card(folder: Path) -> str | None:
    """Text of the README in a folder, if it has one."""
    path = folder / CARD_NAME
    return path.read_text(encoding="utf-8") if path.is_file() else None


def json_bytes(content: dict[str, Any]) -> bytes:
    """A JSON file to upload in place of the folder's own."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def check_no_problems(folder: Path, problems: list[str]) -> None:
    """`ValueError` that lists the problems, if any."""
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise ValueError(f"{folder} cannot be published, nothing was uploaded:\n{listed}")
