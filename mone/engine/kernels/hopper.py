"""How blocks of half precision lie for the products of Hopper, which four warps compute together, 64 rows at a time."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

GROUP = 64


@gluon.constexpr_function
def shared_layout(columns):
    """In shared memory, whichever way it is multiplied."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * columns), element_bitwidth=16, rank=2)


@gluon.constexpr_function
def product_layout(columns):
    """Sums, in registers."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def factor_layout(columns):
    """The first factor, in registers."""
    return gl.DotOperandLayout(0, product_layout(columns), 2)


@gluon.constexpr_function
def memory_layout(columns):
    """On the way from and to memory: eight values of a thread side by side."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [4, 1], [1, 0])
