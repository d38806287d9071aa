"""The model card: README.md beside the weights, so that a folder explains itself."""

from collections.abc import Sequence

from mone.baselines import capacities_of, within_reach
from mone.compute import clip_compute
from mone.config import ModelConfig

CARD_FILE = "README.md"
_CAPACITIES = (0.2, 0.4, 0.6, 1.0)
_SHOWN_LABELS = 20
_TEMPLATE = """\
# {form} ViViT with Mixtures of Nested Experts

- {millions:.1f} M parameters: {config.depth} nested and {config.temporal_depth} temporal blocks of width {config.dim},
  {config.num_heads} heads; experts of width {widths}
- {config.num_frames} frames of {config.height_px} x {config.width_px} over {config.span_s:g} s, tubelets of
  {config.tubelet_frames} x {config.tubelet_px} x {config.tubelet_px}
- router: {config.router}; one budget per {config.budget}; allocation: {config.allocation}
- {num_labels} classes: {labels}

| effective capacity | GFLOP per clip | of full width |
|---|---|---|
{costs}

Floating-point operations, 2 per multiply-add.

## Origin and results

{notes}

## Use

    python -m jobs.annotate ARCHIVE --output DIR --model THIS_FOLDER --capacity {capacity:g}
"""


def model_card(config: ModelConfig, labels: Sequence[str], notes: str, num_parameters: int) -> str:
    """Markdown: what the model is, what it costs, what it was made from, how it is used.

    Args:
        config: Sizes.
        labels: Name of each class.
        notes: Where it comes from and how good it is, as Markdown; "" says that nothing is recorded.
        num_parameters: Of all tensors.
    """
    asked = within_reach(config, _CAPACITIES)
    return _TEMPLATE.format(
        form=config.encoder.capitalize(),
        config=config,
        millions=num_parameters / 1e6,
        widths=", ".join(map(str, config.widths)),
        num_labels=len(labels),
        labels=", ".join([*labels[:_SHOWN_LABELS], *(["..."] if labels[_SHOWN_LABELS:] else [])]),
        costs="\n".join(_cost_rows(config, asked)),
        capacity=0.4 if 0.4 in asked else asked[0],
        notes=notes or "Nothing is recorded.",
    )


def _cost_rows(config: ModelConfig, asked: Sequence[float]) -> list[str]:
    rows = []
    for capacity in capacities_of("mone", config, asked):
        cost = clip_compute(config, capacity)
        rows.append(f"| {capacity:.3g} | {cost.flops / 1e9:.3f} | {cost.flops / cost.dense_flops:.1%} |")
    return rows
