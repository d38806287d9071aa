"""What every worker of a training run does, with Ray or without."""

import functools
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from mone.baselines import capacities_of, within_reach
from mone.checkpoint import read_checkpoint, save_checkpoint, write_whole
from mone.clips import Batch, ClipSource
from mone.compute import clip_compute, peak_flops_per_s
from mone.config import ModelConfig
from mone.curve import measure
from mone.engine.choice import ExactEngine
from mone.model import ViViT
from mone.parallel import Parallel
from mone.stages import TrainConfig
from mone.training import Metrics, Trainer
from mone.transfer import initialise_from
from pipelines.output import append_line, in_output

STATE_FILE, MODEL_DIR, SAMPLES_DIR, SPENT_FILE = "state.pt", "model", "samples", "spent.json"
SHOWN_CAPACITIES = (0.2, 0.4, 1.0)
CURVE_CAPACITIES = (0.2, 0.3, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """A training run, as it is sent to its workers.

    Attributes:
        model, train: Sizes, and how to train.
        labels: Name of each class.
        output: DIR, which every worker can write.
        method: "mone" or a baseline, for the log.
        init: Model folder to start from; "" starts from random weights.
        drop_static: Measure the test split a second time, with patches dropped that changed by at most so many grey
            levels; None: no.
        notes: For the model card: the command and the stages.
        checkpoint_every: Steps from one checkpoint to the next; an epoch's end is one too.
        log_every: Steps between lines of metrics.
        log_samples: Write down which samples each step saw.
        engine: Which code runs the model's blocks.
        cuda_graphs: Repeat steps from CUDA graphs, where there is one GPU.
    """

    model: ModelConfig
    train: TrainConfig
    labels: tuple[str, ...]
    output: str
    method: str = "mone"
    init: str = ""
    drop_static: float | None = None
    notes: str = ""
    checkpoint_every: int = 500
    log_every: int = 20
    log_samples: bool = False
    engine: ExactEngine = "auto"
    cuda_graphs: bool = True


class Link(Protocol):
    """A worker's link to whoever started the run."""

    def latest(self) -> dict[str, Any] | None:
        """The state of the last checkpoint."""
        ...

    def save(self, state: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Commit a checkpoint; all workers call it together."""
        ...

    def log(self, record: dict[str, Any]) -> None:
        """Show and keep a line of metrics."""
        ...

    def must_save(self) -> bool:
        """Whether the machine is about to be taken away; all workers call it together."""
        ...


class Sources(NamedTuple):
    """Clips of each split; val is measured after every epoch, test once, at the end."""

    train: ClipSource
    val: ClipSource
    test: ClipSource


def train_loop(job: TrainJob, sources: Sources, parallel: Parallel, link: Link) -> None:
    """Train to the end, from the last checkpoint on; the first worker writes DIR/model.

    Raises:
        DivergedError: The loss is not a number or has grown; the last checkpoint is from before.
    """
    trainer = Trainer(new_model(job), job.train, len(sources.train), parallel, cuda_graphs=job.cuda_graphs)
    if state := link.latest():
        trainer.load(state)
    samples = _SampleLog(job, parallel)
    failures = _FailureLog(sources, trainer, link)
    failures.tell()
    while not trainer.done:
        for batch in trainer.run(sources.train):
            samples.write(trainer.place.step, batch)
            _after_step(job, trainer, link)
        scores = {
            f"{capacity:.3g}": trainer.evaluate(sources.val, capacity).top1
            for capacity in measured_capacities(job, SHOWN_CAPACITIES)
            if len(sources.val)
        }
        failures.tell()
        metrics = _record(trainer.metrics(), job, parallel) | {"kind": "epoch", "val_top1": scores}
        link.log(metrics)
        link.save(trainer.state(), metrics)
    finish(job, trainer, sources, link)
    failures.tell()


def measured_capacities(job: TrainJob, wanted: tuple[float, ...]) -> tuple[float, ...]:
    """Those of the wanted capacities that the model can have; of one trained at a single capacity, that one."""
    if (only := job.train.only_capacity) is not None:
        wanted = (only,)
    return capacities_of(job.method, job.model, within_reach(job.model, wanted))


def new_model(job: TrainJob) -> ViViT:
    """The model at the start of the run, the same on every worker."""
    torch.manual_seed(job.train.seed)
    model = ViViT(job.model)
    model.encoder.engine = job.engine
    if job.init:
        initialise_from(model, read_checkpoint(job.init), labels=job.labels)
    return model


def _after_step(job: TrainJob, trainer: Trainer, link: Link) -> None:
    step = trainer.place.step
    if trainer.place.samples == 0:
        return  # the epoch's end has its own line and checkpoint
    due = step % job.checkpoint_every == 0 or (step % job.log_every == 0 and link.must_save())
    if due or step % job.log_every == 0:
        metrics = _record(trainer.metrics(), job, trainer.parallel) | {"kind": "step"}
        link.log(metrics)
        if due:
            link.save(trainer.state(), metrics)


def _record(metrics: Metrics, job: TrainJob, parallel: Parallel) -> dict[str, Any]:
    """Metrics with what the devices had to do with them: memory of this one, and use of all (MFU)."""
    record = metrics._asdict() | {"workers": parallel.world}
    if parallel.device.type == "cuda":
        record["gpu_memory_gib"] = torch.cuda.max_memory_allocated(parallel.device) / 2**30
        dtype = torch.bfloat16 if job.train.bf16 else torch.float32
        if peak := peak_flops_per_s(torch.cuda.get_device_name(parallel.device), dtype):
            record["mfu"] = metrics.flops_per_s / (peak * parallel.world)
    return record


def finish(job: TrainJob, trainer: Trainer, sources: Sources, link: Link) -> None:
    """Measure the result at every capacity, and write DIR/model."""
    points: list[dict[str, Any]] = []
    for split in ("val", "test"):
        source = getattr(sources, split)
        for capacity in measured_capacities(job, CURVE_CAPACITIES) if len(source) else ():
            cost = clip_compute(job.model, capacity)
            costs = {"flops_per_clip": cost.flops, "dense_flops_per_clip": cost.dense_flops}
            point = {"split": split, "capacity": capacity, **costs, **trainer.evaluate(source, capacity)._asdict()}
            points.append(point)
    state = trainer.state()["average"]
    if trainer.parallel.rank:
        return
    with torch.device("meta"):
        model = ViViT(job.model)
    model.load_state_dict(state, assign=True)
    static = _measured_on_changed_patches(job, model, sources.test, trainer.parallel.device)
    spent = _spent(job, trainer)
    run = {"method": job.method, "capacity": job.train.only_capacity, "seed": job.train.seed, **spent}
    link.log({"kind": "curve", **run, "train_clips": len(sources.train), "points": points + static})
    notes = "\n\n".join([job.notes, *_summary(points)])
    in_output(Path(job.output), lambda: _write_model(job, model.cpu(), spent, notes))


def _write_model(job: TrainJob, model: ViViT, spent: dict[str, Any], notes: str) -> None:
    folder = Path(job.output) / MODEL_DIR
    folder.mkdir(exist_ok=True)
    write_whole(folder / SPENT_FILE, json.dumps(spent).encode())
    save_checkpoint(model, job.labels, folder, dtype=torch.bfloat16, notes=notes)


def _spent(job: TrainJob, trainer: Trainer) -> dict[str, Any]:
    """What went into the model, with what had gone into the one that it started from, as far as that says it."""
    spent = {"epochs": job.train.epochs, "train_flops": trainer.trained_flops}
    before = Path(job.init) / SPENT_FILE
    if job.init and before.exists():
        earlier = json.loads(before.read_text())
        spent = {name: value + earlier[name] for name, value in spent.items()}
    return spent


def _measured_on_changed_patches(
    job: TrainJob, model: ViViT, source: ClipSource, device: torch.device
) -> list[dict[str, Any]]:
    """Points of the test split without patches that did not change."""
    if job.drop_static is None or not len(source):
        return []
    capacities = measured_capacities(job, CURVE_CAPACITIES)
    points = measure(model.to(device), source, ["mone"], capacities, drop_static=job.drop_static)
    return [asdict(point) | {"split": "test", "method": job.method} for point in points]


def _summary(points: list[dict[str, Any]]) -> list[str]:
    """The curve as a table for the model card."""
    rows = [
        f"| {point['split']} | {point['capacity']:.3g} | {point['top1']:.1%} | {point['num_clips']:,} |"
        for point in points
    ]
    return ["\n".join(["| split | capacity | top-1 | clips |", "|---|---|---|---|", *rows])] if rows else []


class _SampleLog:
    """Which samples each step saw: START-rankN.jsonl of each worker and start of the run.

    A step that was taken back is there again under a later START, which is the one that made the model.
    """

    def __init__(self, job: TrainJob, parallel: Parallel) -> None:
        self.path: Path | None = None
        if job.log_samples:
            start_ms = parallel.gather(time.time_ns() // 1_000_000)[0]
            self.path = Path(job.output) / SAMPLES_DIR / f"{start_ms}-rank{parallel.rank}.jsonl"
            in_output(Path(job.output), functools.partial(self.path.parent.mkdir, exist_ok=True))

    def write(self, step: int, batch: Batch) -> None:
        if self.path:
            line = json.dumps({"step": step, "samples": batch.samples_B.tolist()}) + "\n"
            in_output(self.path.parent.parent, functools.partial(append_line, self.path, line.encode()))


class _FailureLog:
    """Tells of clips that could not be read, on whichever worker; all workers call it together."""

    def __init__(self, sources: Sources, trainer: Trainer, link: Link) -> None:
        self.sources, self.trainer, self._link = sources, trainer, link

    def tell(self) -> None:
        mine = {name: reason for source in self.sources for name, reason in source.failures.items()}
        clips = {name: reason for found in self.trainer.parallel.gather(mine) for name, reason in found.items()}
        if clips:
            self._link.log({"kind": "left_out", "step": self.trainer.place.step, "clips": clips})


class LocalLink:
    """The link of a run in this process: its state is DIR/state.pt, which appears whole or not at all."""

    def __init__(self, output: Path, log: Any) -> None:
        self.path, self._log = output / STATE_FILE, log

    def latest(self) -> dict[str, Any] | None:
        """The last state."""
        if not self.path.exists():
            return None
        return torch.load(self.path, map_location="cpu", weights_only=True)

    def save(self, state: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Replace the state."""
        in_output(self.path.parent, lambda: self._replace(state))

    def _replace(self, state: dict[str, Any]) -> None:
        partial = self.path.with_suffix(".partial")
        with partial.open("wb") as file:  # whose errors are the disk's own
            torch.save(state, file)
        partial.replace(self.path)

    def log(self, record: dict[str, Any]) -> None:
        """Pass it on."""
        self._log(record)

    def must_save(self) -> bool:
        """Nobody gives notice here."""
        return False
