"""Compile a kernel for Hopper, on any machine, and print what ptxas says of it, and the shared memory that it takes.

python -m tests.mone.engine.compiled_for_hopper mlp WIDTH ROWS COLUMNS STAGES ACTIVATION
python -m tests.mone.engine.compiled_for_hopper norm_project WIDTH COLUMNS
python -m tests.mone.engine.compiled_for_hopper project_norm WIDTH
python -m tests.mone.engine.compiled_for_hopper attention SLOTS

Or how a kernel in Triton loads and stores bfloat16.

python -m tests.mone.engine.compiled_for_hopper norm WIDTH ...
python -m tests.mone.engine.compiled_for_hopper enter WIDTH
"""

import re
import subprocess
import sys
import tempfile

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from mone.engine.kernels import (
    attention_hopper,
    enter,
    narrow_mlp_hopper,
    norm,
    norm_project_hopper,
    project_norm_hopper,
)
from mone.engine.kernels.hopper import shared_layout
from mone.engine.tilings import Tiling

HALF = {f"{name}_ptr" for name in ("qkv", "out", "bias", "up_bias", "down_bias", "norm_weight", "norm_bias")}
FLOAT = {f"{name}_ptr" for name in ("gain", "mean", "spread")}
POINTERS = {**dict.fromkeys(HALF, "*bf16"), **dict.fromkeys(FLOAT, "*fp32"), "read_ptr": "*i64", "write_ptr": "*i64"}
TYPES = {**POINTERS, "scale": "fp32", "eps": "fp32"}
ALIGNED = {*POINTERS, "first_row", "column", "num_steps", "inner", "dim", "stride", "qkv_stride", "out_stride"}


def ptxas_on(kernel, constants, blocks=(), aligned=(), types=None):
    coming, signature, types = iter(blocks), {}, {**TYPES, **(types or {})}
    for name in kernel.arg_names:
        if name.endswith("_desc"):
            block = next(coming)
            signature[name] = f"tensordesc<bf16{block},{shared_layout(block[1])!r}>"
        else:
            signature[name] = "constexpr" if name in constants else types.get(name, "i32")
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    source = GluonASTSource(
        kernel,
        signature,
        {places[name]: value for name, value in constants.items()},
        {place: [["tt.divisibility", 16]] for name, place in places.items() if name in {*ALIGNED, *aligned}},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name", "sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return f"{said}{compiled.metadata.shared} bytes of shared memory"


def aligned_width(width):
    return {"width"} if width % 16 == 0 else ()


def mlp(width, rows, columns, stages, activation):
    tiling = Tiling(int(rows), int(columns), stages=int(stages), roles=True)
    constants = narrow_mlp_hopper.constants_of(int(width), tiling, activation)
    blocks = narrow_mlp_hopper.blocks_of(int(width), tiling.columns)
    types = {"up_bias_ptr": "*fp32"} if activation in narrow_mlp_hopper.FULL_BIAS else {}
    return ptxas_on(narrow_mlp_hopper._narrow_mlp, constants, blocks, aligned_width(int(width)), types)


def norm_project(width, columns):
    constants = norm_project_hopper.constants_of(int(width), int(columns))
    blocks = norm_project_hopper.blocks_of(int(width))
    kernel = norm_project_hopper._norm_project
    return ptxas_on(kernel, constants, blocks, aligned_width(int(width)), {"bias_ptr": "*fp32"})


def project_norm(width):
    constants = project_norm_hopper.constants_of(int(width))
    blocks = project_norm_hopper.blocks_of(int(width))
    return ptxas_on(project_norm_hopper._project_norm, constants, blocks, aligned_width(int(width)))


def attention(slots):
    return ptxas_on(attention_hopper._attention, attention_hopper.constants_of(int(slots)))


def moves_of(kernel, constants, types):
    """Instructions between global memory and registers; all pointers and sizes are multiples of 16."""
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*bf16" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    aligned = {places[name]: [["tt.divisibility", 16]] for name in signature if signature[name][0] in "*i"}
    source = ASTSource(kernel, signature, {places[name]: value for name, value in constants.items()}, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
    return " ".join(sorted(set(re.findall(r"(?:ld|st)\.global[.\w]*", compiled.asm["ptx"]))))


def norm_rows(*widths):
    blocks = tuple(max(norm.SMALLEST_BLOCK, triton.next_power_of_2(int(width))) for width in widths)
    constants = {"WIDTHS": tuple(map(int, widths)), "BLOCKS": blocks, "VALUES": norm.VALUES}
    return moves_of(
        norm._norm, constants, {"mean_ptr": "*fp32", "spread_ptr": "*fp32", "runs_ptr": "*i32", "eps": "fp32"}
    )


def enter_rows(dim):
    flags = dict.fromkeys(("POSITIONED", "PLACED", "WEIGHTED", "ALIGNED"), True)
    constants = {"DIM": int(dim), "BLOCK": triton.next_power_of_2(int(dim)), "LAYERS": 16, "ORDERED": False, **flags}
    floats, longs = (
        ("weight_ptr", "mean_ptr", "spread_ptr", "gain_ptr", "alpha_ptr"),
        ("order_ptr", "place_ptr", "row_ptr"),
    )
    types = {**dict.fromkeys(floats, "*fp32"), **dict.fromkeys(longs, "*i64"), "width_ptr": "*i32"}
    return moves_of(enter._enter, constants, types)


def main():
    what, *numbers = sys.argv[1:]
    with_roles = {"mlp": mlp, "norm_project": norm_project, "project_norm": project_norm, "attention": attention}
    print({**with_roles, "norm": norm_rows, "enter": enter_rows}[what](*numbers))


if __name__ == "__main__":
    main()
