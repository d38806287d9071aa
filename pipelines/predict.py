"""The model stage: patches to annotations, row for row."""

import contextlib
import time
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from mone.capacity import check_capacity
from mone.checkpoint import Checkpoint
from mone.compute import Compute, clip_compute
from mone.engine.choice import Engine
from mone.engine.graphs import Replayed
from mone.engine.support import check_engine
from pipelines.metrics import SILENT, RunMetrics
from pipelines.placement import Device
from pipelines.schema import ANNOTATIONS, Status
from pipelines.staging import Staging
from pipelines.tokenize import Tokens, tokens_of

# Clips of a forward pass, where nobody says otherwise.
BATCH_SIZE = 16


@dataclass(frozen=True, slots=True)
class _Answer:
    """Probabilities float32 [C] of one clip, or why there are none; and what a clip of its size costs."""

    probabilities_C: np.ndarray | None
    compute: Compute
    error: str = ""


class Annotator:
    """A model at one capacity, as a callable for Ray Data: DECODED rows to ANNOTATIONS rows, one for one, in order."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        capacity: float,
        top_k: int,
        engine: Engine = "auto",
        metrics: RunMetrics = SILENT,
        *,
        device: Device = "auto",
        batch_size: int = BATCH_SIZE,
    ) -> None:
        """Load the model; "auto" takes a GPU where one can be seen, which takes `batch_size` views at a time."""
        self.checkpoint, self.capacity = checkpoint, capacity
        self.top_k = min(top_k, checkpoint.config.num_classes)
        check_capacity(capacity, checkpoint.config.num_experts)
        self.device = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
        check_engine(engine, self.device)
        self.model = checkpoint.build(self.device)
        self.model.encoder.engine = engine
        # Kernels are so short that the host's work for each would show.
        self.replayed = Replayed(self.model) if engine != "reference" and self.device.type == "cuda" else None
        self.batch_size = batch_size
        self.staging = Staging(self.device) if self.device.type == "cuda" else None
        if self.replayed is not None:
            self._warm_up()
        self.metrics, self._idle_since_s = metrics, time.perf_counter()

    def _warm_up(self) -> None:
        """Compile kernels and record a graph, while the first clips are being decoded."""
        config = self.checkpoint.config
        nothing = np.zeros((1, config.num_indices, config.num_tokens, config.patch_values), dtype=np.uint8)
        with contextlib.suppress(Exception):  # what fails here fails again with clips, which then say so
            for _ in range(2):
                self.probabilities(Tokens([0], [nothing], None), self.capacity)

    def __call__(self, decoded: pa.Table) -> pa.Table:
        """Annotate a batch. Nothing raises: a clip that the model cannot take is a row with `model_error`."""
        started_s, answers = time.perf_counter(), {}
        for tokens in tokens_of(decoded, self.checkpoint.config):
            answers |= dict(zip(tokens.rows, self._answer(tokens), strict=True))
        model_s = time.perf_counter() - started_s
        model_ms = model_s * 1e3 / max(1, len(answers))
        self.metrics.predicted(model_s if answers else 0.0, started_s - self._idle_since_s)
        rows = decoded.drop_columns(["patches", "kept"]).to_pylist()
        annotated = [
            self._row(row, answers.get(number), model_ms if number in answers else 0.0)
            for number, row in enumerate(rows)
        ]
        self._idle_since_s = time.perf_counter()
        return pa.Table.from_pylist(annotated, schema=ANNOTATIONS)

    def _answer(self, tokens: Tokens, batch_size: int = 0) -> list[_Answer]:
        """Run the batch; if that fails, each clip alone, so that one cannot take its neighbours with it."""
        compute = self.compute(tokens, self.capacity)
        try:
            probabilities_BC = self.probabilities(tokens, self.capacity, batch_size)
        except Exception as error:  # out of memory, a kernel's failure
            if batch_size == 1:
                return [_Answer(None, compute, f"{type(error).__name__}: {error}")]
            alone = (tokens.slice(row, row + 1) for row in range(len(tokens.rows)))
            return [answer for clip in alone for answer in self._answer(clip, batch_size=1)]
        return [
            _Answer(row, compute)
            if np.isfinite(row).all()
            else _Answer(None, compute, "the model's output is not finite")
            for row in probabilities_BC
        ]

    def compute(self, tokens: Tokens, capacity: float) -> Compute:
        """What each of these clips costs, all views together."""
        num_kept = None if tokens.kept_BK is None else tokens.kept_BK.shape[1]
        return clip_compute(self.checkpoint.config, capacity, num_kept).times(len(tokens.clips[0]))

    @torch.inference_mode()
    def probabilities(self, tokens: Tokens, capacity: float, batch_size: int = 0) -> np.ndarray:
        """Class probabilities float32 [B, C] at an effective capacity, averaged over views.

        Args:
            tokens: B clips, one at least.
            capacity: e_c.
            batch_size: Views that a GPU takes at a time; by default that of the constructor. What is left of whole
                clips is filled up to it: each size has kernels and a graph of its own.
        """
        if self.staging is None:
            kept_BK = None if tokens.kept_BK is None else torch.from_numpy(tokens.kept_BK)
            return self._forward(torch.from_numpy(tokens.patches), kept_BK, capacity).numpy()
        step, found = max(1, (batch_size or self.batch_size) // len(tokens.clips[0])), []
        for start in range(0, len(tokens.rows), step):
            part = tokens.slice(start, start + step)
            # Clips without their static patches come in many sizes, few of each.
            patches = self.staging.to_device(part.clips, step if part.kept_BK is None else len(part.rows))
            kept_BK = None if part.kept_BK is None else torch.from_numpy(part.kept_BK).to(self.device)
            found.append(self._forward(patches, kept_BK, capacity)[: len(part.rows)])
        return torch.cat(found).cpu().numpy()

    def _forward(self, patches: torch.Tensor, kept_BK: torch.Tensor | None, capacity: float) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = (self.replayed or self.model)(patches.flatten(0, 1), capacity, kept_BK=kept_BK).logits_BC
        return logits.float().softmax(-1).unflatten(0, patches.shape[:2]).mean(dim=1)

    def _row(self, row: dict, answer: _Answer | None, model_ms: float) -> dict:
        known = {name: row[name] for name in ANNOTATIONS.names if name in row}
        known |= {"label": None, "true_label": row["label"], "model_id": self.checkpoint.model_id}
        nothing = {"labels": [], "scores": [], "tokens_per_expert": [], "flops": 0, "kept_flops": 0, "dense_flops": 0}
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
            "tokens_per_expert": list(answer.compute.tokens_per_expert),
            "flops": answer.compute.flops,
            "kept_flops": answer.compute.kept_flops,
            "dense_flops": answer.compute.dense_flops,
            "model_ms": model_ms,
        }
