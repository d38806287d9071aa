"""Training augmentation of clips on their device, drawn per clip: the same pixels on any number of workers.

Every draw is a function of (seed, epoch, sample, purpose), made on the CPU with a counter-based generator (Philox), so
neither the batch that a clip lies in nor the order of calls decides what happens to it. What is drawn is then applied
to many clips at once, by arithmetic that gives the same result for a clip whatever its neighbours are: see `_resize`.
RandAugment's resampling may differ by a level between kinds of device; all else is built not to.

All frames of a clip are treated alike, so motion stays what it was.

Shapes: B clips, T frames, H x W pixels, C = 3 channels, h x w pixels of the result, K classes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mone.clips import sent
from mone.rand_augment import MAX_MAGNITUDE, rand_augment

# What a draw is for; each purpose has numbers of its own, so that switching one augmentation on leaves the others be.
_TIME, _CROP, _FLIP, _RAND_AUGMENT, _COLOUR, _ERASE, _MIX = range(7)

_CHUNK_BYTES = 2**28  # of floats, one copy; a few copies exist at a time
_LUMA = (299, 587, 114)  # thousandths (ITU-R BT.601)


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentConfig:
    """What happens to a training clip; the defaults do nothing.

    The published values, from the training files of ViViT (google-research/scenic, projects/vivit):
    Kinetics-400, on frames of 256 for a model of 224: crop_scale (0.43, 0.95), flip 0.5; colour is changed with
    probability 0.8. Something-Something v2, on frames of 288 for 256: crop_scale (0.45, 0.98), flip 0 (left and right
    are labels), rand_augment (2, 20), mixup 0.3. The crop scales are those files' scale jitter of 0.9 to 1.33 followed
    by a crop, as a share of the frame's area.

    Attributes:
        crop_scale: Range of the area of a random resized crop, as a share of the largest box of the model's shape that
            fits into the frame.
        crop_ratio: Range of the crop's width over height, relative to the model's shape: at 1 nothing is stretched.
            torchvision's usual range is (3/4, 4/3). Crop scale and ratio (1, 1) together: no random crop, the centre.
        flip: Probability of swapping left and right. Leave it 0 where they differ by label.
        colour_jitter: Strength s: brightness, contrast and saturation change by factors in [1 - s, 1 + s].
        rand_augment: Operations per clip and their magnitude, 0 to 30 (Cubuk et al., 2020); see
            `mone.rand_augment`.
        erasing: Probability of erasing one box (Zhong et al., 2020), the same in all frames.
        mixup: Alpha of the Beta distribution of mixup (Zhang et al., 2018); see `mix`.
    """

    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_ratio: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0
    colour_jitter: float = 0.0
    rand_augment: tuple[int, int] = (0, 0)
    erasing: float = 0.0
    mixup: float = 0.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: A value out of range; named.
        """
        for name in ("flip", "colour_jitter", "erasing"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value!r}")
        for name, most in (("crop_scale", 1.0), ("crop_ratio", math.inf)):
            low, high = getattr(self, name)
            object.__setattr__(self, name, (low, high))  # a list, as from JSON, would equal no tuple
            if not (0 < low <= high <= most and math.isfinite(high)):
                raise ValueError(f"{name} must be a range of positive numbers up to {most}, got {(low, high)!r}")
        operations, magnitude = self.rand_augment
        object.__setattr__(self, "rand_augment", (operations, magnitude))
        if not (operations >= 0 and 0 <= magnitude <= MAX_MAGNITUDE and (operations or not magnitude)):
            raise ValueError(
                f"rand_augment must be a number of operations and a magnitude in [0, {MAX_MAGNITUDE}], "
                f"got {self.rand_augment!r}"
            )
        if not (self.mixup >= 0 and math.isfinite(self.mixup)):
            raise ValueError(f"mixup must be a finite number of at least 0, got {self.mixup!r}")

    @property
    def off(self) -> bool:
        """Whether nothing is changed at all."""
        return self == AugmentConfig()

    @property
    def crops(self) -> bool:
        """Whether boxes are drawn."""
        return self.crop_scale != (1, 1) or self.crop_ratio != (1, 1)


@dataclass(frozen=True, slots=True)
class Draws:
    """Random numbers of clips in an epoch.

    Attributes:
        samples: Index of each clip in the data set.
        seed: Of the run.
        epoch: Of the run.
    """

    samples: tuple[int, ...]
    seed: int
    epoch: int

    def generators(self, purpose: int) -> Iterator[np.random.Generator]:
        """One generator a clip. Key and high counter words are (seed, sample) and (epoch, purpose): streams apart."""
        for sample in self.samples:
            key = np.array([self.seed % 2**64, sample], np.uint64)
            counter = np.array([0, 0, self.epoch, purpose], np.uint64)
            yield np.random.Generator(np.random.Philox(key=key, counter=counter))

    def uniform(self, purpose: int, count: int) -> np.ndarray:
        """Float64 [count, B] in [0, 1)."""
        return np.stack([generator.random(count) for generator in self.generators(purpose)], axis=1)

    def beta(self, purpose: int, alpha: float) -> np.ndarray:
        """Float64 [B] from Beta(alpha, alpha)."""
        return np.array([generator.beta(alpha, alpha) for generator in self.generators(purpose)])


def augment(
    frames_BTHWC: Tensor,
    samples_B: Sequence[int] | Tensor,
    config: AugmentConfig,
    *,
    num_frames: int,
    height_px: int,
    width_px: int,
    seed: int,
    epoch: int,
) -> Tensor:
    """Clips as a model takes them, changed at random: window, crop, flip, RandAugment, colours, erasing.

    With everything off this is `centre`. With anything on, a clip of more than num_frames frames gives a window of
    consecutive frames from a drawn start. Mixup is a step of its own: `mix`.

    Args:
        frames_BTHWC: uint8 [B, T, H, W, 3], no smaller than the result in any direction.
        samples_B: Index of each clip in the data set; on the CPU, or the device is waited for.
        config: What to do.
        num_frames: Frames of the result.
        height_px: Height of the result.
        width_px: Width of the result.
        seed: Of the run.
        epoch: Of the run.

    Returns:
        uint8 [B, num_frames, height_px, width_px, 3]. The argument is left alone; with everything off the result may
        be a view of it.

    Raises:
        ValueError: Frames that are not uint8 or too small, or another number of samples than of clips.
    """
    size = (num_frames, height_px, width_px)
    _check(frames_BTHWC, size)
    samples = _samples(samples_B, len(frames_BTHWC))
    if config.off:
        return centre(frames_BTHWC, num_frames=num_frames, height_px=height_px, width_px=width_px)
    result = frames_BTHWC.new_empty((len(samples), *size, 3))
    for part in _chunks(len(samples), num_frames * math.prod(frames_BTHWC.shape[2:])):
        result[part] = _augmented(frames_BTHWC[part], Draws(samples[part], seed, epoch), config, size)
    return result


def centre(frames_BTHWC: Tensor, *, num_frames: int, height_px: int, width_px: int) -> Tensor:
    """The middle of clips in time, height and width, as a view: what validation sees.

    Raises:
        ValueError: Frames that are not uint8 or too small.
    """
    size = (num_frames, height_px, width_px)
    _check(frames_BTHWC, size)
    for axis, wanted in enumerate(size, start=1):
        frames_BTHWC = frames_BTHWC.narrow(axis, (frames_BTHWC.shape[axis] - wanted) // 2, wanted)
    return frames_BTHWC


def mix(
    frames_BTHWC: Tensor,
    labels_B: Tensor,
    samples_B: Sequence[int] | Tensor,
    config: AugmentConfig,
    *,
    num_classes: int,
    seed: int,
    epoch: int,
) -> tuple[Tensor, Tensor]:
    """Mixup: clips 2i and 2i + 1 become l * a + (1 - l) * b and l * b + (1 - l) * a, and so do their targets.

    Neighbours are paired, not drawn, since the order of an epoch is random already and contiguous slices of even size
    keep their pairs: a global batch gives the same pixels on any number of workers. l comes from the pair's first
    sample. A last odd clip stays as it is. Pixels are rounded to uint8, which is what all that follows takes.

    Args:
        frames_BTHWC: uint8 [B, T, H, W, 3] (any shape after B will do).
        labels_B: int64 classes.
        samples_B: Index of each clip in the data set; on the CPU, or the device is waited for.
        config: Its mixup is alpha; 0 is off.
        num_classes: K.
        seed: Of the run.
        epoch: Of the run.

    Returns:
        uint8 frames and float32 targets [B, K] for `torch.nn.functional.cross_entropy`, before label smoothing.

    Raises:
        ValueError: Frames that are not uint8, or another number of samples than of clips.
    """
    if frames_BTHWC.dtype != torch.uint8:
        raise ValueError(f"frames must be uint8, got {frames_BTHWC.dtype}")
    samples = _samples(samples_B, len(frames_BTHWC))
    targets_BK = F.one_hot(labels_B, num_classes).float()
    num_pairs = len(samples) // 2
    if not config.mixup or not num_pairs:
        return frames_BTHWC, targets_BK
    shares = Draws(samples[: 2 * num_pairs : 2], seed, epoch).beta(_MIX, config.mixup)
    shares_P = _to_device(shares, frames_BTHWC.device)
    mixed_BTHWC = frames_BTHWC.clone()
    for part in _chunks(num_pairs, 2 * frames_BTHWC[0].numel()):
        clips = slice(2 * part.start, 2 * part.stop)
        mixed_BTHWC[clips] = _to_pixels(_mix_pairs(frames_BTHWC[clips].float(), shares_P[part]))
    targets_BK[: 2 * num_pairs] = _mix_pairs(targets_BK[: 2 * num_pairs], shares_P)
    return mixed_BTHWC, targets_BK


def _mix_pairs(values: Tensor, shares_P: Tensor) -> Tensor:
    """Float [2 P, ...], pairs one after the other, mixed in both directions."""
    pairs, shares = values.unflatten(0, (-1, 2)), _spread(shares_P, values.ndim + 1)
    return (pairs * shares + pairs.flip(1) * (1 - shares)).flatten(0, 1)


def _augmented(frames_BTHWC: Tensor, draws: Draws, config: AugmentConfig, size: tuple[int, int, int]) -> Tensor:
    num_frames, height_px, width_px = size
    frames_BTHWC = _window(frames_BTHWC, draws, num_frames)
    if config.crops:
        boxes_4B = draw_boxes(draws, config, frames_BTHWC.shape[2:4], size[1:])
        frames_BTHWC = _resize(frames_BTHWC, _to_device(boxes_4B, frames_BTHWC.device), height_px, width_px)
    else:
        frames_BTHWC = centre(frames_BTHWC, num_frames=num_frames, height_px=height_px, width_px=width_px)
    if config.flip:
        flipped_B = _to_device(draws.uniform(_FLIP, 1)[0] < config.flip, frames_BTHWC.device)
        frames_BTHWC = torch.where(_spread(flipped_B, 5), frames_BTHWC.flip(3), frames_BTHWC)
    if config.rand_augment[0]:
        operations, magnitude = config.rand_augment
        drawn_B2 = draws.uniform(_RAND_AUGMENT, 2 * operations).T.reshape(-1, 2, operations)
        clips = zip(frames_BTHWC, drawn_B2, strict=True)
        frames_BTHWC = torch.stack([rand_augment(clip, drawn[0], drawn[1], magnitude) for clip, drawn in clips])
    if config.colour_jitter:
        factors_3B = 1 + config.colour_jitter * (2 * draws.uniform(_COLOUR, 3) - 1)
        frames_BTHWC = _change_colours(frames_BTHWC, _to_device(factors_3B, frames_BTHWC.device))
    if config.erasing:
        boxes_4B = draw_erased(draws, config.erasing, height_px, width_px)
        frames_BTHWC = _erase(frames_BTHWC, _to_device(boxes_4B, frames_BTHWC.device))
    return frames_BTHWC


def _window(frames_BTHWC: Tensor, draws: Draws, num_frames: int) -> Tensor:
    """num_frames consecutive frames of each clip, from a drawn start."""
    if not (spare := frames_BTHWC.shape[1] - num_frames):
        return frames_BTHWC
    starts = np.floor(draws.uniform(_TIME, 1)[0] * (spare + 1)).astype(np.int64)
    chosen_BT = _to_device(starts[:, None] + np.arange(num_frames), frames_BTHWC.device)
    return frames_BTHWC[torch.arange(len(starts), device=chosen_BT.device)[:, None], chosen_BT]


def draw_boxes(draws: Draws, config: AugmentConfig, frame: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """Boxes of random resized crops: float64 [4, B] of top, left, height, width in pixels, not rounded.

    The area is uniform, the ratio log-uniform, the place uniform. Inception's recipe (and torchvision's) draws again
    while a box does not fit; here the ratio is drawn from those that fit, which takes no loop.

    Args:
        draws: The clips.
        config: Ranges of scale and ratio.
        frame: Height and width of the frames.
        size: Height and width of the result.
    """
    scale, ratio, down, across = draws.uniform(_CROP, 4)
    zoom = min(frame[0] / size[0], frame[1] / size[1])
    height, width = size[0] * zoom, size[1] * zoom
    area = config.crop_scale[0] + scale * (config.crop_scale[1] - config.crop_scale[0])
    fitting = area * (height / frame[0]) ** 2, (frame[1] / width) ** 2 / area
    low, high = (np.log(np.clip(end, *fitting)) for end in config.crop_ratio)
    ratio = np.exp(low + ratio * (high - low))
    height = np.minimum(height * np.sqrt(area / ratio), frame[0])
    width = np.minimum(width * np.sqrt(area * ratio), frame[1])
    return np.stack([down * (frame[0] - height), across * (frame[1] - width), height, width])


def draw_erased(draws: Draws, probability: float, height_px: int, width_px: int) -> np.ndarray:
    """Boxes to erase: whole numbers [4, B] of top, left, height, width in pixels; 0 high where nothing is erased.

    Area 2 % to 1/3 of the frame and height over width 0.3 to 1 / 0.3, as in the paper (Zhong et al., 2020, algorithm
    1); a box that is too long is cut to the frame instead of drawn again.
    """
    chosen, area, ratio, down, across = draws.uniform(_ERASE, 5)
    area_px = (0.02 + area * (1 / 3 - 0.02)) * height_px * width_px
    ratio = 0.3 ** (1 - 2 * ratio)
    height = np.clip(np.round(np.sqrt(area_px * ratio)), 1, height_px)
    width = np.clip(np.round(np.sqrt(area_px / ratio)), 1, width_px)
    top, left = np.floor(down * (height_px - height + 1)), np.floor(across * (width_px - width + 1))
    return np.stack([top, left, np.where(chosen < probability, height, 0), width])


def _resize(frames_BTHWC: Tensor, boxes_4B: Tensor, height_px: int, width_px: int) -> Tensor:
    """Each clip's box as height_px x width_px pixels, bilinear; where it shrinks, the triangle widens (antialias).

    Two matrix products. Weights are whole numbers up to 2048, pixels whole numbers up to 2040 (3 bits below a level
    are kept in between), so every sum is below 2^24 and exact in float32 in whatever order it is added, in TensorFloat
    too. That, not luck, makes a clip the same in every batch and on every device.
    """
    top_B, left_B, box_height_B, box_width_B = boxes_4B
    rows_BhH = _triangles(top_B, box_height_B, height_px, frames_BTHWC.shape[2])
    columns_BwW = _triangles(left_B, box_width_B, width_px, frames_BTHWC.shape[3])
    wide_BTHwC = torch.einsum("bvw,bthwc->bthvc", columns_BwW, frames_BTHWC.float())
    wide_BTHwC.mul_(8).div_(columns_BwW.sum(-1)[:, None, None, :, None]).round_()
    small_BThwC = torch.einsum("bgh,bthvc->btgvc", rows_BhH, wide_BTHwC)
    return _to_pixels(small_BThwC.div_(8 * rows_BhH.sum(-1)[:, None, :, None, None]))


def _triangles(start_B: Tensor, length_B: Tensor, num_out: int, num_in: int) -> Tensor:
    """Weight of each pixel for each result pixel of a line: float32 [B, num_out, num_in], whole numbers."""
    step_B11 = (length_B / num_out)[:, None, None]
    out_1O1 = torch.arange(num_out, device=start_B.device)[None, :, None] + 0.5
    middle_BO1 = start_B[:, None, None] + out_1O1 * step_B11
    reach_B11 = step_B11.clamp(min=1)
    distance_BOI = (torch.arange(num_in, device=start_B.device) + 0.5 - middle_BO1).abs_()
    return (1 - distance_BOI / reach_B11).clamp_(min=0).mul_(2048 / reach_B11).round_()


def _change_colours(frames_BTHWC: Tensor, factors_3B: Tensor) -> Tensor:
    """Brightness x' = b x, contrast x' = c x + (1 - c) m, saturation x' = s x + (1 - s) grey(x), in this order.

    The three are one affine map, which is clamped and rounded once; torchvision does so after each. m is the mean grey
    of the clip, not of a frame, so that all frames get the same map.
    """
    luma = _to_device(np.array(_LUMA, np.int64), frames_BTHWC.device)
    brightness_B, contrast_B, saturation_B = factors_3B
    sums_BC = frames_BTHWC.sum((1, 2, 3), dtype=torch.int64)
    mean_B = (sums_BC * luma).sum(-1) / (1000 * math.prod(frames_BTHWC.shape[1:4]))
    pixels_BTHWC = frames_BTHWC.float()
    grey_BTHW1 = (pixels_BTHWC * luma).sum(-1, keepdim=True)  # whole numbers, hence exact
    grey_BTHW1.mul_(_spread(brightness_B * contrast_B * (1 - saturation_B) / 1000, 5))
    grey_BTHW1.add_(_spread((1 - contrast_B) * brightness_B * mean_B, 5))
    return _to_pixels(pixels_BTHWC.mul_(_spread(brightness_B * contrast_B * saturation_B, 5)).add_(grey_BTHW1))


def _erase(frames_BTHWC: Tensor, boxes_4B: Tensor) -> Tensor:
    """The box of each clip filled with the clip's mean colour; the paper draws a value for every pixel."""
    num_pixels = math.prod(frames_BTHWC.shape[1:4])
    sums_BC = frames_BTHWC.sum((1, 2, 3), dtype=torch.int64)
    mean_BC = ((2 * sums_BC + num_pixels) // (2 * num_pixels)).to(torch.uint8)
    top_B1, left_B1, height_B1, width_B1 = boxes_4B[:, :, None]
    row_H, column_W = (torch.arange(extent, device=frames_BTHWC.device) for extent in frames_BTHWC.shape[2:4])
    rows_BH = (row_H >= top_B1) & (row_H < top_B1 + height_B1)
    columns_BW = (column_W >= left_B1) & (column_W < left_B1 + width_B1)
    erased_BHW = rows_BH[:, :, None] & columns_BW[:, None, :]
    return torch.where(erased_BHW[:, None, :, :, None], mean_BC[:, None, None, None, :], frames_BTHWC)


def _check(frames_BTHWC: Tensor, size: tuple[int, int, int]) -> None:
    if frames_BTHWC.dtype != torch.uint8:
        raise ValueError(f"frames must be uint8, got {frames_BTHWC.dtype}")
    shape = tuple(frames_BTHWC.shape)
    if len(shape) != 5 or shape[4] != 3 or any(have < want for have, want in zip(shape[1:4], size, strict=True)):
        raise ValueError(f"frames are {shape}; at least [B, {', '.join(map(str, size))}, 3] is needed")


def _samples(samples_B: Sequence[int] | Tensor, num_clips: int) -> tuple[int, ...]:
    samples = tuple(samples_B.tolist() if isinstance(samples_B, Tensor) else map(int, samples_B))
    if len(samples) != num_clips:
        raise ValueError(f"{len(samples)} samples for {num_clips} clips")
    return samples


def _chunks(count: int, values_each: int) -> Iterator[slice]:
    """Slices of a batch whose floats take _CHUNK_BYTES or, if one is larger, one at a time."""
    step = max(1, _CHUNK_BYTES // (4 * values_each))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Numbers as tensors; real ones as float32."""
    tensor = torch.from_numpy(values)
    return sent(tensor.float() if tensor.is_floating_point() else tensor, device)


def _spread(values_B: Tensor, ndim: int) -> Tensor:
    """[B] as [B, 1, 1, ...]."""
    return values_B.view(-1, *[1] * (ndim - 1))


def _to_pixels(values: Tensor) -> Tensor:
    """Floats to the nearest uint8, in place but for the last step."""
    return values.round_().clamp_(0, 255).to(torch.uint8)
