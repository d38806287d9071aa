"""Compile the narrow MLP for Hopper, on any machine, and print what ptxas says of it.

python -m tests.mone.engine.compiled_for_hopper WIDTH ROWS COLUMNS STAGES ACTIVATION
"""

import subprocess
import sys
import tempfile

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from mone.engine.kernels import narrow_mlp_hopper
from mone.engine.tilings import Tiling

ALIGNED = {"out_ptr", "up_bias_ptr", "down_bias_ptr", "gain_ptr", "first_row", "num_steps", "stride"}
TYPES = {"out_ptr": "*bf16", "up_bias_ptr": "*bf16", "down_bias_ptr": "*bf16", "gain_ptr": "*fp32"}


def main() -> None:
    width, rows, columns, stages = map(int, sys.argv[1:5])
    tiling = Tiling(rows, columns, stages=stages, roles=True)
    kernel = narrow_mlp_hopper._narrow_mlp
    constants = narrow_mlp_hopper.constants_of(width, tiling, sys.argv[5])
    blocks = iter(narrow_mlp_hopper.blocks_of(width, columns))
    signature = {}
    for name in kernel.arg_names:
        if name.endswith("_desc"):
            block = next(blocks)
            signature[name] = f"tensordesc<bf16{block},{narrow_mlp_hopper.shared_layout(block[1])!r}>"
        else:
            signature[name] = "constexpr" if name in constants else TYPES.get(name, "i32")
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    source = GluonASTSource(
        kernel,
        signature,
        {places[name]: value for name, value in constants.items()},
        {places[name]: [["tt.divisibility", 16]] for name in ALIGNED | ({"width"} if width % 16 == 0 else set())},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name", "sm_90a", file.name, "-o", "/dev/null"]
        print(subprocess.run(command, capture_output=True, text=True, check=True).stderr)


if __name__ == "__main__":
    main()
