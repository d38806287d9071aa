"""Measure. Prints a table for people; the last line of stdout is one JSON object with everything.

python -m jobs.benchmark NAME --help says what NAME measures, and how.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Union

import tyro

from jobs.benchmarks.annotate import AnnotateSpeed
from jobs.benchmarks.control import ControlPath
from jobs.benchmarks.cpu import CpuSpeed
from jobs.benchmarks.focus import Focus
from jobs.benchmarks.kernels import Kernels
from jobs.benchmarks.model import ModelSpeed
from jobs.benchmarks.pipeline import PipelineSpeed
from jobs.benchmarks.precision import Precision
from jobs.benchmarks.report import Benchmark, environment
from jobs.benchmarks.scaling import Scaling
from jobs.benchmarks.train import TrainSpeed
from jobs.benchmarks.tune import Tune
from jobs.cli import run

# NAME: its options. Nothing else is needed to add one.
BENCHMARKS: dict[str, Any] = {
    "model": ModelSpeed,
    "cpu": CpuSpeed,
    "train": TrainSpeed,
    "scaling": Scaling,
    "kernels": Kernels,
    "tune": Tune,
    "precision": Precision,
    "focus": Focus,
    "pipeline": PipelineSpeed,
    "annotate": AnnotateSpeed,
    "control": ControlPath,
}


def benchmark(config: Benchmark) -> None:
    """Run the job."""
    name = next(name for name, options in BENCHMARKS.items() if isinstance(config, options))
    report = config.measure()
    print(report.table)
    record = {"benchmark": name, "config": dataclasses.asdict(config), **environment(report.device), **report.details}
    print(json.dumps(record | {"rows": report.rows}, allow_nan=False))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    names = (Annotated[options, tyro.conf.subcommand(name)] for name, options in BENCHMARKS.items())
    options: Any = Union[tuple(names)]  # noqa: UP007 - of a number that grows
    return run("benchmark", options, benchmark, argv, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
