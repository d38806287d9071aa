"""Kernels in Gluon: compiled for Hopper wherever Triton is, and run where there is one."""

import os
import subprocess
import sys

import pytest
import torch
import triton

from mone.engine.casts import EIGHT_BITS, factor
from mone.engine.kernels.attention import attend_rows
from mone.engine.kernels.narrow_mlp import narrow_mlp, parts_of
from mone.engine.kernels.narrow_mlp_hopper import narrow_mlp_hopper
from mone.engine.rows import Places, num_rows, runs_of
from mone.engine.support import gluon_runs, knows_gluon_of
from mone.engine.tilings import NARROW_ROLES, Attending, Tiling
from mone.nested import segments_of
from tests.mone.engine import compiled_for_hopper

DIM, HIDDEN = 768, 768
WIDTHS = (24, 48, 112, 17)
TILINGS = [*NARROW_ROLES, *((width, tiling) for width, (_, tiling) in zip(WIDTHS, NARROW_ROLES, strict=True))]


def ptxas_on(*asked):
    """In a process of its own: where Triton interprets, it does not compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", compiled_for_hopper.__name__, *map(str, asked)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("version", "known"), [("3.5.1", False), ("3.6.0", True), ("3.8.0+git", True), ("3.9.0", False), ("4.0.0", False)]
)
def test_gluon_of_tritons_that_were_tried(version, known):
    assert knows_gluon_of(version) == known


def test_gluon_of_the_triton_that_is_there_was_tried():
    """If not: try the kernels with it, and add it to those that are known."""
    assert knows_gluon_of(triton.__version__)


@pytest.fixture
def hopper():
    if not torch.cuda.is_available() or not gluon_runs(torch.device("cuda")):
        pytest.skip("no Hopper GPU")


@pytest.mark.parametrize(("width", "tiling"), NARROW_ROLES)
@pytest.mark.parametrize("activation", ["gelu", "gelu_fast"])
def test_products_run_beside_what_is_between_them(width, tiling, activation):
    """Else ptxas says that it has to do one after the other; and registers have to be enough for the fast form."""
    said = ptxas_on("mlp", width, tiling.rows, tiling.columns, tiling.stages, activation)
    assert "Compiling entry function '_narrow_mlp' for 'sm_90a'" in said
    assert "serialized" not in said
    assert "0 bytes spill stores" in said or activation == "gelu"


@pytest.mark.parametrize("num_slots", [100, 197, 240, 256])
def test_scores_are_computed_beside_exponentials(num_slots):
    said = ptxas_on("attention", num_slots)
    assert "Compiling entry function '_attention' for 'sm_90a'" in said
    assert "serialized" not in said


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("num_slots", [65, 100, 138, 190, 197, 240, 256])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.bfloat16, EIGHT_BITS)])
@pytest.mark.parametrize("groups", [1, 40, 256])
def test_attention_as_for_every_card(num_slots, dtypes, groups):
    heads, (dtype, wanted) = 4, dtypes
    torch.manual_seed(num_slots)
    rows = groups * num_slots + 7
    qkv = torch.randn(rows, 3 * heads * 64, device="cuda", dtype=dtype)
    read = torch.randperm(rows, device="cuda")[: groups * num_slots].view(groups, num_slots)
    write = read.clone()
    write[0, ::3] = -1  # nobody takes these
    expected, actual = (torch.zeros(rows, heads * 64, device="cuda").to(wanted) for _ in range(2))
    attend_rows(qkv, expected, Places(read, write), heads, attending=Attending())
    attend_rows(qkv, actual, Places(read, write), heads, attending=Attending(roles=True))
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < (1e-3 if wanted == dtype else 1e-2)
    untouched = torch.ones(rows, dtype=torch.bool, device="cuda")
    untouched[write[write >= 0]] = False
    assert not actual[untouched].double().any()


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("width", "tiling"), TILINGS)
@pytest.mark.parametrize(("dtype", "activation"), [(torch.bfloat16, "gelu_fast"), (torch.float16, "gelu")])
@pytest.mark.parametrize("count", [1, 5, 61, 120])
def test_mlp_as_for_every_card(width, tiling, dtype, activation, count):
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
