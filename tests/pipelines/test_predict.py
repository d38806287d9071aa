"""Decoded rows to annotations: one for one, in order, with the answers of the model and the compute they took."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from mone.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from mone.compute import clip_compute
from mone.config import ModelConfig
from mone.model import ViViT
from pipelines.predict import Annotator
from pipelines.schema import ANNOTATIONS, DECODED

CONFIG = ModelConfig(
    num_classes=5, num_frames=4, height_px=16, width_px=16, tubelet_px=4, dim=32, num_heads=4, depth=2, temporal_depth=1
)
LABELS = ("walk", "run", "jump", "sit", "wave")
POISON = 251  # the value of all pixels of a clip that a broken model stumbles over


@pytest.fixture(autouse=True)
def _on_one_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    model = ViViT(CONFIG)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return read_checkpoint(save_checkpoint(model, LABELS, tmp_path_factory.mktemp("model")))


def noise(seed: int) -> np.ndarray:
    shape = (CONFIG.num_indices, CONFIG.num_tokens, CONFIG.patch_values)
    return np.random.default_rng(seed).integers(0, 250, shape, dtype=np.uint8)


def decoded(*statuses: str, poison: tuple[int, ...] = ()) -> pa.Table:
    """A DECODED row per status; the clips of `poison` are of one value."""
    rows = []
    for number, status in enumerate(statuses):
        ok = status == "ok"
        patches = np.full_like(noise(0), POISON) if number in poison else noise(number)
        rows.append(
            {
                "clip_id": f"id{number}",
                "video": f"/videos/{number}.mp4",
                "start_s": 1.5 * number,
                "end_s": 1.5 * number + 1,
                "label": f"true {number}",
                "status": status,
                "error": "" if ok else f"reason {number}",
                "note": f"note {number}",
                "decoder": "decord" if ok else "",
                "decode_ms": 2.5 * number,
                "patches": patches.tobytes() if ok else None,
            }
        )
    return pa.Table.from_pylist(rows, schema=DECODED)


def expected_probabilities(checkpoint: Checkpoint, seed: int, capacity: float) -> np.ndarray:
    with torch.inference_mode():
        logits_BC = checkpoint.build()(torch.from_numpy(noise(seed))[None], capacity).logits_BC
    return logits_BC.double().softmax(-1)[0].numpy()


MIXED = ("missing", "ok", "ok", "decode_error", "ok", "unsupported")


@pytest.mark.parametrize("statuses", [MIXED, ("ok",), ("ok", "ok", "ok"), ("empty", "missing"), ()])
def test_rows_are_one_for_one_in_order(checkpoint, statuses):
    batch = decoded(*statuses)
    annotated = Annotator(checkpoint, 0.5, top_k=3)(batch)
    assert annotated.schema == ANNOTATIONS
    same = ["clip_id", "video", "start_s", "end_s", "status", "error", "decoder", "decode_ms", "note"]
    assert annotated.select(same).to_pylist() == batch.select(same).to_pylist()
    assert annotated["true_label"].to_pylist() == batch["label"].to_pylist()
    assert set(annotated["model_id"].to_pylist()) <= {checkpoint.model_id}


@pytest.mark.parametrize("capacity", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("top_k", [1, 3, 5, 50])
def test_labels_are_the_best_of_the_softmax(checkpoint, capacity, top_k):
    rows = Annotator(checkpoint, capacity, top_k)(decoded(*MIXED)).to_pylist()
    for number in (1, 2, 4):
        probabilities_C = expected_probabilities(checkpoint, number, capacity)
        order = sorted(range(5), key=lambda index: -probabilities_C[index])[:top_k]
        row = rows[number]
        assert row["labels"] == [LABELS[index] for index in order]
        np.testing.assert_allclose(row["scores"], probabilities_C[order], rtol=1e-4)
        assert row["scores"] == sorted(row["scores"], reverse=True)
        assert (row["label"], row["score"]) == (row["labels"][0], row["scores"][0])


def test_clips_differ_in_their_answers(checkpoint):
    scores = Annotator(checkpoint, 0.5, 5)(decoded("ok", "ok", "ok"))["score"].to_pylist()
    assert len(set(scores)) == 3  # otherwise the tests of order would prove nothing


@pytest.mark.parametrize("capacity", [0.125, 0.4, 0.75, 1.0])
def test_compute_is_that_of_the_capacity(checkpoint, capacity):
    compute = clip_compute(CONFIG, capacity)
    for row in Annotator(checkpoint, capacity, 1)(decoded("ok", "missing", "ok")).to_pylist():
        if row["status"] == "ok":
            assert row["capacity"] == pytest.approx(capacity)
            assert sum(row["tokens_per_expert"]) == CONFIG.num_indices * CONFIG.num_tokens
            assert len(row["tokens_per_expert"]) == CONFIG.num_experts
            assert (row["flops"], row["dense_flops"]) == (compute.flops, compute.dense_flops)
            assert row["flops"] <= row["dense_flops"] and (row["flops"] == row["dense_flops"]) == (capacity == 1.0)
            assert row["model_ms"] > 0
        else:
            assert (row["tokens_per_expert"], row["flops"], row["dense_flops"]) == ([], 0, 0)


def test_failed_rows_have_no_answer(checkpoint):
    for row in Annotator(checkpoint, 0.5, 3)(decoded("missing", "decode_error")).to_pylist():
        assert row["label"] is None and row["score"] is None and row["model_ms"] == 0
        assert row["labels"] == row["scores"] == []


class Stumbling(torch.nn.Module):
    """A model that fails on every batch with a poisoned clip in it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, patches_BFNP: torch.Tensor, capacity: float, *, kept_BK: torch.Tensor | None):
        if (patches_BFNP == POISON).flatten(1).all(1).any():
            raise RuntimeError("out of\n  memory, say")
        return self.model(patches_BFNP, capacity, kept_BK=kept_BK)


class Diverging(torch.nn.Module):
    """A model whose output for a poisoned clip is not finite."""

    def __init__(self, model: torch.nn.Module, value: float) -> None:
        super().__init__()
        self.model, self.value = model, value

    def forward(self, patches_BFNP: torch.Tensor, capacity: float, *, kept_BK: torch.Tensor | None):
        prediction = self.model(patches_BFNP, capacity, kept_BK=kept_BK)
        prediction.logits_BC[(patches_BFNP == POISON).flatten(1).all(1)] = self.value
        return prediction


@pytest.mark.parametrize("poison", [(0,), (1,), (4,), (0, 2, 4), (0, 1, 2, 4)])
@pytest.mark.parametrize("failure", ["raises", float("nan"), float("inf"), float("-inf")])
def test_a_clip_that_the_model_cannot_take_leaves_its_neighbours_alone(checkpoint, poison, failure):
    statuses = ("ok", "ok", "ok", "missing", "ok")
    annotator = Annotator(checkpoint, 0.5, 3)
    healthy = annotator(decoded(*statuses)).to_pylist()
    annotator.model = Stumbling(annotator.model) if failure == "raises" else Diverging(annotator.model, failure)
    annotated = annotator(decoded(*statuses, poison=poison))
    assert annotated.schema == ANNOTATIONS
    for number, (row, as_before) in enumerate(zip(annotated.to_pylist(), healthy, strict=True)):
        if number not in poison:
            np.testing.assert_allclose(row.pop("scores"), as_before.pop("scores"), rtol=1e-4)
            ignored = {"score": None, "model_ms": None}
            assert row | ignored == as_before | ignored
            continue
        assert (row["status"], row["label"], row["score"]) == ("model_error", None, None)
        assert (row["labels"], row["tokens_per_expert"], row["flops"]) == ([], [], 0)
        assert row["error"] and "\n" not in row["error"]
        assert ("memory" if failure == "raises" else "finite") in row["error"]


def test_a_capacity_out_of_range_is_refused_at_once(checkpoint):
    with pytest.raises(ValueError, match="capacity"):
        Annotator(checkpoint, 0.01, 1)


def test_a_process_for_cpus_leaves_a_gpu_alone_that_it_can_see(checkpoint, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert Annotator(checkpoint, 0.5, 3, device="cpu").device.type == "cpu"


def test_every_engine_says_the_same(checkpoint):
    fast, slow = (Annotator(checkpoint, 0.5, 3, engine)(decoded("ok", "ok")) for engine in ("layout", "reference"))
    assert fast["label"].equals(slow["label"])
    assert np.allclose(fast["score"].to_numpy(), slow["score"].to_numpy(), atol=1e-4)
