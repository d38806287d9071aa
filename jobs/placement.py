"""Options that say what a model runs on, and the line that says what was chosen."""

import os
import re
import sys
from dataclasses import dataclass

import torch

from jobs.cli import UserError, checking_input
from jobs.inputs import choose_device
from mone.engine.choice import Engine
from mone.engine.support import check_engine
from pipelines.placement import Device, Placement, Wanted, nodes_up, place


@dataclass(frozen=True, kw_only=True)
class PlacementOptions:
    """What the model runs on; without slots, to be inherited beside other options."""

    device: Device = "auto"
    """auto: GPUs where any is up, else CPUs. cuda: GPUs, which an autoscaler may have to start first. cpu: CPUs."""
    num_model_workers: str = "0"
    """Model processes: N at most, or MIN:MAX, of which MIN are asked for at once (an autoscaler then starts their
    nodes); 0 means one for each GPU that comes up, or one for two CPUs."""
    gpus_per_worker: float = 1.0
    """GPUs that each model process asks for; 0.25 lets four processes, of other runs too, share one."""

    def wanted(self, address: str) -> Wanted:
        """The options, checked.

        Args:
            address: Of the cluster that the job will join; "" with no RAY_ADDRESS: none but this machine.

        Raises:
            UserError: Out of range, or a GPU is asked for where none can be.
        """
        match = re.fullmatch(r"(\d+)(?::(\d+))?", self.num_model_workers)
        if not match:
            raise UserError(f"--num-model-workers must be N or MIN:MAX, got {self.num_model_workers!r}")
        if self.device == "cuda" and not (address or os.environ.get("RAY_ADDRESS")):
            choose_device("cuda")
        workers = (int(match[1]), int(match[2])) if match[2] else (1, int(match[1]))
        try:
            return Wanted(device=self.device, workers=workers, gpus=self.gpus_per_worker)
        except ValueError as error:
            given = f"--num-model-workers {self.num_model_workers} --gpus-per-worker {self.gpus_per_worker:g}"
            raise UserError(f"{given}: {error}") from error


def placed(wanted: Wanted, engine: Engine) -> Placement:
    """The placement on the cluster that Ray is connected to, which is said on stderr.

    Raises:
        UserError: The engine cannot run there.
    """
    placement = place(wanted, nodes_up())
    if placement.device == "cpu":
        with checking_input():
            check_engine(engine, torch.device("cpu"))
    print(f"model     {placement.reason}", file=sys.stderr)
    return placement
