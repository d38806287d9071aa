"""Compile a kernel for Hopper, on any machine, and print what ptxas says of it.

python -m tests.mone.engine.compiled_for_hopper mlp WIDTH ROWS COLUMNS STAGES ACTIVATION
python -m tests.mone.engine.compiled_for_hopper attention SLOTS
"""

import subprocess
import sys
import tempfile

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from mone.engine.kernels import attention_hopper, narrow_mlp_hopper
from mone.engine.kernels.hopper import shared_layout
from mone.engine.tilings import Tiling

HALF = {f"{name}_ptr" for name in ("qkv", "out", "up_bias", "down_bias")}
TYPES = {**dict.fromkeys(HALF, "*bf16"), "gain_ptr": "*fp32", "read_ptr": "*i64", "write_ptr": "*i64", "scale": "fp32"}
ALIGNED = {*TYPES, "first_row", "num_steps", "stride", "qkv_stride", "out_stride"} - {"scale"}


def ptxas_on(kernel, constants, blocks=(), aligned=()):
    coming, signature = iter(blocks), {}
    for name in kernel.arg_names:
        if name.endswith("_desc"):
            block = next(coming)
            signature[name] = f"tensordesc<bf16{block},{shared_layout(block[1])!r}>"
        else:
            signature[name] = "constexpr" if name in constants else TYPES.get(name, "i32")
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
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def main():
    what, *numbers = sys.argv[1:]
    if what == "attention":
        print(ptxas_on(attention_hopper._attention, attention_hopper.constants_of(int(numbers[0]))))
        return
    width, rows, columns, stages = map(int, numbers[:4])
    constants = narrow_mlp_hopper.constants_of(width, Tiling(rows, columns, stages=stages, roles=True), numbers[4])
    blocks = narrow_mlp_hopper.blocks_of(width, columns)
    print(ptxas_on(narrow_mlp_hopper._narrow_mlp, constants, blocks, {"width"} if width % 16 == 0 else ()))


if __name__ == "__main__":
    main()
