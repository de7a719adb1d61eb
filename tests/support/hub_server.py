"""A small Hugging Face Hub on 127.0.0.1, for the real clients: huggingface_hub, transformers and peft."""

import json
import os
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from hub_storage import (
    Commit,
    HubError,
    HubStorage,
    StoredFile,
    blob_fields,
    card_errors,
    describe,
    entries_of,
    is_large,
)

OWNER, OWNER_TOKEN = "you", "hf_owner_of_the_test_repos"
STRANGER, STRANGER_TOKEN = "stranger", "hf_somebody_else"
URL_PREFIXES = {"datasets/": "dataset", "spaces/": "space"}


@dataclass
class Failure:
    """A fault that the next matching requests run into."""

    method: str
    path_part: str
    status: int
    truncate_to: int | None
    remaining: int


class HubServer(ThreadingHTTPServer):
    """The server and what a test may ask of it.

    `you` (token `hub.token`) owns what tests push; `stranger` (token `hub.stranger_token`) is somebody else. The
    port is taken at once, so that `endpoint` is known before any Hub library is imported, but nothing listens on it
    before `start()`.
    """

    daemon_threads = True
    request_queue_size = 64
    token, stranger_token = OWNER_TOKEN, STRANGER_TOKEN

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubRequestHandler, bind_and_activate=False)
        self.server_bind()
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.storage = HubStorage({OWNER_TOKEN: OWNER, STRANGER_TOKEN: STRANGER})
        self.requests: list[tuple[str, str]] = []
        self.home: Path | None = None
        self._failures: list[Failure] = []
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to answer; a second call does nothing."""
        if self._thread is None:
            self.server_activate()
            self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
            self._thread.start()

    def stop(self) -> None:
        if self._thread is not None:
            self.shutdown()
        self.server_close()

    def reset(self) -> None:
        """Forgets all repos, requests and faults."""
        self.storage.clear()
        self.requests.clear()
        self._failures.clear()

    def env(self, token: str | None = OWNER_TOKEN, **variables: str) -> dict[str, str]:
        """Environment of a process that sees this Hub and the test's cache, as the user of `token`; None is nobody."""
        environment = {**os.environ, "HF_ENDPOINT": self.endpoint, **variables}
        if self.home is not None:
            environment["HF_HOME"] = str(self.home)
        environment.pop("HF_TOKEN", None)
        if token is not None:
            environment["HF_TOKEN"] = token
        return environment

    def commits(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> list[Commit]:
        """Commits made to a repo, oldest first, without the Hub's own first one."""
        return self.storage.repos[repo_type, repo_id].history(revision)[-2::-1]

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """Path and content of every file at a revision, the Hub's own `.gitattributes` too."""
        files = self.storage.repos[repo_type, repo_id].resolve(revision).files
        return {path: file.content for path, file in files.items()}

    def commit(
        self, repo_id: str, files: dict[str, bytes], deletions: Iterable[str] = (), message: str = "Change files"
    ) -> str:
        """Commits to a model repo without going through a client, creating it if need be; returns the commit's id."""
        with self.storage.lock:
            key = ("model", repo_id)
            repo = self.storage.repos.get(key) or self.storage.create_repo(*key, owner=OWNER)
            state = {path: file for path, file in repo.resolve("main").files.items() if path not in set(deletions)}
            state |= {path: StoredFile(content, is_large(path, len(content))) for path, content in files.items()}
            return repo.append("main", state, message, "", OWNER).sha

    def commit_folder(self, repo_id: str, folder: str | Path, message: str = "Add folder") -> str:
        """Commits every file under `folder` to a model repo; returns the commit's id."""
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        return self.commit(repo_id, files, message=message)

    def gate(self, repo_id: str, admit: Iterable[str] = ()) -> None:
        """Gates a model repo: besides its owner only the users in `admit` may download from it."""
        repo = self.storage.repos["model", repo_id]
        repo.gated, repo.admitted = "auto", set(admit)

    def fail_next(
        self, method: str, path_part: str, *, status: int = 500, truncate_to: int | None = None, times: int = 1
    ) -> None:
        """Lets the next `times` requests of `method` with `path_part` in their path fail.

        They are answered with `status`, or, with `truncate_to`, rightly but cut off after that many bytes of body.
        The client repeats most requests, but not the commit, up to five times after 408, 429 and 5xx.
        """
        self._failures.append(Failure(method, path_part, status, truncate_to, times))

    def take_failure(self, method: str, path: str) -> Failure | None:
        with self.storage.lock:
            for failure in self._failures:
                if failure.remaining > 0 and failure.method == method and failure.path_part in path:
                    failure.remaining -= 1
                    return failure
        return None

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up in the middle is its own business."""


class HubRequestHandler(BaseHTTPRequestHandler):
    """One connection. ROUTES maps method and path to the methods below, which return JSON or send bytes themselves."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.answer("GET")

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_POST(self) -> None:
        self.answer("POST")

    def do_PUT(self) -> None:
        self.answer("PUT")

    def do_DELETE(self) -> None:
        self.answer("DELETE")

    @property
    def storage(self) -> HubStorage:
        return self.server.storage

    def answer(self, method: str) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self._read_body()
        self.failure = self.server.take_failure(method, unquote(url.path))
        self.server.requests.append((method, unquote(url.path)))
        try:
            if self.failure is not None and self.failure.truncate_to is None:
                raise HubError(self.failure.status, "The test asked for this failure")
            authorization = self.headers.get("Authorization")
            self.user = self.storage.user(authorization.removeprefix("Bearer ") if authorization else None)
            self._dispatch(method, url.path.lstrip("/"))
        except HubError as error:
            headers = {"X-Error-Message": error.message}
            if error.code is not None:
                headers["X-Error-Code"] = error.code
            if error.commit is not None:
                headers["X-Repo-Commit"] = error.commit
            self.send_json({"error": error.message, **error.details}, error.status, headers)

    def _dispatch(self, method: str, path: str) -> None:
        for route_method, pattern, handle in ROUTES:
            match = pattern.fullmatch(path)
            if match and method in route_method:
                result = handle(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
                if result is not None:
                    self.send_json(result)
                return
        raise HubError(404, f"This Hub does not know {method} {path}")

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send_json(self, value, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_bytes(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def send_bytes(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.failure is not None and self.failure.truncate_to is not None:
            content, self.close_connection = content[: self.failure.truncate_to], True
        self.wfile.write(content)

    # Accounts and repos

    def whoami(self) -> dict:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        token = {"accessToken": {"displayName": "test", "role": "write"}, "type": "access_token"}
        return {"type": "user", "id": self.user, "name": self.user, "fullname": self.user, "orgs": [], "auth": token}

    def create_repo(self) -> dict:
        request = json.loads(self.body)
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        namespace = request.get("organization") or self.user
        if namespace != self.user:
            raise HubError(403, f"You don't have the rights to create a model under the namespace {namespace}")
        repo_type, repo_id = request.get("type") or "model", f"{namespace}/{request['name']}"
        private = request.get("visibility") == "private" or request.get("private") is True
        prefix = next((prefix for prefix, kind in URL_PREFIXES.items() if kind == repo_type), "")
        url = f"{self.server.endpoint}/{prefix}{repo_id}"
        if (repo_type, repo_id) in self.storage.repos:
            raise HubError(409, f"You already created this {repo_type} repo: {repo_id}", url=url)
        self.storage.create_repo(repo_type, repo_id, self.user, private)
        return {"url": url, "name": repo_id, "id": repo_id}

    def delete_repo(self) -> dict:
        request = json.loads(self.body)
        key = (request.get("type") or "model", f"{request.get('organization') or self.user}/{request['name']}")
        self.storage.find_writable(*key, self.user)
        del self.storage.repos[key]
        return {}

    def update_settings(self, kind: str, repo: str) -> dict:
        found, settings = self.storage.find_writable(kind, repo, self.user), json.loads(self.body)
        found.gated = settings.get("gated", found.gated)
        found.private = settings.get("visibility", "private" if found.private else "public") == "private"
        return {}

    def validate_yaml(self) -> dict | None:
        errors = card_errors(json.loads(self.body)["content"])
        if errors:
            self.send_json({"errors": [{"message": message} for message in errors], "warnings": []}, 400)
            return None
        return {"errors": [], "warnings": []}

    # Reading

    def repo_info(self, kind: str, repo: str, revision: str = "main") -> dict:
        found = self.storage.find(kind, repo, self.user)
        commit = found.resolve(revision or "main")
        with_blobs = self.query.get("blobs", ["false"])[0].lower() == "true"
        siblings = [
            {"rfilename": path, **(blob_fields(file, "sha256") if with_blobs else {})}
            for path, file in sorted(commit.files.items())
        ]
        return {**describe(found, commit), "siblings": siblings}

    def refs(self, kind: str, repo: str) -> dict:
        found = self.storage.find(kind, repo, self.user)

        def listing(folder: str, names: dict[str, str]) -> list[dict]:
            return [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": sha} for name, sha in names.items()]

        branches, tags = listing("heads", found.branches), listing("tags", found.tags)
        return {"branches": branches, "tags": tags, "converts": [], "pullRequests": []}

    def list_commits(self, kind: str, repo: str, revision: str) -> list[dict]:
        return [
            {
                "id": commit.sha,
                "title": commit.title,
                "message": commit.description,
                "date": commit.date,
                "authors": [{"user": commit.author}],
            }
            for commit in self.storage.find(kind, repo, self.user).history(revision)
        ]

    def tree(self, kind: str, repo: str, revision: str, path: str) -> list[dict]:
        commit = self.storage.find(kind, repo, self.user).resolve(revision)
        prefix = f"{path}/" if path else ""
        entries = entries_of(commit, prefix)
        if path and not entries:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound", commit=commit.sha)
        if self.query.get("recursive", ["false"])[0].lower() == "true":
            return entries
        return [entry for entry in entries if "/" not in entry["path"][len(prefix) :]]

    def paths_info(self, kind: str, repo: str, revision: str) -> list[dict]:
        commit = self.storage.find(kind, repo, self.user).resolve(revision)
        if self.headers.get("Content-Type", "").startswith("application/json"):
            wanted = json.loads(self.body)["paths"]
        else:
            wanted = parse_qs(self.body.decode())["paths"]
        return [entry for entry in entries_of(commit, "") if entry["path"] in wanted]

    def download(self, prefix: str, repo: str, revision: str, path: str) -> None:
        found = self.storage.find_readable(URL_PREFIXES.get(prefix, "model"), repo, self.user)
        commit, file = found.file(revision, path)
        headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        if file.is_lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self.send_bytes(file.content, 200, headers)
            return
        start, end = int(wanted[1]), min(int(wanted[2] or file.size - 1), file.size - 1)
        if start > end:
            raise HubError(416, "Requested range not satisfiable")
        self.send_bytes(
            file.content[start : end + 1], 206, {**headers, "Content-Range": f"bytes {start}-{end}/{file.size}"}
        )

    # Writing

    def preupload(self, kind: str, repo: str, revision: str) -> dict:
        commit = self.storage.find_writable(kind, repo, self.user).resolve(revision)
        files = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if is_large(file["path"], file["size"]) else "regular"
            stored = commit.files.get(file["path"])
            oid = stored.etag if stored else None
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def lfs_batch(self, prefix: str, repo: str) -> dict:
        self.storage.find_writable(URL_PREFIXES.get(prefix, "model"), repo, self.user)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.storage.large_files:
                href = f"{self.server.endpoint}/lfs/{wanted['oid']}"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, oid: str) -> dict:
        if StoredFile(self.body, True).sha256 != oid:
            raise HubError(400, "The content does not have the announced sha256")
        self.storage.large_files[oid] = self.body
        return {}

    def lfs_verify(self, oid: str) -> dict:
        if len(self.storage.large_files.get(oid, b"")) != json.loads(self.body)["size"]:
            raise HubError(404, f"Object {oid} was not uploaded")
        return {}

    def commit(self, kind: str, repo: str, revision: str) -> dict:
        found = self.storage.find_writable(kind, repo, self.user)
        operations = [json.loads(line) for line in self.body.splitlines() if line]
        commit = self.storage.commit(found, revision, operations, self.user)
        return {"commitUrl": f"{self.server.endpoint}/{repo}/commit/{commit.sha}", "commitOid": commit.sha}

    def create_branch(self, kind: str, repo: str, name: str) -> dict:
        found = self.storage.find_writable(kind, repo, self.user)
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        return add_name(found.branches, name, found.resolve(start).sha)

    def create_tag(self, kind: str, repo: str, name: str) -> dict:
        found = self.storage.find_writable(kind, repo, self.user)
        return add_name(found.tags, json.loads(self.body)["tag"], found.resolve(name).sha)


def add_name(names: dict[str, str], name: str, sha: str) -> dict:
    """Adds a branch or tag that is not there yet."""
    if name in names:
        raise HubError(409, f"Reference {name} already exists")
    names[name] = sha
    return {}


def _route(methods: str, path: str, handle: Callable) -> tuple[list[str], re.Pattern, Callable]:
    """A route; `{api}` stands for the API's path of a repo, `{repo}` for its path on the site."""
    path = path.replace("{api}", r"api/(?P<kind>model|dataset|space)s/(?P<repo>[^/]+/[^/]+)")
    path = path.replace("{repo}", r"(?P<prefix>datasets/|spaces/|)(?P<repo>[^/]+/[^/]+?)")
    return methods.split(), re.compile(path), handle


ROUTES = [
    _route("GET", r"api/whoami-v2", HubRequestHandler.whoami),
    _route("POST", r"api/repos/create", HubRequestHandler.create_repo),
    _route("DELETE", r"api/repos/delete", HubRequestHandler.delete_repo),
    _route("POST", r"api/validate-yaml", HubRequestHandler.validate_yaml),
    _route("GET", r"{api}", HubRequestHandler.repo_info),
    _route("GET", r"{api}/revision/(?P<revision>[^/]+)", HubRequestHandler.repo_info),
    _route("GET", r"{api}/refs", HubRequestHandler.refs),
    _route("GET", r"{api}/commits/(?P<revision>[^/]+)", HubRequestHandler.list_commits),
    _route("GET", r"{api}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", HubRequestHandler.tree),
    _route("POST", r"{api}/paths-info/(?P<revision>[^/]+)", HubRequestHandler.paths_info),
    _route("PUT", r"{api}/settings", HubRequestHandler.update_settings),
    _route("POST", r"{api}/preupload/(?P<revision>[^/]+)", HubRequestHandler.preupload),
    _route("POST", r"{api}/commit/(?P<revision>[^/]+)", HubRequestHandler.commit),
    _route("POST", r"{api}/branch/(?P<name>[^/]+)", HubRequestHandler.create_branch),
    _route("POST", r"{api}/tag/(?P<name>[^/]+)", HubRequestHandler.create_tag),
    _route("POST", r"{repo}\.git/info/lfs/objects/batch", HubRequestHandler.lfs_batch),
    _route("PUT", r"lfs/(?P<oid>[0-9a-f]{64})", HubRequestHandler.lfs_upload),
    _route("POST", r"lfs/(?P<oid>[0-9a-f]{64})/verify", HubRequestHandler.lfs_verify),
    _route("GET HEAD", r"{repo}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", HubRequestHandler.download),
]
