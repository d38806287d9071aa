"""The job convert, on folders and on a hub that runs here."""

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import VivitForVideoClassification

import jobs.convert
from mone.checkpoint import read_checkpoint, save_checkpoint
from mone.config import ModelConfig
from mone.model import ViViT
from tests.conftest import run_job
from tests.public_checkpoints import timm_vit, videomae, vit, vivit

TOKEN, COMMIT = "hf_secretsecretsecret", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def convert(tmp_path, capsys):
    """Run the job; returns what it printed."""

    def run(source, *options: object, output="out") -> str:
        assert jobs.convert.main([str(source), "--output", str(tmp_path / output), *map(str, options)]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(tmp_path, capsys):
    """Run the job and check that it ends as a job has to that was given bad input; returns its one line."""

    def run(source, *options: object, output="out") -> str:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        status = jobs.convert.main([str(source), "--output", str(tmp_path / output), *map(str, options)])
        printed = capsys.readouterr()
        assert (status, printed.out, len(printed.err.splitlines())) == (2, "", 1), printed
        assert printed.err.startswith("python -m jobs.convert: ")
        assert sorted(tmp_path.rglob("*")) == before
        return printed.err

    return run


@pytest.fixture
def ours(tmp_path) -> Path:
    """A joint model of ours."""
    config = ModelConfig(num_classes=2, num_frames=4, height_px=16, width_px=16, tubelet_px=8, dim=32, num_heads=2)
    config = ModelConfig(**{**_fields(config), "encoder": "joint", "depth": 1, "temporal_depth": 0})
    return save_checkpoint(ViViT(config), ["a", "b"], tmp_path / "ours")


def _fields(config: ModelConfig) -> dict:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def test_a_video_checkpoint_is_converted_and_resized(tmp_path, convert):
    vivit(tmp_path / "theirs")
    printed = convert(tmp_path / "theirs", "--frames", 8, "--height", 32, "--width", 16, "--experts", 3)
    checkpoint = read_checkpoint(tmp_path / "out")
    config = checkpoint.config
    assert (config.num_frames, config.height_px, config.width_px, config.num_experts) == (8, 32, 16, 3)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "labels.json",
        "model.safetensors",
    ]
    assert "ViViT (Hugging Face), 4 classes" in printed
    assert "8 frames of 16 x 32 px" in printed
    assert "experts of width 12, 24, 48" in printed
    assert "at capacity 0.4" in printed
    assert f"python -m jobs.annotate ARCHIVE --output DIR --model {tmp_path / 'out'}" in printed


def test_image_checkpoints_take_frames_and_tubelets(tmp_path, convert):
    for make, name in ((vit, "vit"), (timm_vit, "timm")):
        make(tmp_path / name)
        printed = convert(tmp_path / name, "--frames", 6, "--tubelet-frames", 3, "--experts", 2, output=f"{name}-out")
        config = read_checkpoint(tmp_path / f"{name}-out").config
        assert (config.encoder, config.num_frames, config.tubelet_frames) == ("factorised", 6, 3)
        assert "at capacity 0.5" in printed  # the least that two experts can do


def test_a_model_of_ours_is_resized_and_exported(tmp_path, ours, convert):
    convert(ours, "--frames", 8, output="longer")
    assert read_checkpoint(tmp_path / "longer").config.num_frames == 8
    printed = convert(tmp_path / "longer", "--to", "hf-vivit", "--width", 24, output="exported")
    assert "VivitForVideoClassification.from_pretrained" in printed
    theirs = VivitForVideoClassification.from_pretrained(tmp_path / "exported")
    assert (theirs.config.num_frames, theirs.config.image_size) == (8, [16, 24])
    convert(tmp_path / "exported", "--to", "hf-vivit", output="again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("exported", "again"))
    assert all(torch.allclose(tensor, second[name], atol=1e-6) for name, tensor in first.items())


def test_options_without_effect_are_refused(tmp_path, ours, refused):
    vivit(tmp_path / "vivit")
    videomae(tmp_path / "videomae")
    assert "--tubelet-frames has no effect on VideoMAE" in refused(tmp_path / "videomae", "--tubelet-frames", 2)
    assert "--tubelet-frames has no effect on a model of ours" in refused(ours, "--tubelet-frames", 2, "--frames", 8)
    assert "--experts has no effect on a model of ours" in refused(ours, "--experts", 2, "--frames", 8)
    assert "--experts has no effect with --to" in refused(tmp_path / "vivit", "--experts", 2, "--to", "hf-vivit")
    assert "is a model of ours already" in refused(ours)


def test_bad_sources_sizes_and_outputs_are_refused(tmp_path, ours, refused):
    vivit(tmp_path / "vivit")
    vit(tmp_path / "vit")
    (tmp_path / "file").touch()
    assert "no model folder at" in refused(tmp_path / "nowhere")
    assert "config.json" in refused(tmp_path)
    assert "num_frames 7 is not a multiple" in refused(tmp_path / "vivit", "--frames", 7)
    assert "--frames -1: a positive number" in refused(tmp_path / "vivit", "--frames", -1)
    assert "num_frames 3 is not a multiple of tubelet_frames 2" in refused(tmp_path / "vit", "--frames", 3)
    assert "cannot be halved 7 times" in refused(tmp_path / "vit", "--experts", 8)
    assert "encoder is 'factorised'" in refused(tmp_path / "vit", "--to", "hf-vivit")
    assert "holds a model" in refused(tmp_path / "vivit", output="ours")
    assert "is a file" in refused(tmp_path / "vivit", output="file")


class Hub(ThreadingHTTPServer):
    """The parts of a model hub that a snapshot needs: the commit of a revision, its files, their content."""

    def __init__(self, folder: Path, *, private: bool) -> None:
        self.folder, self.private = folder, private
        self.requests: list[tuple[str, str | None]] = []
        super().__init__(("127.0.0.1", 0), _HubHandler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append((path, self.headers.get("Authorization")))
        if self.server.private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        if path in ("/api/models/some/model/revision/main", "/api/models/some/model/revision/v2"):
            return self._answer(200, json.dumps({"id": "some/model", "sha": COMMIT, "siblings": []}).encode())
        if path.startswith("/api/models/some/model/revision/"):
            return self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if path == f"/api/models/some/model/tree/{COMMIT}":
            return self._answer(200, json.dumps(self._files()).encode())
        file = self.server.folder / path.removeprefix(f"/some/model/resolve/{COMMIT}/")
        if not file.is_file():
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = file.read_bytes()
        return self._answer(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{_blob_id(content)}"'})

    def _files(self) -> list[dict]:
        files = [path for path in self.server.folder.rglob("*") if path.is_file()]
        contents = {str(path.relative_to(self.server.folder)): path.read_bytes() for path in files}
        return [
            {"type": "file", "path": name, "size": len(content), "oid": _blob_id(content)}
            for name, content in contents.items()
        ]

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """A private hub with one model, and beside it files that a conversion has no use for."""
    folder = tmp_path / "hub"
    vivit(folder)
    for name in ("README.md", "tf_model.h5", "pytorch_model.bin", "onnx/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"{}")
    server = Hub(folder, private=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    # In this process the library has read its environment already.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "".join(template[1:]))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_hub_address_is_fetched_with_the_token_of_the_environment(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    result = run_job("convert", "hf://some/model@v2", "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert read_checkpoint(tmp_path / "out").labels == ("walk", "größer", "sit", "walk")
    asked = [(path, authorization) for path, authorization in hub.requests if "some/model" in path]
    assert {authorization for _, authorization in asked} == {f"Bearer {TOKEN}"}
    fetched = {path.split(COMMIT)[1] for path, _ in asked if "/resolve/" in path}
    assert fetched == {"/config.json", "/model.safetensors"}
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)
    assert TOKEN not in result.stdout + result.stderr


def test_pickled_weights_are_fetched_only_where_there_are_no_others(hub, tmp_path, monkeypatch, convert):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    weights = hub.folder / "model.safetensors"
    torch.save(load_file(weights), hub.folder / "pytorch_model.bin")
    weights.unlink()
    convert("hf://some/model")
    assert read_checkpoint(tmp_path / "out").config.joint
    assert any("pytorch_model.bin" in path for path, _ in hub.requests)


def test_what_a_hub_refuses_is_said_in_one_line(hub, tmp_path, monkeypatch, capsys):
    def refusal(address: str) -> str:
        assert jobs.convert.main([address, "--output", str(tmp_path / "out")]) == 2
        printed = capsys.readouterr()
        lines = printed.err.splitlines()
        assert len(lines) == 1, printed.err
        assert not (tmp_path / "out").exists()
        return lines[0]

    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    assert "set HF_TOKEN" in refusal("hf://some/model")  # a token in a file is not used
    assert {authorization for _, authorization in hub.requests} == {None}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "cannot fetch hf://some/model@v3: no such revision" in refusal("hf://some/model@v3")
    assert "is not of the form hf://org/name" in refusal("hf://model")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot fetch hf://other/model: " in refusal("hf://other/model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'mone-video[hub]'" in refusal("hf://some/model")
