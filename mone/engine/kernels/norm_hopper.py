"""LayerNorm of a narrow expert's rows on Hopper, within kernels that have them in registers, in one part or two.

The mathematics is that of `mone/engine/kernels/norm.py`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mone.engine.kernels.hopper import product_layout

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportPossiblyUnboundVariable=false, reportAssignmentType=false, reportOperatorIssue=false

# Width of rows up to which it was tried.
WIDEST = 192


@gluon.jit
def columns_of(part, start):
    """Columns of a part that lies from `start` on."""
    return start + gl.arange(0, part.shape[1], layout=gl.SliceLayout(0, part.type.layout))


@gluon.jit
def vector_at(ptr, part, start, width):
    """float32 values of a part's columns, 0 past the width."""
    columns = columns_of(part, start)
    return gl.load(ptr + columns, mask=columns < width, other=0.0).to(gl.float32)


@gluon.jit
def load_tails(mean_ptr, spread_ptr, row, stop, HEIGHT: gl.constexpr):
    """What is known of the tails of some rows."""
    rows = row + gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, product_layout(HEIGHT)))
    mean = gl.load(mean_ptr + rows, mask=rows < stop, other=0.0)
    return mean, gl.load(spread_ptr + rows, mask=rows < stop, other=0.0)


@gluon.jit
def _inside(part, values, start, width):
    return gl.where((columns_of(part, start) < width)[None, :], values, 0.0)


@gluon.jit
def _for(part, rows):
    return gl.convert_layout(rows, gl.SliceLayout(1, part.type.layout))[:, None]


@gluon.jit
def _sum(part):
    return gl.convert_layout(gl.sum(part, axis=1), gl.SliceLayout(1, product_layout(part.shape[0])))


@gluon.jit
def _normal(part, scale, shift, weight_ptr, bias_ptr, start, width):
    weight, bias = vector_at(weight_ptr, part, start, width), vector_at(bias_ptr, part, start, width)
    return (part * _for(part, scale) + _for(part, shift)) * weight[None, :] + bias[None, :]


@gluon.jit
def normal_of(part, more, tails, norm, MORE: gl.constexpr):
    """Both parts of rows, float32, normalised; 0 past the width. Without MORE the second is not looked at."""
    tail_mean, tail_spread = tails
    weight_ptr, bias_ptr, width, dim, eps = norm
    START: gl.constexpr = part.shape[1]
    part = _inside(part, part, 0, width)
    total = _sum(part)
    if MORE:
        more = _inside(more, more, START, width)
        total += _sum(more)
    own_mean = total / width
    part = _inside(part, part - _for(part, own_mean), 0, width)
    spread = _sum(part * part) + tail_spread
    if MORE:
        more = _inside(more, more - _for(more, own_mean), START, width)
        spread += _sum(more * more)
    apart, tail_share = own_mean - tail_mean, (dim - width).to(gl.float32) / dim
    scale = gl.rsqrt(spread / dim + apart * apart * tail_share * (1 - tail_share) + eps)
    shift = apart * tail_share * scale
    part = _normal(part, scale, shift, weight_ptr, bias_ptr, 0, width)
    if MORE:
        more = _normal(more, scale, shift, weight_ptr, bias_ptr, START, width)
    return part, more
