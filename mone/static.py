"""Static patches: run-length tokens (RLT, Choudhury et al., 2024), decided on uint8 before anything ships or computes.

A patch that shows what its place showed before is dropped; the last one that was kept stands for it. In a factorised
encoder, whose frames share their position embeddings, it keeps answering attention in the later frames: its key and
value would be the same there but for what its neighbours changed, so dropping is nearly free of error. A joint encoder
sees fewer tokens, as in RLT.

Shapes: F temporal indices, N tokens per index, P values per patch, K patches kept. NumPy only, as decoding workers are.
"""

import numpy as np

# Numbers of kept patches that a clip can have: 1/32, 2/32, ... of all. Clips of one size run together with static
# shapes and no padding; rounding up costs 1/64 of the patches on average.
LEVELS = 32


def kept_patches(patches_FNP: np.ndarray, threshold: float) -> np.ndarray:
    """Places f N + n of the patches to keep, int64 [K], ascending.

    A patch is static where its mean absolute difference from the last kept patch of its place is at most the
    threshold. RLT compares with the frame before; against the last one kept, a slow change cannot go unseen. K is
    rounded up to a level by keeping the most changed of the static ones. (Such a patch stands for the dropped ones that
    follow it at its place, which are then within twice the threshold of it.)

    Args:
        patches_FNP: uint8 patches of one clip.
        threshold: In grey levels of 255. 0 drops exact repeats only.

    Raises:
        ValueError: A threshold that is no grey level.
    """
    if not 0 <= threshold <= 255:
        raise ValueError(f"threshold must be between 0 and 255 grey levels, got {threshold}")
    num_indices, num_tokens, _ = patches_FNP.shape
    change_FN = np.full((num_indices, num_tokens), np.inf)
    shown_NP = patches_FNP[0].astype(np.int16)
    for change_N, patches_NP in zip(change_FN[1:], patches_FNP[1:].astype(np.int16), strict=True):
        change_N[:] = np.abs(patches_NP - shown_NP).mean(-1)
        changed_N = change_N > threshold
        shown_NP[changed_N] = patches_NP[changed_N]
    level = -(-change_FN.size // LEVELS)
    num_kept = min(change_FN.size, -(-int((change_FN > threshold).sum()) // level) * level)
    return np.sort(np.argsort(-change_FN, axis=None, kind="stable")[:num_kept])
