"""Before the blocks: a router's scores in one reading of the tokens, and Expert Preferred Routing in one launch.

Shapes: B clips or sequences, K and N tokens of them, P positions, D model features, E experts.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from mone.engine.kernels.gemm import num_processors
from mone.engine.tokens import Positions

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

# All pairs of a sequence's tokens are compared, which beyond this takes longer than to sort.
MOST_TOKENS = 512
# Of one warp each, on a processor.
_SCORING = 16


@triton.jit
def _score(
    x_ptr, position_ptr, place_ptr, weight_ptr, bias_ptr, logits_ptr,
    num_tokens, num_positions,
    DIM: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < DIM
    weights = ()
    for expert in tl.static_range(EXPERTS):
        weights += (tl.load(weight_ptr + expert * DIM + column, mask=inside, other=0.0).to(tl.float32),)
    for token in range(tl.program_id(0).to(tl.int64), num_tokens, tl.num_programs(0)):
        place = tl.load(place_ptr + token) if PLACED else token
        x = tl.load(x_ptr + token * DIM + column, mask=inside, other=0.0)
        x = (x + tl.load(position_ptr + place % num_positions * DIM + column, mask=inside, other=0.0)).to(tl.float32)
        for expert in tl.static_range(EXPERTS):
            logit = tl.sum(x * weights[expert], axis=0) + tl.load(bias_ptr + expert).to(tl.float32)
            tl.store(logits_ptr + token * EXPERTS + expert, logit)


def score(x_BKD: Tensor, positions: Positions, weight_ED: Tensor, bias_E: Tensor) -> Tensor:
    """A linear router's logits float32 [B, K, E] of tokens with their positions, which are nowhere written.

    Args:
        x_BKD: Tokens.
        positions: Theirs.
        weight_ED: Of the router.
        bias_E: Of the router.
    """
    (table_PD, place_BK), dim = positions, x_BKD.shape[2]
    logits_BKE = x_BKD.new_empty((*x_BKD.shape[:2], len(bias_E)), dtype=torch.float32)
    num_tokens = x_BKD.shape[0] * x_BKD.shape[1]
    _score[(min(num_tokens, _SCORING * num_processors(x_BKD.device)),)](
        *(x_BKD.contiguous(), table_PD, x_BKD if place_BK is None else place_BK.contiguous()),
        *(weight_ED, bias_E, logits_BKE, num_tokens, len(table_PD)),
        DIM=dim,
        BLOCK=triton.next_power_of_2(dim),
        EXPERTS=len(bias_E),
        PLACED=place_BK is not None,
        num_warps=1,
    )
    return logits_BKE


@triton.jit
def _bits(at, mask, STEP: tl.constexpr, EXPERTS: tl.constexpr, CUMULATIVE: tl.constexpr):
    """How much the expert that chooses in this step wants tokens; bits of positive numbers are in their order.

    As in a sort, what is not a number counts as the largest.
    """
    wanted = tl.load(at + EXPERTS - 1 - STEP, mask=mask, other=0.0)
    if CUMULATIVE:
        for larger in tl.static_range(EXPERTS - STEP, EXPERTS):
            wanted += tl.load(at + larger, mask=mask, other=0.0)
    return tl.where(wanted == wanted, wanted, float("inf")).to(tl.int32, bitcast=True)


@triton.jit
def _prefer(
    probability_ptr, share_ptr, order_ptr, expert_ptr, weight_ptr,
    num_tokens, num_routed,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, EXPERTS: tl.constexpr, CUMULATIVE: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    probability_ptr += sequence * num_tokens * EXPERTS
    expert_ptr += sequence * num_tokens
    token = tl.arange(0, BLOCK)
    known = token < num_tokens
    at = probability_ptr + token * EXPERTS
    weight = tl.load(at, mask=known, other=0.0)
    expert_of = tl.full((BLOCK,), -1, dtype=tl.int64)
    for step in tl.static_range(EXPERTS):
        expert = EXPERTS - 1 - step
        free = known & (expert_of < 0)
        if expert > 0:
            tl.store(expert_ptr + token, expert_of, mask=known)
            tl.debug_barrier()  # the others of the program read it
            bits = _bits(at, known, step, EXPERTS, CUMULATIVE)
            rank = tl.zeros((BLOCK,), dtype=tl.int32)
            for start in range(0, num_tokens, CHUNK):
                rival = start + tl.arange(0, CHUNK)
                is_rival = rival < num_tokens
                is_free = tl.load(expert_ptr + rival, mask=is_rival, other=0) < 0
                theirs = _bits(probability_ptr + rival * EXPERTS, is_rival, step, EXPERTS, CUMULATIVE)
                # Of equals the earlier token is ahead.
                ahead = tl.where(is_free, theirs, -2)[None, :] + (rival[None, :] < token[:, None]).to(tl.int32)
                rank += tl.sum((ahead > bits[:, None]).to(tl.int32), axis=1)
            tl.debug_barrier()
        else:  # takes what is left, in order
            rank = tl.cumsum(free.to(tl.int32), axis=0) - 1
        count = tl.load(share_ptr + 2 * expert)
        first = tl.load(share_ptr + 2 * expert + 1)
        chosen = free & (rank < count)
        tl.store(order_ptr + sequence * num_routed + first + rank, token.to(tl.int64), mask=chosen)
        expert_of = tl.where(chosen, expert, expert_of)
        weight = tl.where(chosen, tl.load(at + expert, mask=known, other=0.0), weight)
    tl.store(expert_ptr + token, expert_of, mask=known)
    tl.store(weight_ptr + sequence * num_tokens + token, weight, mask=known)


def prefer(
    probabilities_BNE: Tensor, counts: tuple[int, ...], *, cumulative: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Order, expert and weight of a `RoutingPlan`, as `routing.expert_preferred_routing` has them.

    Args:
        probabilities_BNE: float32, of at most `MOST_TOKENS` tokens.
        counts: Tokens of each expert.
        cumulative: As there.
    """
    batch, num_tokens, num_experts = probabilities_BNE.shape
    order_BN = probabilities_BNE.new_empty((batch, sum(counts)), dtype=torch.int64)
    expert_BN = probabilities_BNE.new_empty((batch, num_tokens), dtype=torch.int64)
    weight_BN = torch.empty_like(expert_BN, dtype=torch.float32)
    _prefer[(batch,)](
        *(probabilities_BNE.contiguous(), _shares(counts, order_BN.device), order_BN, expert_BN, weight_BN),
        *(num_tokens, order_BN.shape[1]),
        BLOCK=max(16, triton.next_power_of_2(num_tokens)),
        CHUNK=32,
        EXPERTS=num_experts,
        CUMULATIVE=cumulative,
        num_warps=8,
    )
    return order_BN, expert_BN, weight_BN


@functools.lru_cache(maxsize=256)
def _shares(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Tokens of each expert, and where they begin in the order."""
    shares = [(count, sum(counts[:expert])) for expert, count in enumerate(counts)]
    with torch.inference_mode(False):
        return torch.tensor(shares, dtype=torch.int32, device=device)
