"""From one number, the effective capacity e_c, to how many tokens each expert takes (MoNE section 4.3)."""

import math
from functools import lru_cache
from typing import Literal

# How a capacity becomes tokens per expert; `token_counts` says what each means.
Allocation = Literal["mone", "uniform", "proportionate", "submodel", "token_drop", "tome"]

# The paper's settings of the allocation problem.
ENTROPY_WEIGHT = 10.0  # beta
PREFERENCE_BASE = 2.0  # delta


def relative_widths(num_experts: int) -> tuple[float, ...]:
    """d_i / D for experts that halve: 2^(1-E), ..., 1/2, 1."""
    return tuple(2.0 ** (index + 1 - num_experts) for index in range(num_experts))


def check_capacity(capacity: float, num_experts: int) -> None:
    """Refuse an effective capacity that no split of the tokens can have.

    Raises:
        ValueError: Outside [d_1 / D, 1], with the range.
    """
    smallest = relative_widths(num_experts)[0]
    if not smallest <= capacity <= 1.0:
        raise ValueError(f"capacity must be between {smallest:g} and 1 for {num_experts} experts, got {capacity:g}")


@lru_cache(maxsize=1024)
def expert_shares(capacity: float, num_experts: int) -> tuple[float, ...]:
    """Shares c_1, ..., c_E of the tokens, smallest expert first, that sum to 1 and average to the capacity.

    Maximises sum_i c_i / delta^(i-1) + beta H(c) subject to sum c = 1 and sum c_i d_i / D = e_c (MoNE section 4.3,
    beta 10, delta 2). The paper calls SLSQP; the stationary point has the form c_i ~ exp((w_i + lambda d_i / D) / beta)
    with w_i = delta^(1-i), in which the capacity grows monotonically with lambda, so one bisection solves it. The
    sign and direction of the preference term are ambiguous in print; i counts from the smallest expert here, and the
    other readings move no share by more than 0.014.

    Raises:
        ValueError: A capacity outside [d_1 / D, 1].
    """
    check_capacity(capacity, num_experts)
    widths = relative_widths(num_experts)
    if num_experts == 1 or capacity == 1.0:
        return (0.0,) * (num_experts - 1) + (1.0,)
    if capacity == widths[0]:
        return (1.0,) + (0.0,) * (num_experts - 1)
    low, high = -1e6, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        shares = _stationary_shares(middle, widths)
        if sum(share * width for share, width in zip(shares, widths, strict=True)) < capacity:
            low = middle
        else:
            high = middle
    return _stationary_shares((low + high) / 2, widths)


def _stationary_shares(multiplier: float, widths: tuple[float, ...]) -> tuple[float, ...]:
    exponents = [(PREFERENCE_BASE**-index + multiplier * width) / ENTROPY_WEIGHT for index, width in enumerate(widths)]
    largest = max(exponents)
    weights = [math.exp(exponent - largest) for exponent in exponents]
    return tuple(weight / sum(weights) for weight in weights)


@lru_cache(maxsize=4096)
def token_counts(
    capacity: float, num_tokens: int, num_experts: int, allocation: Allocation = "mone"
) -> tuple[int, ...]:
    """Tokens n_1, ..., n_E of each expert, smallest first.

    The only rounding of the whole system: n_j = floor(c_j N) for every expert but the smallest, which takes what is
    left (MoNE algorithm 1). The floor makes the realised capacity at most the asked one.

    Args:
        capacity: Effective capacity e_c in [d_1 / D, 1].
        num_tokens: N, routed tokens of one budget.
        num_experts: E.
        allocation: "mone": the paper's shares. "uniform" (c_i = 1 / E) and "proportionate" (c_i ~ 1 / d_i: every expert
            does the same work) are the fixed rules of MoNE table 2; they have one capacity of their own, whatever is
            asked. "submodel": all tokens on the widest expert that fits the capacity. "token_drop" and "tome": the
            number of tokens at full width that cost as much, so these counts sum to less than N.

    Raises:
        ValueError: A capacity outside its range.
    """
    check_capacity(capacity, num_experts)
    widths = relative_widths(num_experts)
    if allocation == "submodel":
        fitting = sum(width <= capacity + 1e-6 for width in widths) - 1
        return tuple(num_tokens * (index == fitting) for index in range(num_experts))
    if allocation in ("token_drop", "tome"):
        return (0,) * (num_experts - 1) + (max(1, math.floor(capacity * num_tokens + 1e-6)),)
    # The bisection is exact to about 1e-12; without a margin a share of 0.25 - 1e-13 would lose a token of 4.
    larger = [math.floor(share * num_tokens + 1e-6) for share in _shares(capacity, num_experts, allocation)[1:]]
    return (num_tokens - sum(larger), *larger)


def _shares(capacity: float, num_experts: int, allocation: Allocation) -> tuple[float, ...]:
    if allocation == "mone":
        return expert_shares(capacity, num_experts)
    weights = [1.0 if allocation == "uniform" else 1 / width for width in relative_widths(num_experts)]
    return tuple(weight / sum(weights) for weight in weights)


def fixed_capacity(num_experts: int, allocation: Allocation) -> float | None:
    """The one capacity that a fixed rule has: 0.469 for "uniform", 0.267 for "proportionate" (E = 4); else None."""
    if allocation not in ("uniform", "proportionate"):
        return None
    shares = _shares(1.0, num_experts, allocation)
    return sum(share * width for share, width in zip(shares, relative_widths(num_experts), strict=True))


def effective_capacity(counts: tuple[int, ...]) -> float:
    """e_c that these counts realise: sum_i n_i d_i / (N D)."""
    widths = relative_widths(len(counts))
    return sum(count * width for count, width in zip(counts, widths, strict=True)) / sum(counts)
