"""The transformer block of nested experts: attention, MLP, and the residual branches around them.

Shapes: S sequences, N tokens, D model features, F temporal indices, M slots of a frame, B clips,
K patches of a clip that were kept.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mone.config import ModelConfig
from mone.nested import NestedIn, NestedOut, Segments


class Neighbours(NamedTuple):
    """Who attends to whom, where a sequence holds the tokens of several frames that attend each within itself.

    Attributes:
        slot_SFM: int64. The row of the sequence that fills slot m of frame f. A row can fill slots of several frames: a
            patch that did not change stands for itself until it does.
        home_SN: int64. The slot f M + m whose result a row takes back.
    """

    slot_SFM: Tensor
    home_SN: Tensor

    def split(self, x_SNX: Tensor) -> Tensor:
        """Rows [S, N, X] to frames [S F, M, X]."""
        return take(x_SNX, self.slot_SFM.flatten(1)).reshape(-1, self.slot_SFM.shape[-1], x_SNX.shape[-1])

    def join(self, x_GMX: Tensor) -> Tensor:
        """Frames [S F, M, X] to rows [S, N, X]."""
        num_frames, num_slots = self.slot_SFM.shape[1:]
        return take(x_GMX.reshape(-1, num_frames * num_slots, x_GMX.shape[-1]), self.home_SN)


def last_kept(kept_BK: Tensor, num_indices: int, num_tokens: int) -> Tensor:
    """Which of the kept patches stands for each place, int64 [B, F, N] in [0, K): the last one up to that frame.

    Args:
        kept_BK: Ascending places f N + n; all places of the first frame are among them.
        num_indices: F.
        num_tokens: N.
    """
    batch, num_kept = kept_BK.shape
    index_K = torch.arange(num_kept, device=kept_BK.device)
    index_BFN = kept_BK.new_full((batch, num_indices * num_tokens), -1).scatter(1, kept_BK, index_K.expand_as(kept_BK))
    # Places ascend, so of one token's indices the latest is the largest.
    return index_BFN.unflatten(1, (num_indices, num_tokens)).cummax(dim=1).values


def take(x_SNX: Tensor, index_SK: Tensor) -> Tensor:
    """Rows of each sequence by index: [S, N, X], int64 [S, K] -> [S, K, X]."""
    return x_SNX.gather(1, index_SK.unsqueeze(-1).expand(-1, -1, x_SNX.shape[-1]))


class Attention(nn.Module):
    """Multi-head self-attention SA_j whose projections are nested; scores and values use all D features (A.1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.qkv = NestedIn(config.dim, 3 * config.dim)
        self.out = NestedOut(config.dim, config.dim)

    def forward(self, x_SND: Tensor, segments: Segments, neighbours: Neighbours | None = None) -> Tensor:
        """[S, N, D] -> [S, N, D], zero past each token's width. Without neighbours a sequence attends to itself."""
        qkv_SNX = self.qkv(x_SND, segments)
        if neighbours:
            qkv_SNX = neighbours.split(qkv_SNX)
        qkv = rearrange(qkv_SNX, "s n (three h k) -> three s h n k", three=3, h=self.num_heads)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0), dropout_p=self.dropout if self.training else 0.0)
        mixed_SND = rearrange(mixed, "s h n k -> s n (h k)")
        if neighbours:
            mixed_SND = neighbours.join(mixed_SND)
        return self.out(mixed_SND, segments)


class MLP(nn.Module):
    """Feed-forward FFN_j: width d in, full hidden width, width d out (A.1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = NestedIn(config.dim, config.mlp_ratio * config.dim)
        self.down = NestedOut(config.mlp_ratio * config.dim, config.dim)
        self.activation = nn.GELU("tanh" if config.activation == "gelu_tanh" else "none")

    def forward(self, x_SND: Tensor, segments: Segments) -> Tensor:
        """[S, N, D] -> [S, N, D], zero past each token's width."""
        return self.down(self.activation(self.up(x_SND, segments)), segments)


class Branch(nn.Module):
    """What happens to a branch's output in training: dropout, and stochastic depth per sequence."""

    def __init__(self, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.dropout, self.drop_path = dropout, drop_path

    def forward(self, x_SND: Tensor) -> Tensor:
        """[S, N, D] -> [S, N, D]; the identity in evaluation."""
        return self.thin(x_SND, self.draw_kept(x_SND))

    def draw_kept(self, x_SND: Tensor) -> Tensor | None:
        """Factors [S, 1, 1] of mean 1 that are 0 for sequences whose branch is skipped; None where none are."""
        if not (self.training and self.drop_path):
            return None
        kept_S11 = torch.rand(x_SND.shape[0], 1, 1, device=x_SND.device) >= self.drop_path
        return kept_S11 / (1 - self.drop_path)

    def thin(self, x_SND: Tensor, kept_S11: Tensor | None) -> Tensor:
        """Dropout, and the factors of `draw_kept`."""
        if self.training and self.dropout:
            x_SND = F.dropout(x_SND, self.dropout)
        return x_SND if kept_S11 is None else x_SND * kept_S11.to(x_SND.dtype)


class Block(nn.Module):
    """Pre-norm transformer block of nested experts (MoNE equation 1).

    The paper leaves the place of LayerNorm open; here it sees all D features of every token before each branch. (Over
    the first d alone, every width would scale the same features differently. At full width both are the plain block.)
    """

    def __init__(self, config: ModelConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.norm_mlp = nn.LayerNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)
        self.branch = Branch(config.dropout, drop_path)

    def forward(
        self,
        x_SND: Tensor,
        segments: Segments,
        gain_SN1: Tensor | float = 1.0,
        neighbours: Neighbours | None = None,
    ) -> Tensor:
        """Compute z = x + SA_j(x) and x' = z + gain FFN_j(z), where gain is alpha r_j + 1 for routed tokens."""
        z_SND = x_SND + self.branch(self.attention(self.norm_attention(x_SND), segments, neighbours))
        return z_SND + self.branch(gain_SN1 * self.mlp(self.norm_mlp(z_SND), segments))


def make_blocks(config: ModelConfig, depth: int) -> nn.ModuleList:
    """Blocks whose stochastic depth grows linearly up to the config's."""
    return nn.ModuleList(Block(config, config.drop_path * (index + 1) / depth) for index in range(depth))
