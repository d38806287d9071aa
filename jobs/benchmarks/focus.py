"""Where a model's compute goes: to what moves, or to chance."""

from dataclasses import asdict, dataclass
from typing import Any

from jobs.benchmarks.report import Report, aligned
from jobs.cli import UserError, checking_input
from jobs.inputs import BUNDLED_MODEL, choose_device, load_model
from mone.capacity import check_capacity
from mone.curve import routing_focus
from pipelines.synthetic_stream import motions, motions_moving
from pipelines.view import View


@dataclass(frozen=True, slots=True, kw_only=True)
class Focus:
    """Compare the tokens of large experts with the patches that lie on moving objects, on generated motions.

    Of these clips it is known what moves. "chance" is what routing without looking would give: the share of all patches
    that move, or that the expert gets. Width is a token's expert over the full one, the mean over patches.

    python -m jobs.benchmark focus --models runs/motions/split/0/mone/model --capacity 0.2 0.3 0.4
    """

    models: tuple[str, ...] = (str(BUNDLED_MODEL),)
    """Model folders, of one size of clips."""
    capacity: tuple[float, ...] = (0.2, 0.3, 0.4, 0.6)
    """Effective capacities."""
    split: str = "test"
    """val or test."""
    clips: int = 1200
    """How many to render."""
    device: str = ""
    """"cuda", "cpu"; default the GPU where there is one."""

    def measure(self) -> Report:
        """Run the benchmark."""
        device = choose_device(self.device)
        if not self.models or self.clips < 1 or self.split not in ("val", "test"):
            raise UserError("give at least one of --models, --clips of at least 1, and --split val or test")
        models = {name: load_model(name) for name in self.models}
        first = models[self.models[0]].config
        sizes = View(num_frames=first.num_frames, height_px=first.height_px, width_px=first.width_px)
        if first.height_px != first.width_px:
            raise UserError("motions are square, the model's frames are not")
        with checking_input():
            for capacity in self.capacity:
                check_capacity(capacity, first.num_experts)
        clips = motions(self.split, self.clips, sizes).to(device)
        moving_SFN = motions_moving(self.split, self.clips, first)
        with checking_input():
            rows = [
                {"model": name, "model_id": model.model_id, **asdict(routing_focus(built, clips, moving_SFN, capacity))}
                for name, model in models.items()
                for built in [model.build(device)]
                for capacity in self.capacity
            ]
        table = f"{self.clips:,} clips of motions, split {self.split}\n{_table(rows)}"
        return Report(table=table, rows=rows, device=device)


def _table(rows: list[dict[str, Any]]) -> str:
    header = [
        *("model", "capacity", "expert", "its tokens that move", "chance", "moving tokens it gets", "chance"),
        *("width where it moves", "everywhere"),
    ]
    names = ("moving_share_of_expert", "moving_share", "expert_share_of_moving", "expert_share")
    return aligned(
        header,
        [
            [
                row["model"],
                f"{row['capacity']:.3g}",
                str(row["expert"] + 1),
                *(f"{row[name]:.1%}" for name in names),
                f"{row['width_of_moving']:.3f}",
                f"{row['width']:.3f}",
            ]
            for row in rows
        ],
    )
