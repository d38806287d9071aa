"""Generated motions as training clips in memory, uint8; and where in them things move.

Shapes: S clips, T frames, H x W pixels, F temporal indices, N tokens per index.
"""

import functools
import tempfile

import numpy as np
import torch
from einops import reduce
from torch import Tensor
from tqdm import tqdm

from mone.clips import MemoryClips
from mone.config import ModelConfig
from pipelines.processes import processes
from pipelines.synthetic import MOTIONS, render, split_seeds
from pipelines.view import View

# A patch is moving where so many of its pixels are.
_MOVING_SHARE = 0.05
# Clips that a process renders at a time: some tenths of a second of work.
_CHUNK_CLIPS = 16


def motions(split: str, count: int, view: View, *, num_workers: int | None = None) -> MemoryClips:
    """Render `count` motions of a split, in as many processes as there are cores.

    Half of the training clips have full clutter, as all held-out ones do; the other half are easier, evenly down to
    none, because nothing is learnt from the hard ones alone.
    """
    seeds = split_seeds(split, count)
    shape = (count, view.num_frames, view.height_px, view.width_px, 3)
    # Workers write into one mapped file: gigabytes would queue at a pipe. Its name goes now, its pages with the tensor.
    with tempfile.NamedTemporaryFile() as file, processes(-(-count // _CHUNK_CLIPS), num_workers) as pool:
        frames_STHWC = np.memmap(file.name, np.uint8, "w+", shape=shape)
        into = functools.partial(_render_into, path=file.name, shape=shape, eased=split == "train")
        rendered = pool.imap_unordered(into, enumerate(seeds), chunksize=_CHUNK_CLIPS)
        for _ in tqdm(rendered, f"render {split}", count, unit="clip", mininterval=2):
            pass
    labels_S = torch.tensor([seed % len(MOTIONS) for seed in seeds])
    return MemoryClips(torch.from_numpy(frames_STHWC), labels_S)


def _render_into(place: tuple[int, int], path: str, shape: tuple[int, ...], eased: bool) -> None:
    row, seed = place
    easier = np.random.default_rng(seed).uniform(-1, 1) if eased else 0.0
    clip = render(seed, num_frames=shape[1], size_px=shape[2], clutter=1.0 - max(0.0, easier))
    np.memmap(path, np.uint8, "r+", shape=shape)[row] = clip.frames


def motions_moving(split: str, count: int, config: ModelConfig, *, num_workers: int | None = None) -> Tensor:
    """Which patches of the clips of `motions` lie on a moving object, bool [S, F, N]; for held-out splits.

    Raises:
        ValueError: The training split, whose clips differ in clutter.
    """
    if split == "train":
        raise ValueError("where things move is known of the held-out splits, not of 'train'")
    seeds = split_seeds(split, count)
    with processes(-(-count // _CHUNK_CLIPS), num_workers) as pool:
        moving = pool.imap(functools.partial(_moving, config=config), seeds, chunksize=_CHUNK_CLIPS)
        masks = [*tqdm(moving, f"motion of {split}", count, unit="clip", mininterval=2)]
    return torch.from_numpy(np.stack(masks))


def _moving(seed: int, config: ModelConfig) -> np.ndarray:
    return moving_patches(render(seed, num_frames=config.num_frames, size_px=config.height_px).moving, config)


def moving_patches(moving_THW: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Patches of which at least 5 % of the pixels, over all frames of the tubelet, lie on a moving object.

    Args:
        moving_THW: bool, of the config's size (`MotionClip.moving`).
        config: How frames are cut into patches.

    Returns:
        bool [F, N].
    """
    sizes = {"t": config.tubelet_frames, "p": config.tubelet_px, "q": config.tubelet_px}
    share_FN = reduce(moving_THW.astype(np.float64), "(f t) (h p) (w q) -> f (h w)", "mean", **sizes)
    return share_FN >= _MOVING_SHARE
