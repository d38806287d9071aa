"""On a GPU, clips are answered as each by itself would be, however many come together."""

import os

import numpy as np
import pytest
import torch

from mone.checkpoint import read_checkpoint, save_checkpoint
from mone.config import preset
from mone.model import ViViT
from mone.static import kept_patches
from pipelines.predict import Annotator
from pipelines.tokenize import Tokens

pytestmark = pytest.mark.gpu
# Sums in another order, in bfloat16; answers differ by more than twice as much.
_ROUNDING = 4e-2
CONFIG = preset("tiny", num_classes=7, num_frames=8, height_px=112, width_px=112)


@pytest.fixture(autouse=True)
def _gpu():
    if not torch.cuda.is_available() and os.environ.get("REQUIRE_GPU") != "1":
        pytest.skip("no GPU")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = ViViT(CONFIG)
    torch.nn.init.normal_(model.head.weight)  # or all answers would be alike
    return read_checkpoint(save_checkpoint(model, list("abcdefg"), tmp_path_factory.mktemp("model")))


def clips_of(count: int, views: int = 1, kept: int = 0) -> Tokens:
    shape = (views, kept) if kept else (views, CONFIG.num_indices, CONFIG.num_tokens)
    rng = np.random.default_rng(count)
    clips = [rng.integers(0, 256, (*shape, CONFIG.patch_values), np.uint8) for _ in range(count)]
    whole = rng.integers(0, 256, (CONFIG.num_indices, CONFIG.num_tokens, CONFIG.patch_values), np.uint8)
    places_K = kept_patches(whole, 0)[:kept].astype(np.int64)
    return Tokens(list(range(count)), clips, np.stack([places_K] * count) if kept else None)


@pytest.mark.parametrize("views, kept", [(1, 0), (3, 0), (1, 100)])
@pytest.mark.parametrize("count", [1, 5, 8, 19])
def test_answers_do_not_depend_on_who_comes_along(checkpoint, count, views, kept):
    annotator = Annotator(checkpoint, 0.4, 3, device="cuda", batch_size=8)
    tokens = clips_of(count, views, kept)
    for _ in range(2):  # the second time from a graph
        together = annotator.probabilities(tokens, 0.4)
    alone = [annotator.probabilities(tokens.slice(row, row + 1), 0.4, batch_size=1) for row in range(count)]
    assert together.shape == (count, 7)
    np.testing.assert_allclose(together, np.concatenate(alone), atol=_ROUNDING)
    model, kept_BK = annotator.model, None if tokens.kept_BK is None else torch.from_numpy(tokens.kept_BK).cuda()
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        logits = model(torch.from_numpy(tokens.patches).cuda().flatten(0, 1), 0.4, kept_BK=kept_BK).logits_BC
    expected = logits.float().softmax(-1).unflatten(0, (count, views)).mean(1).cpu().numpy()
    np.testing.assert_allclose(together, expected, atol=_ROUNDING)
    assert count == 1 or np.ptp(together, axis=0).max() > 0.1
