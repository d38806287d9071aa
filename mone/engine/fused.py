"""All blocks as a few Triton kernels each, for inference on a GPU.

Tokens of all sequences are rows of one matrix, sorted by expert (`mone.engine.rows`). A block is seven launches:
LayerNorm, projection to queries, keys and values, attention, projection out onto the residual stream, LayerNorm, and
the two of the MLP. Each works on the rows of several experts: of all where few are narrow, else of the wide ones on one
stream and of the narrow ones on another. For attention the two meet. A narrow expert has a launch of its own for its
MLP, and on Hopper for either projection with the LayerNorm that goes with it.

The residual stream is in half precision, under autocast too, where the reference keeps it in float32: LayerNorm and the
products that end on it move half as much.

The factors of products can have 8 bits (E4M3): what LayerNorm, GELU and attention give as it is, since that lies where
the format is finest, and weights with a scale for each output feature. Sums, attention and the stream stay as they are.

Shapes: S sequences, N tokens, R rows, D model features, H hidden features, C class tokens, L blocks.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from mone.blocks import MLP, Block, Neighbours
from mone.engine.casts import EIGHT_BITS, factor
from mone.engine.class_tokens import class_tokens
from mone.engine.kernels.attention import attend_rows
from mone.engine.kernels.enter import enter_rows
from mone.engine.kernels.gelu import form_of
from mone.engine.kernels.gemm import Schedule, grouped_gemm, num_processors, scheduled
from mone.engine.kernels.narrow_mlp import narrow_mlp
from mone.engine.kernels.norm import SMALLEST_BLOCK, norm_rows
from mone.engine.layout import from_layout
from mone.engine.rows import Places, Run, num_rows, places_of, row_of_token, runs_of, tiles_of
from mone.engine.streams import fork, join, second_stream
from mone.engine.support import compute_dtype
from mone.engine.tilings import FEWEST_ROWS, Tiling, Tilings, tilings_for
from mone.engine.tokens import Tokens
from mone.nested import Segments


class _Buffers(NamedTuple):
    """What all blocks share, in expert-major order.

    Attributes:
        head_RD: Residual stream; each row has the width of its expert.
        tail_mean_R, tail_spread_R: Of the features past it.
        normal_RD: After LayerNorm.
        qkv_RX, mixed_RD, hidden_RH: After projection, attention, and the first half of the MLP.
    """

    head_RD: Tensor
    tail_mean_R: Tensor
    tail_spread_R: Tensor
    normal_RD: Tensor
    qkv_RX: Tensor
    mixed_RD: Tensor
    hidden_RH: Tensor


class _Lanes(NamedTuple):
    """Experts whose MLP takes two launches, and narrow ones, whose takes one, each on a stream of their own.

    Kernels of one lane fill what those of the other leave idle.

    Attributes:
        wide: On the current stream.
        narrow: With the tiling of each MLP, the widest first.
        second: The stream of the narrow ones; None: there is one lane.
        norm_inside: Whether the projections of the narrow ones do the LayerNorm before or after them too.
    """

    wide: tuple[Run, ...]
    narrow: dict[Run, Tiling]
    second: torch.cuda.Stream | None
    norm_inside: bool

    def each(self) -> list[tuple[torch.cuda.Stream | None, tuple[Run, ...], bool]]:
        """Stream and runs of each lane, and whether its LayerNorms are inside; no stream is the current one."""
        lanes = [(self.second, tuple(self.narrow), self.norm_inside), (None, self.wide, False)]
        return [lane for lane in lanes if lane[1]]


def fits_kernels(blocks: nn.ModuleList, like: Tensor) -> bool:
    """Whether the kernels take these sizes and the dtype of this tensor, which is not empty; without gradients."""
    attention = cast(Block, blocks[0]).attention
    dim, inference = attention.qkv.in_features, not torch.is_grad_enabled() and not blocks.training
    halves = compute_dtype(like) in (torch.bfloat16, torch.float16)
    return (
        inference and halves and like.numel() > 0 and dim % 16 == 0 and dim // attention.num_heads in (16, 32, 64, 128)
    )


def run_on_rows(
    blocks: nn.ModuleList,
    tokens: Tokens,
    segments: Segments,
    neighbours: Neighbours | None = None,
    num_class_tokens: int = 0,
    tilings: Tilings | None = None,
    *,
    eight_bits: bool = False,
) -> Tensor:
    """Run all blocks; as `choice.run_blocks`, without gradients."""
    num_sequences, _, dim = tokens.x_SKD.shape
    device, runs = tokens.x_SKD.device, runs_of(segments, num_sequences)
    tilings = tilings or tilings_for(device, runs, dim, eight_bits=eight_bits)
    row_SN = _rows(runs, num_sequences, device)
    buffers, gain_LR = _enter(blocks, tokens, runs, row_SN, eight_bits=eight_bits)
    places, lanes = places_of(row_SN, neighbours), _lanes(runs, buffers, tilings)
    all_blocks = [cast(Block, block) for block in blocks]
    if lanes.second is not None:
        _make_factors(all_blocks, buffers.normal_RD.dtype)
    fork(lanes.second)
    # Of few rows a whole block is done sooner than the many small steps that do less.
    shortens = bool(num_class_tokens) and len(buffers.head_RD) > FEWEST_ROWS
    for block, gain_R in zip(all_blocks[: len(all_blocks) - shortens], gain_LR, strict=False):
        _block(block, buffers, lanes, places, gain_R, tilings)
    join(lanes.second)
    if num_class_tokens:
        rows_SC = row_SN[:, -num_class_tokens:]
        if not shortens:
            return buffers.head_RD[rows_SC].to(tokens.dtype)
        _norm(all_blocks[-1].norm_attention, buffers, runs)
        outputs = (buffers.head_RD, buffers.normal_RD, runs, places, rows_SC)
        return class_tokens(all_blocks[-1], *outputs).to(tokens.dtype)
    heads = [
        buffers.head_RD[run.start : run.stop, : run.width].unflatten(0, (num_sequences, run.count)).to(tokens.dtype)
        for run in runs
    ]
    return from_layout(heads, tokens.sorted(), segments)


def _enter(
    blocks: nn.ModuleList, tokens: Tokens, runs: tuple[Run, ...], row_SN: Tensor, *, eight_bits: bool
) -> tuple[_Buffers, Tensor]:
    """Tokens in the buffers, and the gain of each row in each block, float32 [L, R]."""
    x_SKD = tokens.x_SKD
    rows, dim, dtype = num_rows(runs), x_SKD.shape[-1], compute_dtype(x_SKD)
    hidden, factors = cast(Block, blocks[0]).mlp.up.out_features, EIGHT_BITS if eight_bits else dtype

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x_SKD.device)

    buffers = _Buffers(
        head_RD=empty(rows, dim),
        tail_mean_R=empty(rows, dtype=torch.float32),
        tail_spread_R=empty(rows, dtype=torch.float32),
        normal_RD=empty(rows, -(-dim // SMALLEST_BLOCK) * SMALLEST_BLOCK, dtype=factors),
        qkv_RX=empty(rows, 3 * dim),
        mixed_RD=empty(rows, dim, dtype=factors),
        hidden_RH=empty(rows, hidden, dtype=factors),
    )
    gain_LR = empty(len(blocks), rows, dtype=torch.float32)
    enter_rows(tokens, runs, row_SN, *buffers[:3], gain_LR)
    return buffers, gain_LR


def _lanes(runs: tuple[Run, ...], buffers: _Buffers, tilings: Tilings) -> _Lanes:
    hidden, device = buffers.hidden_RH.shape[1], buffers.hidden_RH.device
    chosen = [(run, tilings.narrow_of(run.width, hidden, run.stop - run.start, num_processors(device))) for run in runs]
    narrow = {run: tiling for run, tiling in reversed(chosen) if tiling is not None}
    wide = tuple(run for run, tiling in chosen if tiling is None)
    second = second_stream(device) if wide and narrow else None
    norm_inside = tilings.norm_inside and _norm_fits_inside(tuple(narrow), buffers)
    return _Lanes(wide, narrow, second, norm_inside)


def _norm_fits_inside(runs: tuple[Run, ...], buffers: _Buffers) -> bool:
    """Whether the kernels for it take all of these runs; in half precision alone."""
    if buffers.normal_RD.dtype != buffers.head_RD.dtype:
        return False
    from mone.engine.kernels import norm_project_hopper, project_norm_hopper  # older Tritons have no Gluon

    columns, inner = buffers.qkv_RX.shape[1], buffers.mixed_RD.shape[1]
    return all(
        norm_project_hopper.fits(run.width, columns) and project_norm_hopper.fits(run.width, inner) for run in runs
    )


def _make_factors(blocks: list[Block], dtype: torch.dtype) -> None:
    """Whichever lane would make one, the other might read it too soon."""
    for block in blocks:
        for linear in (block.attention.qkv, block.attention.out, block.mlp.up, block.mlp.down):
            factor(linear.weight, dtype)


def _block(block: Block, buffers: _Buffers, lanes: _Lanes, places: Places, gain_R: Tensor, tilings: Tilings) -> None:
    """`Block.forward`, in the buffers. The lanes meet for attention alone."""
    attention = block.attention
    for stream, runs, norm_inside in lanes.each():
        with torch.cuda.stream(stream):
            if norm_inside:
                _norm_project(block.norm_attention, attention.qkv, buffers, runs)
            else:
                _norm(block.norm_attention, buffers, runs)
                _project(attention.qkv, buffers.normal_RD, buffers.qkv_RX, runs, tilings.qkv)
    join(lanes.second)
    attend_rows(buffers.qkv_RX, buffers.mixed_RD, places, attention.num_heads, attending=tilings.attention)
    fork(lanes.second)
    for stream, runs, norm_inside in lanes.each():
        with torch.cuda.stream(stream):
            if norm_inside:
                _project_norm(attention.out, block.norm_mlp, buffers, runs)
            else:
                _project_out(attention.out, buffers.mixed_RD, buffers.head_RD, runs, tilings.out)
                _norm(block.norm_mlp, buffers, runs)
            _mlp(block.mlp, buffers, runs, lanes.narrow, gain_R, tilings)


def _norm_project(norm: nn.LayerNorm, linear: nn.Linear, buffers: _Buffers, runs: tuple[Run, ...]) -> None:
    """The stream to queries, keys and values, in one launch for each narrow expert."""
    from mone.engine.kernels.norm_project_hopper import norm_project_hopper  # older Tritons have no Gluon

    weight, columns = factor(linear.weight, buffers.head_RD.dtype), range(linear.out_features)
    for run in runs:
        norm_project_hopper(
            *(*buffers[:3], norm.weight, norm.bias, norm.eps, weight, linear.bias, buffers.qkv_RX, run, columns)
        )


def _project_norm(linear: nn.Linear, norm: nn.LayerNorm, buffers: _Buffers, runs: tuple[Run, ...]) -> None:
    """What attention gives onto the stream, and that normalised, in one launch for each narrow expert."""
    from mone.engine.kernels.project_norm_hopper import project_norm_hopper  # older Tritons have no Gluon

    weight = factor(linear.weight, buffers.mixed_RD.dtype)
    for run in runs:
        project_norm_hopper(
            *(buffers.mixed_RD, weight, linear.bias, *buffers[:3], norm.weight, norm.bias, norm.eps),
            *(buffers.normal_RD, run),
        )


def _mlp(
    mlp: MLP,
    buffers: _Buffers,
    runs: tuple[Run, ...],
    narrow: dict[Run, Tiling],
    gain_R: Tensor,
    tilings: Tilings,
) -> None:
    """One launch for each narrow expert, or two for all wide ones."""
    dtype = buffers.normal_RD.dtype
    activation = form_of(mlp.activation.approximate, dtype)
    if runs[0] not in narrow:
        _project(mlp.up, buffers.normal_RD, buffers.hidden_RH, runs, tilings.up, activation)
        _project_out(mlp.down, buffers.hidden_RH, buffers.head_RD, runs, tilings.down, gain_R)
        return
    up, down = factor(mlp.up.weight, dtype), factor(mlp.down.weight, dtype)
    for run in runs:
        _kernel_of(narrow[run])(
            *(buffers.normal_RD, up, mlp.up.bias, down, mlp.down.bias, buffers.head_RD, run, gain_R),
            tiling=narrow[run],
            activation=activation,
        )


def _kernel_of(tiling: Tiling) -> Callable[..., None]:
    if not tiling.roles:
        return narrow_mlp
    from mone.engine.kernels.narrow_mlp_hopper import narrow_mlp_hopper  # older Tritons have no Gluon

    return narrow_mlp_hopper


def _norm(norm: nn.LayerNorm, buffers: _Buffers, runs: tuple[Run, ...]) -> None:
    head_RD, tail_mean_R, tail_spread_R, normal_RD = buffers[:4]
    norm_rows(head_RD, tail_mean_R, tail_spread_R, norm.weight, norm.bias, norm.eps, normal_RD, runs)


def _project(
    linear: nn.Linear,
    rows_RD: Tensor,
    out_RX: Tensor,
    runs: tuple[Run, ...],
    tiling: Tiling,
    activation: str = "",
) -> None:
    """The first d features of each row to all columns."""
    schedule = _tiles_in(runs, linear.out_features, tiling, rows_RD.device)
    weight = factor(linear.weight, rows_RD.dtype)
    grouped_gemm(rows_RD, weight, linear.bias, out_RX, schedule, tiling=tiling, activation=activation)


def _project_out(
    linear: nn.Linear,
    rows_RX: Tensor,
    out_RD: Tensor,
    runs: tuple[Run, ...],
    tiling: Tiling,
    gain_R: Tensor | None = None,
) -> None:
    """All features of each row onto the first d of the residual stream."""
    schedule = _tiles_out(runs, rows_RX.shape[1], tiling, rows_RX.device)
    weight = factor(linear.weight, rows_RX.dtype)
    grouped_gemm(rows_RX, weight, linear.bias, out_RD, schedule, tiling=tiling, residual=True, gain_R=gain_R)


# Tables depend on counts and sizes alone: made once, they stay on the device.
@functools.lru_cache(maxsize=1024)
def _tiles_in(runs: tuple[Run, ...], num_columns: int, tiling: Tiling, device: torch.device) -> Schedule:
    inner = [run.width for run in runs]
    spans = [(0, num_columns)] * len(runs)
    return _scheduled(runs, spans, inner, tiling, device)


@functools.lru_cache(maxsize=1024)
def _tiles_out(runs: tuple[Run, ...], inner: int, tiling: Tiling, device: torch.device) -> Schedule:
    spans = [(0, run.width) for run in runs]
    return _scheduled(runs, spans, [inner] * len(runs), tiling, device)


def _scheduled(
    runs: tuple[Run, ...], spans: list[tuple[int, int]], inner: list[int], tiling: Tiling, device: torch.device
) -> Schedule:
    with torch.inference_mode(False):
        return scheduled(tiles_of(runs, spans, inner, tiling.rows, tiling.columns), tiling, device)


@functools.lru_cache(maxsize=256)
def _rows(runs: tuple[Run, ...], num_sequences: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return row_of_token(runs, num_sequences, device)
