"""How blocks of half precision lie for the products of Hopper, which four warps compute together, 64 rows at a time.

And the shared memory in which one warp leaves blocks for others, with the barriers that tell them.
"""

from collections.abc import Sequence

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

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


def descriptors_of(tensors: Sequence[Tensor], blocks: Sequence[list[int]]) -> list[TensorDescriptor]:
    """How each tensor is read or written, in blocks of a size of its own."""
    return [
        TensorDescriptor.from_tensor(tensor, block, shared_layout(block[1]))
        for tensor, block in zip(tensors, blocks, strict=True)
    ]


@gluon.jit
def make_buffers(desc, COUNT: gl.constexpr):
    """Room for so many blocks of a descriptor."""
    return gl.allocate_shared_memory(desc.dtype, [COUNT] + desc.block_type.shape, desc.layout)  # noqa: RUF005


@gluon.jit
def make_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """So many barriers, each of which opens when so many have arrived, and their bytes."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(COUNT):
        mbarrier.init(made.index(place), count=ARRIVALS)
    return made
