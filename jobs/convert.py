"""A public checkpoint as a model of ours; a model of ours for another clip size, or as a public checkpoint.

python -m jobs.convert SOURCE --output MODEL
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jobs.cli import UserError, checking_input, run
from jobs.hub import download, is_hub_address
from jobs.inputs import make_output
from mone.checkpoint import CONFIG_FILE, read_checkpoint, save_checkpoint
from mone.compute import clip_compute
from mone.config import ModelConfig
from mone.interop import FAMILIES, IMAGE_FAMILIES, Conversion, convert, export_vivit, family_of
from mone.interop.source import Source
from mone.transfer import resize

OURS = "MoNE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Convert:
    """Make a model folder from a public checkpoint: ViViT, VideoMAE or ViT of Hugging Face, or a ViT of timm.

    At capacity 1 it answers as the source does. Position embeddings are interpolated where a size is asked for.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A folder with a public checkpoint or with a model of ours, or hf://org/name[@revision]."""
    output: str
    """Folder to write; one that holds a model is refused."""
    frames: int = 0
    """Frames of a clip; 0 keeps the source's (an image model: 16 tubelets)."""
    height: int = 0
    """Height of a frame in pixels; 0 keeps the source's."""
    width: int = 0
    """Width of a frame in pixels; 0 keeps the source's."""
    tubelet_frames: int = 0
    """Frames of a tubelet, of which an image model sees the central one; 0 takes 2. For image models only."""
    experts: int = 0
    """Nested experts; 0 takes 4. For public checkpoints only."""
    to: Literal["mone", "hf-vivit"] = "mone"
    """mone: a model folder of ours. hf-vivit: for VivitForVideoClassification of transformers; joint models only."""


def convert_model(config: Convert) -> None:
    """Run the job."""
    _check_numbers(config)
    output = Path(config.output)
    if output.is_file() or (output / CONFIG_FILE).exists():
        raise UserError(f"{output} {'is a file' if output.is_file() else 'holds a model'}; choose another --output")
    folder = download(config.source) if is_hub_address(config.source) else Path(config.source)
    with checking_input():
        conversion = _read(config, folder)
        if config.to == "hf-vivit":
            export_vivit(conversion.model, conversion.labels, output)
        else:
            notes = _notes(config, conversion)
            save_checkpoint(conversion.model, conversion.labels, make_output(config.output), notes=notes)
    print(_summary(config, conversion))


def _notes(config: Convert, conversion: Conversion) -> str:
    """For the model card."""
    source = f"`python -m jobs.convert {config.source}`: {FAMILIES.get(conversion.family, conversion.family)}."
    if conversion.family == OURS:
        return source
    return f"{source} At capacity 1 it answers as its source does; lower capacities need nested training first."


def _check_numbers(config: Convert) -> None:
    for option in ("frames", "height", "width", "tubelet_frames", "experts"):
        if getattr(config, option) < 0:
            raise UserError(f"--{option.replace('_', '-')} {getattr(config, option)}: a positive number is needed")
    if config.experts and config.to != "mone":
        raise UserError(f"--experts has no effect with --to {config.to}, which has none")


def _read(config: Convert, folder: Path) -> Conversion:
    """The model that was asked for.

    Raises:
        UserError: An option without effect on this source.
        ValueError: A source that cannot be used, or sizes that do not fit it.
    """
    if _is_ours(folder):
        _refuse(config, "tubelet_frames", "experts", source="a model of ours, which has its own")
        if config.to == "mone" and not (config.frames or config.height or config.width):
            raise UserError(f"{config.source} is a model of ours already; give --frames, --height or --width, or --to")
        checkpoint = read_checkpoint(folder)
        conversion = Conversion(checkpoint.build(), checkpoint.labels, OURS)
    elif (family := family_of(folder)) in IMAGE_FAMILIES:
        conversion = convert(
            folder,
            num_experts=config.experts or 4,
            num_frames=config.frames or None,
            tubelet_frames=config.tubelet_frames or None,
        )
    else:
        _refuse(config, "tubelet_frames", source=f"{FAMILIES[family]}, which has its own")
        conversion = convert(folder, num_experts=config.experts or 4)
    model = resize(
        conversion.model,
        num_frames=config.frames or None,
        height_px=config.height or None,
        width_px=config.width or None,
    )
    return Conversion(model, conversion.labels, conversion.family)


def _is_ours(folder: Path) -> bool:
    keys = Source(folder).config.keys()
    return "num_classes" in keys and not keys & {"model_type", "architecture"}


def _refuse(config: Convert, *options: str, source: str) -> None:
    for option in options:
        if getattr(config, option):
            raise UserError(f"--{option.replace('_', '-')} has no effect on {source}")


def _summary(config: Convert, conversion: Conversion) -> str:
    """What it is, what it costs, and what to do next."""
    model = conversion.model.config
    num_parameters = sum(parameter.numel() for parameter in conversion.model.parameters())
    lines = [
        f"{config.source}: {FAMILIES.get(conversion.family, conversion.family)}, {model.num_classes:,} classes",
        f"  clips of {model.num_frames} frames of {model.width_px} x {model.height_px} px, tubelets of"
        f" {model.tubelet_frames} x {model.tubelet_px} x {model.tubelet_px}",
        f"  {model.encoder}, depth {model.depth}, dim {model.dim}, {num_parameters / 1e6:,.1f} M parameters",
    ]
    if config.to == "hf-vivit":
        return "\n".join([*lines, f"wrote {config.output}, for VivitForVideoClassification.from_pretrained"])
    capacity = max(0.4, model.widths[0] / model.dim)
    lines += [
        f"  experts of width {', '.join(map(str, model.widths))}; {_cost(model, capacity)}",
        f"wrote {config.output}; next:",
        f"  python -m jobs.annotate ARCHIVE --output DIR --model {config.output} --capacity 1",
    ]
    if conversion.family != OURS:
        lines.append("below capacity 1 it guesses until it is trained with nesting: see python -m jobs.train --help")
    return "\n".join(lines)


def _cost(model: ModelConfig, capacity: float) -> str:
    compute = clip_compute(model, capacity)
    return f"{compute.dense_flops / 1e9:,.1f} GFLOP per clip dense, {compute.flops / 1e9:,.1f} at capacity {capacity:g}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("convert", Convert, convert_model, argv)


if __name__ == "__main__":
    sys.exit(main())
