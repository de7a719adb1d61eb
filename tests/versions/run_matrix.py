"""Makes environments with old and new libraries, and tries a GenieBlue of the Hub in each: `make test-versions`.

Each environment holds what a user's does who has never heard of this package: the model comes from a local Hub, with
`trust_remote_code=True`. Results go into docs/compatibility.md. Ends with 1 if anything failed.
"""

import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass, field
from pathlib import Path

from hub_server import HubServer

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENTS = REPOSITORY / ".venvs"
PAGE = REPOSITORY / "docs/compatibility.md"
BEGIN, END = "<!-- written by make test-versions -->", "<!-- end -->"
BASE, REPO = "you/base-llm", "you/genieblue-tiny"
OWN_CODE_BASE, OWN_CODE_REPO = "you/base-with-code", "you/genieblue-on-code"
PINNED = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line)
STEPS = {
    "image": "image", "text": "text", "processing": "processor", "training": "step", "saving": "saved, loaded",
    "stock_peft": "stock PEFT", "pipe": "pipelines", "own_code": "base with code",
}  # fmt: skip


@dataclass
class Environment:
    """What is installed, besides torch and Pillow; without a version the newest there is."""

    name: str
    requirements: tuple[str, ...]
    refusal: str | None = None  # what it must be told, if it is too old
    findings: dict = field(default_factory=dict)

    @property
    def python(self) -> Path:
        return ENVIRONMENTS / self.name / "bin/python"


MATRIX = (
    Environment("pinned", tuple(f"{name}=={PINNED[name]}" for name in ("transformers", "peft", "huggingface_hub"))),
    Environment("oldest", ("transformers==5.12.0", "peft==0.18.0", "huggingface_hub==1.5.0")),
    Environment("oldest-transformers", ("transformers==5.12.0", "peft")),
    Environment("vllm-5.16", ("transformers==5.16.1", "peft==0.19.1")),
    Environment("vllm-5.19", ("transformers==5.19.0", "peft==0.20.0")),
    Environment("oldest-peft", ("transformers", "peft==0.18.0")),
    Environment("newest", ("transformers", "peft")),
    Environment("too-old-transformers", ("transformers==5.11.0", "peft==0.18.0"), "needs transformers 5.12 or newer"),
    Environment("too-old-peft", ("transformers==5.12.0", "peft==0.17.1"), "needs peft 0.18 or newer"),
)  # fmt: skip


def make_environment(folder: Path, *requirements: str, pip: Path | None = None, shared: Path | None = None) -> None:
    """A new virtual environment; one with `shared` packages of another finds them behind its own."""
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=pip is None)
    if shared is not None:
        (site_packages(folder) / "shared.pth").write_text(f"{site_packages(shared)}\n")
    command = [str(pip or folder / "bin/python"), "-m", "pip", "--python", str(folder / "bin/python")]
    subprocess.run(
        [*command, "install", "--quiet", "--no-compile", *requirements], check=True, stderr=subprocess.DEVNULL
    )


def site_packages(folder: Path) -> Path:
    return next(folder.glob("lib/python3*/site-packages"))


def torch_environment() -> Path:
    """torch in an environment of its own: 900 MB that the others share. It is kept between runs."""
    folder = ENVIRONMENTS / f"torch-{PINNED['torch']}"
    if not (folder / "complete").exists():
        make_environment(folder, f"torch=={PINNED['torch']}", f"pillow=={PINNED['pillow']}", "jinja2")
        (folder / "complete").touch()
    return folder


def publish_tiny_models(hub: HubServer, folder: Path) -> None:
    """Two bases, one with code of its own, and a GenieBlue on each, saved and pushed with the pinned versions."""
    from tiny_genieblue import tiny_genieblue
    from tiny_models import save_tiny_base
    from transformers import AutoModelForCausalLM

    for family, base_id, repo_id in (("llama", BASE, REPO), ("bluelm", OWN_CODE_BASE, OWN_CODE_REPO)):
        hub.commit_folder(base_id, save_tiny_base(family, folder / family))
        base = AutoModelForCausalLM.from_pretrained(base_id, trust_remote_code=family == "bluelm")
        tiny_genieblue(base=base).push_to_hub(repo_id)


def try_it(environment: Environment, folder: Path, hub: HubServer, **request) -> dict:
    """What `one_environment.py` finds with the environment's libraries."""
    folder.mkdir()
    request |= {
        "base": BASE, "repo": REPO, "own_code_base": OWN_CODE_BASE, "own_code_repo": OWN_CODE_REPO,
        "folder": str(folder / "saved"), "findings": str(folder / "findings.json"),
    }  # fmt: skip
    (folder / "request.json").write_text(json.dumps(request))
    variables = {name: value for name, value in hub.env().items() if name != "PYTHONPATH"}
    command = [str(environment.python), "-P", str(Path(__file__).with_name("one_environment.py"))]
    result = subprocess.run(
        [*command, str(folder / "request.json")],
        cwd=folder, env=variables | {"HF_HOME": str(folder / "hf-home")}, capture_output=True, text=True,
    )  # fmt: skip
    findings = folder / "findings.json"
    if not findings.exists():
        raise RuntimeError(f"{environment.name}: {result.stderr}")
    found = json.loads(findings.read_text())
    if found["failures"] and environment.refusal is None:
        print(result.stderr, file=sys.stderr)
    return found


def run(hub: HubServer, workdir: Path) -> None:
    """Fills in the findings of all environments."""
    shared = torch_environment()
    publish_tiny_models(hub, workdir)
    expected = None
    for environment in MATRIX:
        start = time.monotonic()
        make_environment(
            ENVIRONMENTS / environment.name, *environment.requirements, pip=shared / "bin/python", shared=shared
        )
        made = time.monotonic()
        environment.findings = try_it(environment, workdir / environment.name, hub, image_answer=expected)
        expected = expected or environment.findings["image_answer"]
        print(
            f"{environment.name}: {environment.findings['versions']}, made in {made - start:.0f} s, tried in "
            f"{time.monotonic() - made:.0f} s, failed: {environment.findings['failures'] or 'nothing'}",
            flush=True,
        )
    # What they saved, in the pinned environment.
    for environment in MATRIX:
        saved = workdir / environment.name / "saved"
        if environment.refusal is None:
            found = try_it(
                MATRIX[0], workdir / f"{environment.name}-back", hub, load=[str(saved)], steps=["image", "others"]
            )
            if found["failures"]:
                environment.findings["failures"]["others"] = str(found["failures"])


def row(environment: Environment) -> str:
    found = environment.findings
    names = ("transformers", "peft", "huggingface_hub", "tokenizers")
    cells = [found["versions"][name] for name in names]
    if environment.refusal is not None:
        message = found["failures"].get("image", "").split(" (/")[0]  # without the path of the environment
        refused = environment.refusal in message
        cells += ["refused" if refused else f"**{message or 'not refused'}**", *["–"] * len(STEPS)]
    else:
        cells += ["yes" if step not in found["failures"] else "**no**" for step in (*STEPS, "others")]
    return f"| {' | '.join(cells)} |"


def table() -> str:
    titles = ("transformers", "peft", "huggingface_hub", "tokenizers", *STEPS.values(), "saved, loaded by the pinned")
    day = datetime.date.today().isoformat()
    head = f"Run on {day}, Python {sys.version.split()[0]}, torch {PINNED['torch']}."
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}", *map(row, MATRIX)]
    return "\n".join([BEGIN, head, "", *lines, END])


def write_page() -> None:
    """Puts the table into its place in the docs."""
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: table(), page, flags=re.DOTALL), encoding="utf-8")


def main() -> int:
    hub = HubServer()
    hub.start()
    with tempfile.TemporaryDirectory(prefix="genieblue-versions-") as workdir:
        hub.home = Path(workdir, "hf-home")
        os.environ.update(hub.env(HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", OMP_NUM_THREADS="1"))
        try:
            run(hub, Path(workdir))
        finally:
            hub.stop()
    write_page()
    return any("**" in row(environment) for environment in MATRIX)


if __name__ == "__main__":
    sys.exit(main())
