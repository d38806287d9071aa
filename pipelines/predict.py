"""The model stage: patches to annotations, row for row."""

import time
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from mone.checkpoint import Checkpoint
from mone.compute import clip_compute
from pipelines.schema import ANNOTATIONS, Status
from pipelines.tokenize import patches_of


@dataclass(frozen=True, slots=True)
class _Answer:
    """Probabilities float32 [C] of one clip, or why there are none."""

    probabilities_C: np.ndarray | None
    error: str = ""


class Annotator:
    """A model at one capacity, as a callable for Ray Data: DECODED rows to ANNOTATIONS rows, one for one, in order."""

    def __init__(self, checkpoint: Checkpoint, capacity: float, top_k: int) -> None:
        """Load the model on the GPU that this process was given, else on the CPU."""
        self.checkpoint, self.capacity = checkpoint, capacity
        self.top_k = min(top_k, checkpoint.config.num_classes)
        self.compute = clip_compute(checkpoint.config, capacity)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = checkpoint.build(self.device)

    def __call__(self, decoded: pa.Table) -> pa.Table:
        """Annotate a batch. Nothing raises: a clip that the model cannot take is a row with `model_error`."""
        started_s = time.perf_counter()
        answers = iter(self._answer(patches_of(decoded, self.checkpoint.config)))
        model_ms = (time.perf_counter() - started_s) * 1e3 / max(1, len(decoded) - decoded["patches"].null_count)
        rows = []
        for row in decoded.drop_columns(["patches"]).to_pylist():
            has_patches = row["status"] == Status.OK
            rows.append(self._row(row, next(answers) if has_patches else None, model_ms if has_patches else 0.0))
        return pa.Table.from_pylist(rows, schema=ANNOTATIONS)

    def _answer(self, patches_BFNP: np.ndarray) -> list[_Answer]:
        """Run the batch; if that fails, each clip alone, so that one cannot take its neighbours with it."""
        if not len(patches_BFNP):
            return []
        try:
            probabilities_BC = self.probabilities(patches_BFNP, self.capacity)
        except Exception as error:  # out of memory, a kernel's failure
            if len(patches_BFNP) == 1:
                return [_Answer(None, f"{type(error).__name__}: {error}")]
            return [answer for patches in patches_BFNP for answer in self._answer(patches[None])]
        return [
            _Answer(row) if np.isfinite(row).all() else _Answer(None, "the model's output is not finite")
            for row in probabilities_BC
        ]

    @torch.inference_mode()
    def probabilities(self, patches_BFNP: np.ndarray, capacity: float) -> np.ndarray:
        """Class probabilities float32 [B, C] at an effective capacity."""
        patches = torch.from_numpy(patches_BFNP).to(self.device)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            logits_BC = self.model(patches, capacity).logits_BC
        return logits_BC.float().softmax(-1).cpu().numpy()

    def _row(self, row: dict, answer: _Answer | None, model_ms: float) -> dict:
        known = {name: row[name] for name in ANNOTATIONS.names if name in row}
        known |= {"label": None, "true_label": row["label"], "model_id": self.checkpoint.model_id}
        nothing = {"labels": [], "scores": [], "tokens_per_expert": [], "flops": 0, "dense_flops": 0}
        if answer is None:
            return known | nothing | {"model_ms": 0.0}
        if answer.probabilities_C is None:
            error = " ".join(answer.error.split())
            return known | nothing | {"status": Status.MODEL_ERROR.value, "error": error, "model_ms": model_ms}
        best_K = np.argsort(-answer.probabilities_C, kind="stable")[: self.top_k]
        labels = [self.checkpoint.labels[index] for index in best_K]
        scores = answer.probabilities_C[best_K].tolist()
        return known | {
            "label": labels[0],
            "score": scores[0],
            "labels": labels,
            "scores": scores,
            "capacity": self.capacity,
            "tokens_per_expert": list(self.compute.tokens_per_expert),
            "flops": self.compute.flops,
            "dense_flops": self.compute.dense_flops,
            "model_ms": model_ms,
        }
