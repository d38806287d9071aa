"""What `ray job submit --working-dir .` would send of a checkout."""

import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).parents[2]
LARGEST_BYTES = 5 * 2**20


@pytest.fixture(scope="module")
def sent(tmp_path_factory) -> zipfile.ZipFile:
    """The package of a copy of this checkout in which people have worked."""
    checkout = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    names = listed.splitlines() or pytest.skip("not a git checkout")
    for name in filter(lambda name: (ROOT / name).is_file(), names):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, checkout / name)
    for name in (
        ".venv/bin/python",
        ".git/objects/pack",
        "runs/a/model",
        "demo-output/report.html",
        "jobs/__pycache__/a",
    ):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes(os.urandom(LARGEST_BYTES))
    package = tmp_path_factory.mktemp("package") / "package.zip"
    create_package(str(checkout), package, include_gitignore=True)
    return zipfile.ZipFile(package)


def test_it_is_small(sent):
    assert sent.filename and Path(sent.filename).stat().st_size < LARGEST_BYTES


def test_what_jobs_need_is_in_it(sent):
    names = set(sent.namelist())
    assert {"jobs/annotate.py", "jobs/report.html.j2", "pyproject.toml", "constraints.txt"} <= names
    assert {f"bundled/motions_model/{name}" for name in ("config.json", "model.safetensors", "labels.json")} <= names


def test_what_they_do_not_need_is_not(sent):
    tops = {name.split("/")[0] for name in sent.namelist()}
    assert not tops & {".venv", ".git", "tests", "docs", "runs", "demo-output"}
    assert not [name for name in sent.namelist() if "__pycache__" in name or name.startswith("bundled/clips/")]
