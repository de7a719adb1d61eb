"""Publishes a bundle on the Hub as one commit."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo

from conversion.qnn.bundle.metadata import ADAPTER, METADATA, PROBE, README, Bundle, signed
from conversion.qnn.bundle.runtime_files import render_readme
from hub_cards.model_folder import without_path
from hub_cards.one_commit import Upload, check_no_problems, read_card, send
from hub_cards.verdicts import verdict_problems, with_accepted_loss
from modeling_genieblue.model_files_genieblue import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    WEIGHT_SHARDS,
    WEIGHTS_NAME,
)

# Of an earlier push; whatever else lies in these folders would be no file of the bundle.
STALE = ("vision/*", "language_*/*", "qdq/*", "qairt/*", "processor/*", ADAPTER, PROBE)
FOREIGN = (CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME, WEIGHT_SHARDS, ADAPTER_CONFIG_NAME)


def publish_bundle(folder: str | Path, repo_id: str, *, accept_loss: bool = False, **commit: Any) -> CommitInfo:
    """Checks the folder of a bundle and pushes it to the Hub as one commit; creates the repo if needed.

    `accept_loss` publishes it in spite of a verdict that it lost too much, which its README keeps. `commit` are
    options of `one_commit.send`, such as `token` and `private`. Raises `OSError` or `ValueError` for a folder that is
    no bundle, `ValueError` with every problem found, before anything is uploaded; the Hub's own errors pass through.
    """
    folder = Path(folder)
    bundle = Bundle(folder)
    problems = [f"{problem}." for problem in bundle.changed_files()]
    check_no_problems(folder, problems + ([] if accept_loss else verdict_problems(bundle.metadata)))
    files: dict[str, Path | bytes] = {name: bundle.path(name) for name in bundle.metadata["files"]}
    files[METADATA], card = _published(bundle, read_card(folder) or "")
    # A README tells of its own bundle, so none of an earlier one is kept that was edited on the Hub.
    upload = Upload(files, "Upload NPU bundle", card, lambda _name: card, stale=STALE, foreign=FOREIGN)
    return send(upload, repo_id, **commit)


def _published(bundle: Bundle, card: str) -> tuple[Path | bytes, str]:
    """Metadata and README without a local path, and with an accepted verdict: a failed one is accepted by now."""
    metadata = dict(bundle.metadata)
    if metadata.get("model"):
        metadata["model"] = without_path(metadata["model"], bundle.folder)
    if verdict_problems(metadata):
        metadata = with_accepted_loss(metadata)
        card = _with_accepted_verdict(card, bundle.metadata, metadata)
    facts = {"bytes": len(card.encode()), "sha256": hashlib.sha256(card.encode()).hexdigest()}
    metadata["files"] = {**metadata["files"], README: facts}
    if metadata == bundle.metadata:
        return bundle.path(METADATA), card
    return (json.dumps(signed(metadata), indent=1) + "\n").encode(), card


def _with_accepted_verdict(card: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """A README whose sentences about a verdict are those of the metadata `after`, edited or not.

    Sentences that are no longer in it are added at its end: nobody is to take a failed bundle for a good one.
    """
    old, new = (render_readme(metadata, has_float_graphs=False).splitlines() for metadata in (before, after))
    changed = {one: other for one, other in zip(old, new, strict=True) if one != other}
    lines = [changed.get(line, line) for line in card.splitlines()]
    missing = [line for line in changed.values() if line not in lines]
    return "\n".join([*lines, *(["", *missing] if missing else []), ""])
