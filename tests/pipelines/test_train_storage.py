"""What Ray Train's list of checkpoints says, and what is done where it was cut short."""

import json
from pathlib import Path

import pytest

from pipelines.train_storage import last_listed, make_ready, make_storage


@pytest.fixture
def folder(tmp_path) -> Path:
    make_storage(str(tmp_path))
    return tmp_path / "checkpoints"


def listed(name: str | None) -> str:
    return json.dumps({"latest_checkpoint_result": name and {"checkpoint_dir_name": name, "metrics": {}}})


def test_the_last_checkpoint_is_that_of_the_list(folder):
    storage = str(folder.parent)
    assert last_listed(storage) == ""
    for text, name in ((listed(None), ""), (listed("checkpoint_b"), "checkpoint_b"), (listed("c")[:9], ""), ("", "")):
        (folder / "checkpoint_manager_snapshot.json").write_text(text)
        assert last_listed(storage) == name


@pytest.mark.parametrize(("text", "stays"), [(listed("checkpoint_a"), True), (listed("checkpoint_a")[:20], False)])
def test_what_was_cut_short_goes_and_what_is_whole_stays(folder, text, stays):
    (folder / "checkpoint_a").mkdir()
    (folder / "checkpoint_b.partial").mkdir()
    (folder / "checkpoint_manager_snapshot.json").write_text(text)
    make_ready(str(folder.parent))
    names = {path.name for path in folder.iterdir()}
    assert names == {"checkpoint_a"} | ({"checkpoint_manager_snapshot.json"} if stays else set())
