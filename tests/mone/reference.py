"""A second ViViT, from the state dict and torch operations: tokens in their original order, masks, and loops."""

import math

import torch
from torch import Tensor

from mone.config import ModelConfig
from mone.model import ViViT
from tests.mone.conftest import slow_routing

State = dict[str, Tensor]
# Who attends, and to whom: rows of a sequence.
Frames = list[tuple[list[int], list[int]]]


def reference(
    model: ViViT, patches: Tensor, counts: tuple[int, ...] | None = None, kept: list[int] | None = None
) -> Tensor:
    """Logits [C] of one clip; without counts all tokens are at the last expert.

    Patches are [F, N, P], or [K, P] with the places of those that were kept.
    """
    state, config = model.state_dict(), model.config
    num_places = config.num_indices * config.num_tokens
    places = list(range(num_places)) if kept is None else kept
    x = linear(state, "embed", patches.reshape(len(places), -1).double() / 127.5 - 1)
    x = x + torch.stack([state["encoder.position_ND"][p % len(state["encoder.position_ND"])] for p in places])

    scores = torch.exp(linear(state, "encoder.router", x))
    probabilities = scores / scores.sum(-1, keepdim=True)
    experts = experts_of(config, probabilities, places, counts, kept is None)
    present = [row for row, expert in enumerate(experts) if expert >= 0]
    frames = frames_of(config, places, present)
    rows = len(places) + (len(frames) if config.pooling == "cls" else 0)
    widths = torch.tensor([config.widths[expert] for expert in experts] + [config.dim] * (rows - len(places)))
    mask = (torch.arange(config.dim) < widths[:, None]).double()
    weights = torch.zeros(rows, 1, dtype=torch.float64)
    for row, expert in enumerate(experts):
        weights[row] = probabilities[row, expert]
    x = torch.cat([x, *[state["encoder.class_token_KD"]] * (rows - len(places))])
    for index, alpha in enumerate(state["encoder.alpha_L"]):
        x = block(state, f"encoder.blocks.{index}", config, x, frames, mask, alpha * weights + 1)
    pooled = list(x[len(places) :]) if config.pooling == "cls" else [x[members].mean(0) for _, members in frames]
    x = layer_norm(state, "encoder.norm", torch.stack(pooled), config.norm_eps)
    if not config.temporal_depth:
        return linear(state, "head", x.mean(0))
    x = torch.cat([state["temporal.class_token_KD"], x + state["temporal.position_FD"]])
    everyone = list(range(len(x)))
    for index in range(config.temporal_depth):
        x = block(state, f"temporal.blocks.{index}", config, x, [(everyone, everyone)], 1.0, 1.0)
    return linear(state, "head", layer_norm(state, "temporal.norm", x, config.norm_eps)[0])


def experts_of(
    config: ModelConfig, probabilities: Tensor, places: list[int], counts: tuple[int, ...] | None, all_there: bool
) -> list[int]:
    """Expert of each token, -1 where it is left out."""
    if counts is None:
        return [config.num_experts - 1] * len(places)
    size = config.num_tokens if config.budget == "frame" and all_there else len(places)
    experts = []
    for start in range(0, len(places), size):
        rest = size - sum(counts)  # left out: what algorithm 1 would give the smallest expert
        chosen = slow_routing(probabilities[start : start + size].tolist(), (counts[0] + rest, *counts[1:]))
        experts += [-1 if rest and expert == 0 else expert for expert in chosen]
    return experts


def frames_of(config: ModelConfig, places: list[int], present: list[int]) -> Frames:
    """Queries and keys of each frame: the keys are the last token up to this frame of each place."""
    num_tokens = config.num_tokens
    if config.encoder == "joint":
        frames = [(list(present), list(present))]
    else:
        frames, shown = [], {}
        for f in range(config.num_indices):
            queries = [row for row in present if places[row] // num_tokens == f]
            if len(present) < len(places):
                shown = {}  # tokens that were left out have nobody to stand for them
            shown |= {places[row] % num_tokens: row for row in queries}
            frames.append((queries, [shown[n] for n in sorted(shown)]))
    if config.pooling == "cls":
        for f, (queries, keys) in enumerate(frames):
            frames[f] = ([len(places) + f, *queries], [len(places) + f, *keys])
    return frames


def block(
    state: State, name: str, config: ModelConfig, x: Tensor, frames: Frames, mask: Tensor | float, gain: Tensor | float
) -> Tensor:
    """One pre-norm block on rows [N, D]; mask is 0 on the features that a row's expert lacks."""
    normal = layer_norm(state, f"{name}.norm_attention", x, config.norm_eps)
    q, k, v = linear(state, f"{name}.attention.qkv", mask * normal).chunk(3, -1)
    mixed = torch.zeros_like(x)
    for queries, keys in frames:
        for columns in torch.arange(x.shape[-1]).chunk(config.num_heads):
            scores = torch.exp(q[queries][:, columns] @ k[keys][:, columns].T / math.sqrt(len(columns)))
            mixed[torch.tensor(queries)[:, None], columns] = scores / scores.sum(-1, keepdim=True) @ v[keys][:, columns]
    z = x + mask * linear(state, f"{name}.attention.out", mixed)
    hidden = linear(state, f"{name}.mlp.up", mask * layer_norm(state, f"{name}.norm_mlp", z, config.norm_eps))
    return z + gain * mask * linear(state, f"{name}.mlp.down", activate(config, hidden))


def activate(config: ModelConfig, x: Tensor) -> Tensor:
    if config.activation == "gelu_tanh":
        return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))


def layer_norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return normal * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]
