"""Kernels in Gluon: compiled for Hopper wherever Triton is, and run where there is one."""

import os
import subprocess
import sys

import pytest
import torch

from mone.engine.casts import factor
from mone.engine.kernels.narrow_mlp import narrow_mlp, parts_of
from mone.engine.rows import num_rows, runs_of
from mone.engine.support import gluon_runs
from mone.engine.tilings import NARROW_ROLES, Tiling
from mone.nested import segments_of
from tests.mone.engine import compiled_for_hopper

DIM, HIDDEN = 768, 768
WIDTHS = (24, 48, 112, 17)
TILINGS = [*NARROW_ROLES, *((width, tiling) for width, (_, tiling) in zip(WIDTHS, NARROW_ROLES, strict=True))]


@pytest.mark.parametrize(("width", "tiling"), NARROW_ROLES)
@pytest.mark.parametrize("activation", ["gelu", "gelu_fast"])
def test_products_run_beside_what_is_between_them(width, tiling, activation):
    """Else ptxas says that it has to do one after the other; and registers have to be enough for the fast form.

    In a process of its own: where Triton interprets, it does not compile.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    asked = [str(width), str(tiling.rows), str(tiling.columns), str(tiling.stages), activation]
    command = [sys.executable, "-m", compiled_for_hopper.__name__, *asked]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "Compiling entry function '_narrow_mlp' for 'sm_90a'" in said
    assert "serialized" not in said
    assert "0 bytes spill stores" in said or activation == "gelu"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("width", "tiling"), [*TILINGS, (48, TILINGS[2][1]), (112, TILINGS[3][1]), (17, TILINGS[1][1])]
)
@pytest.mark.parametrize(("dtype", "activation"), [(torch.bfloat16, "gelu_fast"), (torch.float16, "gelu_tanh")])
@pytest.mark.parametrize("count", [1, 5, 61, 120])
def test_as_the_kernel_for_every_card(width, tiling, dtype, activation, count):
    if not torch.cuda.is_available() or not gluon_runs(torch.device("cuda")):
        pytest.skip("no Hopper GPU")
    from mone.engine.kernels.narrow_mlp_hopper import narrow_mlp_hopper

    torch.manual_seed(width + count)
    runs = runs_of(segments_of((count, 3), (width, DIM)), 7)
    rows, run = num_rows(runs), runs[0]
    x, stream = (torch.randn(rows, DIM, device="cuda", dtype=dtype) for _ in range(2))
    x[run.start : run.stop, width:] = 0
    weights = (torch.randn(shape, device="cuda", dtype=dtype) / 16 for shape in ((HIDDEN, DIM), (DIM, HIDDEN)))
    up, down = (factor(weight, dtype) for weight in weights)
    up_bias, down_bias = (torch.randn(size, device="cuda", dtype=dtype) for size in (HIDDEN, DIM))
    gain, expected, actual = torch.rand(rows, device="cuda"), stream.clone(), stream.clone()
    plain = Tiling(64, 64, 64, 4, 2)
    narrow_mlp(*(x, up, up_bias, down, down_bias, expected, run, gain), tiling=plain, activation=activation)
    narrow_mlp_hopper(*(x, up, up_bias, down, down_bias, actual, run, gain), tiling=tiling, activation=activation)
    own = slice(run.start, run.stop)
    torch.testing.assert_close(actual[own, :width], expected[own, :width], rtol=2e-2, atol=2e-2)
    error = (actual[own, :width] - expected[own, :width]).double().norm() / expected[own, :width].double().norm()
    assert error < 1e-3
    actual[own, :width] = stream[own, :width]
    assert torch.equal(actual, stream)
    assert width <= sum(parts_of(width))
