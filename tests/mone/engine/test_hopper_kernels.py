"""Kernels in Gluon: compiled for Hopper wherever Triton is, and run where there is one."""

import os
import re
import subprocess
import sys

import pytest
import torch
import triton

from mone.engine import fused
from mone.engine.blocks import run_on_layout
from mone.engine.casts import EIGHT_BITS, factor
from mone.engine.kernels import narrow_mlp_hopper as mlp_module
from mone.engine.kernels import norm_project_hopper as norm_project_module
from mone.engine.kernels import project_norm_hopper as project_norm_module
from mone.engine.kernels.attention import attend_rows
from mone.engine.kernels.gemm import grouped_gemm, scheduled
from mone.engine.kernels.narrow_mlp import narrow_mlp, parts_of
from mone.engine.kernels.narrow_mlp_hopper import narrow_mlp_hopper
from mone.engine.kernels.norm import norm_rows
from mone.engine.kernels.norm_project_hopper import norm_project_hopper
from mone.engine.kernels.project_norm_hopper import project_norm_hopper
from mone.engine.rows import Places, num_rows, runs_of, tiles_of
from mone.engine.support import gluon_runs, knows_gluon_of
from mone.engine.tilings import NARROW_ROLES, Attending, Tiling, Tilings
from mone.engine.tokens import Gain, Tokens
from mone.nested import segments_of
from tests.mone.conftest import small_config, small_model
from tests.mone.engine import compiled_for_hopper

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DIM, HIDDEN = 768, 768
WIDTHS = (24, 48, 112, 17)
TILINGS = [*NARROW_ROLES, *zip(WIDTHS, [tiling for _, tiling in NARROW_ROLES] * 2, strict=False)]
PLAIN = Tiling(64, 64, 64, 4, 2)
# Bytes of shared memory that a program may have.
ROOM = 232448


def ptxas_on(*asked):
    """In a process of its own: where Triton interprets, it does not compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", compiled_for_hopper.__name__, *map(str, asked)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def assert_compiled(said, kernel):
    """With nothing serialized: else ptxas says that it has to do one product after the other."""
    assert f"Compiling entry function '{kernel}' for 'sm_90a'" in said
    assert "serialized" not in said
    assert int(re.findall(r"(\d+) bytes of shared memory", said)[0]) <= ROOM


def norm_then_project(head, mean, spread, norm_weight, norm_bias, eps, weight, bias, out, run, columns):
    """`norm_project_hopper` of kernels for every card."""
    normal = torch.empty_like(head)
    norm_rows(head, mean, spread, norm_weight, norm_bias, eps, normal, (run,))
    tiles = tiles_of((run,), [(columns.start, columns.stop)], [run.width], PLAIN.rows, PLAIN.columns)
    grouped_gemm(normal, weight, bias, out, scheduled(tiles, PLAIN, head.device), tiling=PLAIN)


def project_then_norm(rows, weight, bias, head, mean, spread, norm_weight, norm_bias, eps, out, run):
    """`project_norm_hopper` of kernels for every card."""
    tiles = tiles_of((run,), [(0, run.width)], [rows.shape[1]], PLAIN.rows, PLAIN.columns)
    grouped_gemm(rows, weight, bias, head, scheduled(tiles, PLAIN, head.device), tiling=PLAIN, residual=True)
    norm_rows(head, mean, spread, norm_weight, norm_bias, eps, out, (run,))


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


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
    """Registers have to be enough for the fast form."""
    said = ptxas_on("mlp", width, tiling.rows, tiling.columns, tiling.stages, activation)
    assert_compiled(said, "_narrow_mlp")
    assert "0 bytes spill stores" in said or activation == "gelu"


@pytest.mark.parametrize("asked", [("norm", 768), ("norm", 96, 192, 384, 768), ("enter", 768)])
def test_rows_move_sixteen_bytes_at_a_time(asked):
    """And no value by itself, as where the compiler cannot know that eight of them are on the same side of a mask."""
    moves = ptxas_on(*asked).split()
    assert {"ld.global.v4.b32", "st.global.v4.b32"} <= set(moves)
    assert not any(move.endswith("b16") for move in moves)


@pytest.mark.parametrize("num_slots", [100, 197, 240, 256])
def test_scores_are_computed_beside_exponentials(num_slots):
    assert_compiled(ptxas_on("attention", num_slots), "_attention")


@pytest.mark.parametrize(("width", "columns"), [(24, 2304), (48, 1152), (96, 2304), (128, 3072), (192, 2304)])
def test_norms_before_products_have_room(width, columns):
    assert norm_project_module.fits(width, columns)
    said = ptxas_on("norm_project", width, columns)
    assert_compiled(said, "_norm_project")
    assert "0 bytes spill stores" in said


@pytest.mark.parametrize("width", [24, 48, 96, 128, 192])
def test_norms_after_products_have_room(width):
    assert project_norm_module.fits(width, DIM)
    said = ptxas_on("project_norm", width)
    assert_compiled(said, "_project_norm")
    assert "0 bytes spill stores" in said


def test_norms_beside_products_that_do_not_fit():
    assert not norm_project_module.fits(193, 2304) and not project_norm_module.fits(256, 768)
    assert not norm_project_module.fits(96, 576) and not project_norm_module.fits(96, 96)


def stand_in(monkeypatch, module, kernel, seen):
    """Run a kernel for every card in place of one for Hopper, whose name is that of its module."""
    name = module.__name__.rpartition(".")[2]

    def run(*arguments, tiling=None, **options):
        seen.append(name)
        kernel(*arguments, **({"tiling": PLAIN, **options} if tiling else {}))

    monkeypatch.setattr(module, name, run)


@pytest.mark.parametrize("num_class_tokens", [0, 1])
@pytest.mark.parametrize(("dim", "asked"), [(128, True), (128, False), (64, True)])  # 3 x 64 are no whole blocks
def test_launches_of_narrow_experts(monkeypatch, num_class_tokens, dim, asked):
    seen, half = [], torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
    stand_in(monkeypatch, norm_project_module, norm_then_project, seen)
    stand_in(monkeypatch, project_norm_module, project_then_norm, seen)
    stand_in(monkeypatch, mlp_module, narrow_mlp, seen)
    monkeypatch.setattr(fused, "num_processors", lambda _: 2)
    config = small_config(dim=dim, num_heads=4)
    blocks = small_model(config, alpha=0.5, dtype=torch.float32).to(DEVICE).encoder.blocks.requires_grad_(False)
    x, weight, alpha = (made.to(DEVICE) for made in (torch.randn(40, 13, dim), torch.rand(40, 13), torch.rand(2)))
    tokens = Tokens(x[:, :-1].to(half), None, x[0, -1:].to(half), gain=Gain(weight[:, :-1], alpha))
    segments = segments_of((5, 5, 1, 1), config.widths, 1)
    tilings = Tilings(*[PLAIN] * 4, narrow=NARROW_ROLES, norm_inside=asked)
    options = {"num_class_tokens": num_class_tokens, "tilings": tilings}
    actual = fused.run_on_rows(blocks, tokens, segments, **options)
    expected = run_on_layout(blocks, tokens.sorted().float(), segments, tokens.gains(2).float())[:, -num_class_tokens:]
    torch.testing.assert_close(actual.float(), expected, atol=2e-2, rtol=2e-2)
    launches = ["norm_project_hopper"] * 2 + ["project_norm_hopper"] * 2 if asked and dim == 128 else []
    assert seen == (launches + ["narrow_mlp_hopper"] * 2) * (2 - num_class_tokens)


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
    assert relative_error(actual, expected) < (1e-3 if wanted == dtype else 1e-2)
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
    narrow_mlp(*(x, up, up_bias, down, down_bias, expected, run, gain), tiling=PLAIN, activation=activation)
    narrow_mlp_hopper(*(x, up, up_bias, down, down_bias, actual, run, gain), tiling=tiling, activation=activation)
    own = slice(run.start, run.stop)
    torch.testing.assert_close(actual[own, :width], expected[own, :width], rtol=2e-2, atol=2e-2)
    assert relative_error(actual[own, :width], expected[own, :width]) < 1e-3
    actual[own, :width] = stream[own, :width]
    assert torch.equal(actual, stream)
    assert width <= sum(parts_of(width))


def some_rows(width, count, dtype):
    """The run of a narrow expert, where that of the next one begins, a stream, and what its LayerNorm takes."""
    torch.manual_seed(width + count)
    runs = runs_of(segments_of((count, 3), (width, DIM)), 7)
    rows = num_rows(runs)
    stream = torch.randn(rows, DIM, device="cuda", dtype=dtype)
    mean, spread = torch.randn(rows, device="cuda"), DIM * torch.rand(rows, device="cuda")
    norm_weight, norm_bias = torch.randn(2, DIM, device="cuda", dtype=dtype)
    return runs[0], runs[1].start, stream, (mean, spread, norm_weight, norm_bias, 1e-6)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("width", [96, 192, *WIDTHS])
@pytest.mark.parametrize(("dtype", "columns"), [(torch.bfloat16, range(3 * DIM)), (torch.float16, range(DIM, 3 * DIM))])
@pytest.mark.parametrize("count", [1, 5, 61, 120, 2500])  # of the last, programs have several tiles
def test_norms_before_products_as_for_every_card(width, dtype, columns, count):
    run, following, stream, norm = some_rows(width, count, dtype)
    weight = factor(torch.randn(3 * DIM, DIM, device="cuda", dtype=dtype) / 16, dtype)
    bias = torch.randn(3 * DIM, device="cuda", dtype=dtype)
    before = torch.randn(len(stream), 3 * DIM, device="cuda", dtype=dtype)
    expected, actual = before.clone(), before.clone()
    norm_then_project(stream, *norm, weight, bias, expected, run, columns)
    norm_project_hopper(stream, *norm, weight, bias, actual, run, columns)
    own, among = slice(run.start, run.stop), slice(columns.start, columns.stop)
    assert relative_error(actual[own, among], expected[own, among]) < 1e-3
    actual[:following, among] = before[:following, among]
    assert torch.equal(actual, before)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("width", [96, 192, *WIDTHS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 5, 61, 120, 2500])  # of the last, programs have several tiles
def test_norms_after_products_as_for_every_card(width, dtype, count):
    """For every card, what is added to the stream is rounded, and then the sum; here the sum alone."""
    run, following, before, norm = some_rows(width, count, dtype)
    x, normal_before = (torch.randn(len(before), DIM, device="cuda", dtype=dtype) for _ in range(2))
    weight = factor(torch.randn(DIM, DIM, device="cuda", dtype=dtype) / 16, dtype)
    bias = torch.randn(DIM, device="cuda", dtype=dtype)
    expected, actual, expected_normal, actual_normal = (t.clone() for t in (before, normal_before) for _ in range(2))
    project_then_norm(x, weight, bias, expected, *norm, expected_normal, run)
    project_norm_hopper(x, weight, bias, actual, *norm, actual_normal, run)
    norm_rows(actual, *norm, expected_normal, (run,))  # of the same stream
    own, widest = slice(run.start, run.stop), sum(parts_of(width))
    assert relative_error(actual[own, :width], expected[own, :width]) < 5e-3
    assert relative_error(actual_normal[own, :width], expected_normal[own, :width]) < 1e-3
    assert not actual_normal[own, width:widest].any()
    for written, untouched in ((actual, before), (actual_normal, normal_before)):
        written[:following, :widest] = untouched[:following, :widest]
        assert torch.equal(written, untouched)
