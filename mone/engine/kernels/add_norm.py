"""A branch onto the residual stream and the LayerNorm after it, in one pass over memory each way.

Forward, mean and scale of each token are kept. Backward, one pass takes the gradients of the sum and of what was
normalised, and gives those of stream, branch, factor and tail; each program adds up the gradients of weight and bias
over its rows, and the programs' sums are added after it.

Shapes: R rows (tokens of all experts), d width of an expert, D model features, P programs.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

# Values of one tensor that a program holds: narrow rows are taken more at a time.
_VALUES = 1024
# Programs of a gradient for each processor, as many as its registers hold.
_PROGRAMS = 5


@triton.jit
def _add_norm(
    head_ptr, branch_ptr, shift_ptr, factor_ptr, tail_mean_ptr, tail_spread_ptr, weight_ptr, bias_ptr,
    sum_ptr, normal_ptr, mean_ptr, scale_ptr, num_rows, width, dim, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ADD: tl.constexpr, SHIFTED: tl.constexpr, SCALED: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    known, inside = row < num_rows, (row < num_rows)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    head = tl.load(head_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        branch = tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if SHIFTED:
            branch += tl.load(shift_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
        if SCALED:
            branch *= tl.load(factor_ptr + row, mask=known, other=0.0)[:, None]
        head = (head + branch).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, head, mask=inside)
        head = head.to(tl.float32)
    mean = tl.sum(head, axis=1) / width
    centred = tl.where(inside, head - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / dim
    if TAIL:
        tail_share = (dim - width).to(tl.float32) / dim
        apart = mean - tl.load(tail_mean_ptr + row, mask=known, other=0.0)
        variance += tl.load(tail_spread_ptr + row, mask=known, other=0.0) / dim
        variance += apart * apart * tail_share * (1 - tail_share)
        mean -= apart * tail_share
        centred += (apart * tail_share)[:, None]
    scale = tl.rsqrt(variance + eps)
    tl.store(mean_ptr + row, mean, mask=known)
    tl.store(scale_ptr + row, scale, mask=known)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    normal = centred * scale[:, None] * weight[None, :] + bias[None, :]
    tl.store(normal_ptr + at, normal.to(normal_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_norm_grad(
    sum_ptr, branch_ptr, shift_ptr, factor_ptr, tail_mean_ptr, mean_ptr, scale_ptr, weight_ptr,
    sum_grad_ptr, normal_grad_ptr,
    head_grad_ptr, branch_grad_ptr, factor_grad_ptr, tail_mean_grad_ptr, tail_spread_grad_ptr,
    weight_grad_ptr, bias_grad_ptr, shift_grad_ptr, num_rows, width, dim,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, READ: tl.constexpr,
    ADD: tl.constexpr, SHIFTED: tl.constexpr, SCALED: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    weight_grad = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    bias_grad = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    shift_grad = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    if SHIFTED:
        shift = tl.load(shift_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    for first in range(program * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        known, inside = row < num_rows, (row < num_rows)[:, None] & (column < width)[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        # Everything is asked for before anything is waited for.
        stream = tl.load(sum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(normal_grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=known, other=0.0)
        scale = tl.load(scale_ptr + row, mask=known, other=0.0)
        stream_grad = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        if READ:
            stream_grad = tl.load(sum_grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            branch = tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
            factor = tl.load(factor_ptr + row, mask=known, other=0.0)
            if SHIFTED:
                branch += shift[None, :]
        normal = tl.where(inside, (stream - mean[:, None]) * scale[:, None], 0.0)
        weight_grad += grad * normal
        bias_grad += grad
        grad *= weight[None, :]
        total = tl.sum(grad, axis=1)
        along = tl.sum(grad * normal, axis=1)
        stream_grad += (grad - (total / dim)[:, None] - normal * (along / dim)[:, None]) * scale[:, None]
        tl.store(head_grad_ptr + at, stream_grad.to(head_grad_ptr.dtype.element_ty), mask=inside)
        if ADD:
            branch_grad = stream_grad
            if SCALED:
                branch_grad *= factor[:, None]
                tl.store(factor_grad_ptr + row, tl.sum(tl.where(inside, stream_grad * branch, 0.0), axis=1), mask=known)
            if SHIFTED:
                shift_grad += tl.where(inside, branch_grad, 0.0)
            tl.store(branch_grad_ptr + at, branch_grad.to(branch_grad_ptr.dtype.element_ty), mask=inside)
        if TAIL:
            tail_share = (dim - width).to(tl.float32) / dim
            apart = (mean - tl.load(tail_mean_ptr + row, mask=known, other=0.0)) * (dim / width)
            spread_grad = along * scale * scale * (-0.5) / dim
            mean_grad = -scale * total * tail_share - 2.0 * spread_grad * apart * width * tail_share
            tl.store(tail_mean_grad_ptr + row, mean_grad, mask=known)
            tl.store(tail_spread_grad_ptr + row, spread_grad, mask=known)
    at_sums = program.to(tl.int64) * dim + column
    tl.store(weight_grad_ptr + at_sums, tl.sum(weight_grad, axis=0), mask=column < width)
    tl.store(bias_grad_ptr + at_sums, tl.sum(bias_grad, axis=0), mask=column < width)
    if SHIFTED:
        tl.store(shift_grad_ptr + at_sums, tl.sum(shift_grad, axis=0), mask=column < width)


class Norm(NamedTuple):
    """What is no tensor: the LayerNorm's epsilon, and the dtype of its result."""

    eps: float
    dtype: torch.dtype


class KernelAddNorm(torch.autograd.Function):
    """As `mone.engine.norm.add_and_norm`, with float32 statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        weight_D: Tensor,
        bias_D: Tensor,
        shift_D: Tensor | None,
        factor_R: Tensor | None,
        norm: Norm,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Of n experts: streams [.., d], branches (None: nothing to add), means and spreads of tails (None: no tail).

        What is added is (branch + shift) factor.

        Returns:
            The sums, if there are branches, and what they are after LayerNorm.
        """
        heads, branches, means, spreads = _quarters(tensors)
        sums, normals, stats = [], [], []
        for head, branch, tail_mean, tail_spread, factor in zip(
            heads, branches, means, spreads, _runs(factor_R, heads), strict=True
        ):
            assert head is not None
            head = head.contiguous()
            rows, width, block, tile_rows = _sizes(head)
            total = head if branch is None else torch.empty_like(head)
            normal = torch.empty_like(head, dtype=norm.dtype)
            mean_R, scale_R = torch.empty((2, rows), dtype=torch.float32, device=head.device)
            _add_norm[(triton.cdiv(rows, tile_rows),)](
                head,
                *(_there(tensor, head) for tensor in (branch, shift_D, factor, tail_mean, tail_spread)),
                *(weight_D, bias_D, total, normal, mean_R, scale_R, rows, width, len(weight_D), norm.eps),
                ROWS=tile_rows,
                BLOCK=block,
                ADD=branch is not None,
                SHIFTED=shift_D is not None,
                SCALED=factor is not None,
                TAIL=tail_mean is not None,
                num_warps=4,
            )
            sums.append(total)
            normals.append(normal)
            stats += [mean_R, scale_R]
        ctx.save_for_backward(
            weight_D, shift_D, factor_R, *sums, *(branches if factor_R is not None else []), *means, *stats
        )
        ctx.branch_dtypes = [None if branch is None else branch.dtype for branch in branches]
        ctx.set_materialize_grads(False)
        return (*normals,) if branches[0] is None else (*sums, *normals)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of all that `forward` takes."""
        weight_D, shift_D, factor_R, *saved = ctx.saved_tensors
        count, dim, add = len(ctx.branch_dtypes), len(weight_D), ctx.branch_dtypes[0] is not None
        sums, saved = saved[:count], saved[count:]
        branches = [None] * count
        if factor_R is not None:
            branches, saved = saved[:count], saved[count:]
        means, stats = saved[:count], saved[count:]
        sum_grads, normal_grads = (grads[:count], grads[count:]) if add else ([None] * count, grads)
        factor_grad_R = None if factor_R is None else torch.empty_like(factor_R)
        programs = [min(triton.cdiv(_sizes(s)[0], _sizes(s)[3]), _num_programs(weight_D.device)) for s in sums]
        totals_3PD = torch.zeros((3, sum(programs), dim), dtype=torch.float32, device=weight_D.device)
        results: list[list[Tensor | None]] = [[], [], [], []]
        factors, factor_grads = _runs(factor_R, sums), _runs(factor_grad_R, sums)
        for index, (total, own_3Pd) in enumerate(zip(sums, totals_3PD.split(programs, dim=1), strict=True)):
            rows, width, block, tile_rows = _sizes(total)
            mean_R, scale_R = stats[2 * index : 2 * index + 2]
            sum_grad, normal_grad, tail_mean = sum_grads[index], normal_grads[index], means[index]
            normal_grad = torch.zeros_like(total) if normal_grad is None else normal_grad.contiguous()
            sum_grad = None if sum_grad is None else sum_grad.contiguous()
            head_grad = torch.empty_like(total)
            branch_grad = torch.empty_like(total, dtype=ctx.branch_dtypes[index]) if add else None
            mean_grad = spread_grad = None
            if tail_mean is not None:
                mean_grad, spread_grad = torch.empty_like(tail_mean), torch.empty_like(tail_mean)
            _add_norm_grad[(programs[index],)](
                total,
                *(_there(tensor, total) for tensor in (branches[index], shift_D, factors[index], tail_mean)),
                *(mean_R, scale_R, weight_D, _there(sum_grad, total), normal_grad, head_grad),
                *(_there(g, total) for g in (branch_grad, factor_grads[index], mean_grad, spread_grad)),
                *(*own_3Pd.unbind(0), rows, width, dim),
                ROWS=tile_rows,
                BLOCK=block,
                READ=sum_grad is not None,
                ADD=add,
                SHIFTED=shift_D is not None,
                SCALED=factors[index] is not None,
                TAIL=tail_mean is not None,
                num_warps=4,
            )
            for found, result in zip(results, (head_grad, branch_grad, mean_grad, spread_grad), strict=True):
                found.append(result)
        weight_grad_D, bias_grad_D, shift_grad_D = totals_3PD.sum(1).to(weight_D.dtype)
        shift_grad_D = None if shift_D is None else shift_grad_D
        return (
            weight_grad_D,
            bias_grad_D,
            shift_grad_D,
            factor_grad_R,
            None,
            *(tensor for found in results for tensor in found),
        )


def _quarters(tensors: tuple[Tensor | None, ...]) -> list[tuple[Tensor | None, ...]]:
    count = len(tensors) // 4
    return [tensors[start : start + count] for start in range(0, len(tensors), count)]


def _runs(values_R: Tensor | None, tensors: Any) -> tuple[Tensor | None, ...]:
    """The values of each tensor's rows."""
    if values_R is None:
        return (None,) * len(tensors)
    return values_R.split([tensor.numel() // tensor.shape[-1] for tensor in tensors])


def _sizes(tensor: Tensor) -> tuple[int, int, int, int]:
    """Rows, width, and columns and rows of a tile."""
    width = tensor.shape[-1]
    block = triton.next_power_of_2(width)
    return tensor.numel() // width, width, block, max(1, _VALUES // block)


def _there(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer that is not followed, where there is no tensor."""
    return other if tensor is None else tensor


def _num_programs(device: torch.device) -> int:
    return _PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
