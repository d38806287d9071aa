"""Generated motions as training clips in memory, uint8."""

import functools
import multiprocessing
import tempfile

import numpy as np
import torch
from tqdm import tqdm

from mone.clips import MemoryClips
from pipelines.synthetic import MOTIONS, render, split_seeds
from pipelines.view import View


def motions(split: str, count: int, view: View, *, num_workers: int | None = None) -> MemoryClips:
    """Render `count` motions of a split, in as many processes as there are cores.

    Half of the training clips have full clutter, as all held-out ones do; the other half are easier, evenly down to
    none, because nothing is learnt from the hard ones alone.
    """
    seeds = split_seeds(split, count)
    shape = (count, view.num_frames, view.height_px, view.width_px, 3)
    # Workers write into one mapped file: gigabytes would queue at a pipe. Its name goes now, its pages with the tensor.
    with tempfile.NamedTemporaryFile() as file, multiprocessing.get_context("spawn").Pool(num_workers) as pool:
        frames_STHWC = np.memmap(file.name, np.uint8, "w+", shape=shape)
        into = functools.partial(_render_into, path=file.name, shape=shape, eased=split == "train")
        rendered = pool.imap_unordered(into, enumerate(seeds), chunksize=16)
        for _ in tqdm(rendered, f"render {split}", count, unit="clip", mininterval=2):
            pass
    labels_S = torch.tensor([seed % len(MOTIONS) for seed in seeds])
    return MemoryClips(torch.from_numpy(frames_STHWC), labels_S)


def _render_into(place: tuple[int, int], path: str, shape: tuple[int, ...], eased: bool) -> None:
    row, seed = place
    easier = np.random.default_rng(seed).uniform(-1, 1) if eased else 0.0
    clip = render(seed, num_frames=shape[1], size_px=shape[2], clutter=1.0 - max(0.0, easier))
    np.memmap(path, np.uint8, "r+", shape=shape)[row] = clip.frames
