"""Small models and inputs that the tests share, and the slow form of the routing algorithm."""

import torch
import torch.nn.functional as F
from hypothesis import settings
from torch import Tensor

from mone.config import ModelConfig
from mone.model import ViViT
from mone.routing import LearnedRouter

settings.register_profile("mone", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("mone")


def pytest_runtest_setup() -> None:
    torch.set_num_threads(1)  # tensors here are too small for more
    torch.manual_seed(0)


class Router64(LearnedRouter):
    """The learned router without its rounding to float32, so that float64 oracles see float64 all the way."""

    def forward(self, tokens_BND: Tensor, patches_BNP: Tensor) -> Tensor:
        return F.linear(tokens_BND, self.weight, self.bias).softmax(dim=-1)


def small_config(**changes) -> ModelConfig:
    """2 temporal indices of 3 x 4 tokens; capacity 0.4 splits them (5, 3, 2, 2)."""
    sizes = {"num_classes": 5, "num_frames": 4, "height_px": 12, "width_px": 16, "tubelet_px": 4}
    sizes |= {"dim": 32, "num_heads": 4, "depth": 2, "temporal_depth": 2}
    return ModelConfig(**(sizes | changes))


def small_model(config: ModelConfig, *, alpha: float = 0.0, seed: int = 0, dtype: torch.dtype = torch.float64) -> ViViT:
    """A model in which no parameter is at a special value; its blocks have the alphas alpha, alpha / 2, ..."""
    model = ViViT(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.shape[-1] ** -0.5 if name.endswith("weight") and parameter.dim() == 2 else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + ("norm" in name))
        model.encoder.alpha_L.copy_(alpha / torch.arange(1, config.depth + 1))
    if dtype == torch.float64 and config.router == "learned":
        model.encoder.router.__class__ = Router64
    return model.to(dtype)


def some_patches(config: ModelConfig, batch: int = 2, seed: int = 0) -> Tensor:
    """Noise uint8 [B, F, N, P]."""
    shape = (batch, config.num_indices, config.num_tokens, config.patch_values)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


JOINT = {"encoder": "joint", "temporal_depth": 0}
# Every way to encode a clip and to spend a capacity.
VARIANTS = {
    "factorised": {},
    "factorised, mean": {"pooling": "mean"},
    "joint": JOINT,
    "joint, mean": {**JOINT, "pooling": "mean"},
    "clip budget": {"budget": "clip"},
    "clip budget, mean": {"budget": "clip", "pooling": "mean"},
    "joint, clip budget": {**JOINT, "budget": "clip"},
    "frame average": {"temporal_depth": 0},
    "motion": {"router": "motion"},
    "random": {"router": "random"},
    "uniform": {"allocation": "uniform"},
    "proportionate": {"allocation": "proportionate"},
    "submodel": {"allocation": "submodel"},
    "token drop": {"allocation": "token_drop", "router": "random"},
    "joint token drop": {**JOINT, "allocation": "token_drop", "pooling": "mean"},
    "tome": {"allocation": "tome"},
    "joint tome, mean": {**JOINT, "allocation": "tome", "pooling": "mean"},
    "kept": {"kept": 15},
    "kept, mean": {"kept": 15, "pooling": "mean"},
    "joint, kept": {**JOINT, "kept": 15},
    "motion, kept, centred": {"kept": 15, "router": "motion", "pixels": "centred"},
}


def variant(name: str, **changes) -> tuple[ModelConfig, int | None]:
    """A config of VARIANTS, and how many patches of its clips are kept where static ones are dropped."""
    changes = {**VARIANTS[name], **changes}
    num_kept = changes.pop("kept", None)
    return small_config(**changes), num_kept


def some_inputs(config: ModelConfig, num_kept: int | None, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of the model: noise, of which each clip keeps other places than its neighbours."""
    patches = some_patches(config, batch, seed)
    if num_kept is None:
        return {"patches": patches}
    generator = torch.Generator().manual_seed(seed)
    first, others = config.num_tokens, (config.num_indices - 1) * config.num_tokens
    later = [torch.randperm(others, generator=generator)[: num_kept - first] + first for _ in range(batch)]
    kept_BK = torch.stack([torch.cat([torch.arange(first), places.sort().values]) for places in later])
    return {"patches": keep(patches, kept_BK), "kept_BK": kept_BK}


def keep(patches_BFNP: Tensor, kept_BK: Tensor) -> Tensor:
    """The patches at these places, [B, K, P]."""
    return torch.stack([clip[kept] for clip, kept in zip(patches_BFNP.flatten(1, 2), kept_BK, strict=True)])


def slow_routing(probabilities: list[list[float]], counts: tuple[int, ...]) -> list[int]:
    """MoNE algorithm 1 for one sequence, with loops: the expert of each token."""
    free, expert_of = list(range(len(probabilities))), {}
    for expert in range(len(counts) - 1, 0, -1):
        for _ in range(counts[expert]):
            best = free[0]
            for token in free:
                if probabilities[token][expert] > probabilities[best][expert]:
                    best = token
            expert_of[best] = expert
            free.remove(best)
    return [expert_of.get(token, 0) for token in range(len(probabilities))]
