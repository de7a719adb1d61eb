"""What a Hub knows, in memory: users, repos, branches, tags, commits and large files."""

import base64
import contextlib
import datetime
import hashlib
import itertools
import json
import os
import threading
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import yaml

# As the Hub's own `.gitattributes` decides, for the kinds of file that model repos hold.
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".onnx", ".gguf", ".zip", ".tar", ".npz", ".parquet")
LFS_THRESHOLD = 10 * 1024 * 1024
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()

# Commit ids differ even between equal repos of two tests, so nothing that is cached by commit is shared among them.
_commit_counter = itertools.count()


class HubError(Exception):
    """An answer other than success; `code` is the Hub's `X-Error-Code`, `details` go into the body."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None, **details):
        super().__init__(message)
        self.status, self.message, self.code, self.commit, self.details = status, message, code, commit, details


@dataclass(frozen=True)
class StoredFile:
    """Content of one file of a commit."""

    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        """The text that git keeps in place of a large file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def blob_id(self) -> str:
        """Id of the git blob: of the pointer, for a large file."""
        blob = self.pointer if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.blob_id


@dataclass(frozen=True)
class Commit:
    """One state of a repo and what was said about it."""

    sha: str
    title: str
    description: str
    author: str
    date: str
    parent: str | None
    files: dict[str, StoredFile]


@dataclass
class Repo:
    """A repo of any type with everything that was ever committed to it."""

    repo_id: str
    owner: str
    private: bool = False
    gated: str | bool = False
    admitted: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> Commit:
        """Commit that a branch, tag, full commit id or `refs/...` name stands for."""
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        sha = self.branches.get(name) or self.tags.get(name) or name
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def history(self, revision: str) -> list[Commit]:
        """Commits that lead to `revision`, newest first."""
        commit, commits = self.resolve(revision), []
        while commit is not None:
            commits.append(commit)
            commit = self.commits[commit.parent] if commit.parent else None
        return commits

    def file(self, revision: str, path: str) -> tuple[Commit, StoredFile]:
        commit = self.resolve(revision)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", commit=commit.sha)
        return commit, commit.files[path]

    def append(self, branch: str, files: dict[str, StoredFile], title: str, description: str, author: str) -> Commit:
        """Makes `files` the new state of `branch`."""
        parent = self.branches.get(branch)
        listing = [self.repo_id, str(parent), title, str(next(_commit_counter)), str(os.getpid())]
        listing += [f"{path} {file.blob_id}" for path, file in sorted(files.items())]
        commit = Commit(
            sha=hashlib.sha1("\n".join(listing).encode()).hexdigest(),
            title=title,
            description=description,
            author=author,
            date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"),
            parent=parent,
            files=dict(files),
        )
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit


class HubStorage:
    """All repos and the rules of who may read and write them; safe to use from several threads."""

    def __init__(self, users: dict[str, str]):
        """`users` maps a token to the name of its user."""
        self.users = users
        self.lock = threading.RLock()
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large_files: dict[str, bytes] = {}

    def clear(self) -> None:
        with self.lock:
            self.repos.clear()
            self.large_files.clear()

    def user(self, token: str | None) -> str | None:
        """Name of the user with `token`, None without one."""
        if token is None:
            return None
        if token not in self.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.users[token]

    def find(self, repo_type: str, repo_id: str, user: str | None) -> Repo:
        """The repo, if `user` may know that it exists."""
        repo = self.repos.get((repo_type, repo_id))
        if repo is None or (repo.private and user != repo.owner):
            # The Hub does not tell a visitor whether a repo is missing or closed to them.
            raise HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def find_readable(self, repo_type: str, repo_id: str, user: str | None) -> Repo:
        """The repo, if `user` may download its files."""
        repo = self.find(repo_type, repo_id, user)
        if repo.gated and user != repo.owner and user not in repo.admitted:
            message = f"Access to model {repo_id} is restricted. "
            message += "You must be authenticated." if user is None else "You are not in the authorized list."
            raise HubError(401 if user is None else 403, message, "GatedRepo")
        return repo

    def find_writable(self, repo_type: str, repo_id: str, user: str | None) -> Repo:
        repo = self.find(repo_type, repo_id, user)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if user != repo.owner:
            raise HubError(403, f"You don't have write permission on {repo_id}")
        return repo

    def create_repo(self, repo_type: str, repo_id: str, owner: str, private: bool = False) -> Repo:
        """Makes a repo that begins, like the Hub's, with one commit of `.gitattributes`."""
        with self.lock:
            repo = Repo(repo_id, owner, private=private)
            repo.append("main", {".gitattributes": StoredFile(GITATTRIBUTES, False)}, "initial commit", "", owner)
            self.repos[repo_type, repo_id] = repo
            return repo

    def commit(self, repo: Repo, branch: str, operations: list[dict], author: str) -> Commit:
        """Applies the lines of a commit request to the head of `branch`: all of them, or none."""
        with self.lock:
            if branch not in repo.branches:
                raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
            header = next(line["value"] for line in operations if line["key"] == "header")
            expected = header.get("parentCommit")
            if expected and not repo.branches[branch].startswith(expected):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repo.resolve(branch).files)
            for line in operations:
                self._apply(files, line["key"], line["value"])
            return repo.append(branch, files, header["summary"], header.get("description", ""), author)

    def _apply(self, files: dict[str, StoredFile], key: str, value: dict) -> None:
        match key:
            case "header":
                pass
            case "file":
                files[value["path"]] = StoredFile(base64.b64decode(value["content"]), False)
            case "lfsFile":
                if value["oid"] not in self.large_files:
                    raise HubError(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = StoredFile(self.large_files[value["oid"]], True)
            case "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            case "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                for path in [path for path in files if path.startswith(folder)]:
                    del files[path]
            case _:
                raise HubError(400, f"Unknown line in a commit: {key}")


def is_large(path: str, size: int) -> bool:
    """Whether the Hub keeps a file of this name and size outside git."""
    return path.endswith(LFS_SUFFIXES) or size > LFS_THRESHOLD


def card_metadata(readme: bytes) -> dict:
    """Front matter of a model card; empty without one."""
    text = readme.decode("utf-8", errors="replace")
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    return yaml.safe_load(text[4:].split("\n---", 1)[0]) or {}


def card_errors(readme: str) -> list[str]:
    """What the Hub would refuse in a model card's front matter."""
    try:
        metadata = card_metadata(readme.encode())
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"]
    if not isinstance(metadata, dict):
        return ["The metadata must be a mapping"]
    errors = []
    for field_name in ("license", "library_name", "pipeline_tag"):
        if field_name in metadata and not (isinstance(metadata[field_name], str) and metadata[field_name]):
            errors.append(f'"{field_name}" must be a string')
    bases = metadata.get("base_model", [])
    for base in [bases] if isinstance(bases, str) else bases:
        parts = base.split("/")
        if len(parts) > 2 or not all(part and not part.startswith(".") for part in parts):
            errors.append(f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.')
    return errors


def blob_fields(file: StoredFile, hash_name: str) -> dict:
    """Size, git id and, for a large file, its hash, which the endpoints call `oid` or `sha256`."""
    fields = {"size": file.size, "blobId" if hash_name == "sha256" else "oid": file.blob_id}
    if file.is_lfs:
        fields["lfs"] = {hash_name: file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
    return fields


def entries_of(commit: Commit, prefix: str) -> list[dict]:
    """Files and folders of a commit whose path begins with `prefix`, as the tree endpoint lists them."""
    files = {path: file for path, file in sorted(commit.files.items()) if path.startswith(prefix)}
    folders = {str(folder) for path in files for folder in PurePosixPath(path).parents} - {".", prefix.rstrip("/")}
    listed = [
        {"type": "directory", "path": folder, "oid": StoredFile(folder.encode(), False).blob_id, "size": 0}
        for folder in sorted(folders)
        if folder.startswith(prefix)
    ]
    return listed + [{"type": "file", "path": path, **blob_fields(file, "oid")} for path, file in files.items()]


def describe(repo: Repo, commit: Commit) -> dict:
    """What the Hub reads out of a repo's card and config."""
    readme, config = commit.files.get("README.md"), commit.files.get("config.json")
    card = {}
    with contextlib.suppress(yaml.YAMLError):
        card = card_metadata(readme.content) if readme else {}
    tags = [card[name] for name in ("library_name", "pipeline_tag") if name in card] + list(card.get("tags") or [])
    if isinstance(card.get("license"), str):
        tags.append(f"license:{card['license']}")
    bases = card.get("base_model") or []
    tags += [f"base_model:{base}" for base in ([bases] if isinstance(bases, str) else bases)]
    details = json.loads(config.content) if config else {}
    return {
        "_id": repo.repo_id,
        "id": repo.repo_id,
        "modelId": repo.repo_id,
        "author": repo.owner,
        "sha": commit.sha,
        "lastModified": commit.date,
        "createdAt": min(commit.date for commit in repo.commits.values()),
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": tags,
        "library_name": card.get("library_name"),
        "pipeline_tag": card.get("pipeline_tag"),
        "cardData": card or None,
        "config": {name: details[name] for name in ("architectures", "model_type", "auto_map") if name in details},
    }
