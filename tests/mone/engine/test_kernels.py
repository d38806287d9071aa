"""Each Triton kernel against plain PyTorch, on the GPU or in the interpreter."""

import itertools

import pytest
import torch
import torch.nn.functional as F
import triton
from hypothesis import given
from hypothesis import strategies as st

from mone.engine.casts import EIGHT_BITS, Factor, factor
from mone.engine.kernels.attention import attend_rows
from mone.engine.kernels.attention_last import mix_rows
from mone.engine.kernels.embed import embed_patches, fits
from mone.engine.kernels.enter import enter_rows
from mone.engine.kernels.gelu import FORMS, form_of
from mone.engine.kernels.gemm import grouped_gemm, scheduled
from mone.engine.kernels.narrow_mlp import narrow_mlp, parts_of
from mone.engine.kernels.norm import norm_rows
from mone.engine.kernels.pixels import shift_and_scale
from mone.engine.kernels.route import prefer, score
from mone.engine.rows import ALIGNMENT, Places, num_rows, row_of_token, runs_of, tiles_of
from mone.engine.tilings import Attending, Tiling
from mone.engine.tokens import Gain, Positions, Tokens
from mone.nested import segments_of
from mone.routing import expert_preferred_routing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTHS, DIM, SEQUENCES = (16, 32, 64, 128), 128, 3
TILE = Tiling(32, 64, 32, 4, 2)
COUNTS = pytest.mark.parametrize("counts", [(60, 40, 3, 7), (0, 0, 0, 5), (9, 0, 1, 0)])


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def rows_of(counts):
    runs = runs_of(segments_of(counts, WIDTHS), SEQUENCES)
    return runs, num_rows(runs)


def schedule_of(runs, columns, inner):
    return scheduled(tiles_of(runs, columns, inner, TILE.rows, TILE.columns), TILE, DEVICE)


def assert_near(actual, expected, dtype):
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    assert error < {torch.float32: 1e-3, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]  # float32: TF32 on a GPU


@given(
    counts=st.lists(st.integers(0, 300), min_size=1, max_size=4).filter(any),
    columns=st.sampled_from([64, 96, 128]),
    block_rows=st.sampled_from([16, 64, 128]),
)
def test_tiles_cover_every_row_and_column_of_an_expert_once(counts, columns, block_rows):
    runs = runs_of(segments_of(tuple(counts), WIDTHS[-len(counts) :]), SEQUENCES)
    assert all(run.start % ALIGNMENT == 0 for run in runs)
    assert all(first.stop <= second.start for first, second in itertools.pairwise(runs))
    assert sum(run.stop - run.start for run in runs) == SEQUENCES * sum(counts)
    tiles = tiles_of(runs, [(0, columns)] * len(runs), [run.width for run in runs], block_rows, 32)
    covered = {(row + i, column) for row, column, _ in tiles for i in range(block_rows)}
    assert len(covered) == len(tiles) * block_rows
    for run in runs:
        assert all((row, column) in covered for row in range(run.start, run.stop) for column in range(0, columns, 32))
    assert [size for _, _, size in tiles] == sorted((size for _, _, size in tiles), reverse=True)


@COUNTS
@pytest.mark.parametrize("activation", ["", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_products_from_the_first_features(counts, activation, dtype):
    runs, rows = rows_of(counts)
    x, weight, bias = randn(rows, DIM, dtype=dtype), randn(192, DIM, dtype=dtype) / 8, randn(192)
    out = torch.full((rows, 192), torch.nan, dtype=dtype, device=DEVICE)
    for run in runs:
        x[run.start : run.stop, run.width :] = 0
    schedule = schedule_of(runs, [(0, 192)] * len(runs), [run.width for run in runs])
    grouped_gemm(x, Factor(weight, None), bias, out, schedule, tiling=TILE, activation=activation)
    for run in runs:
        own = slice(run.start, run.stop)
        expected = x[own].double() @ weight.double().T + bias
        if activation:
            expected = F.gelu(expected, approximate="tanh" if activation == "gelu_tanh" else "none")
        assert_near(out[own], expected, dtype)


@COUNTS
def test_products_of_eight_bits_are_those_of_their_values(counts):
    runs, rows = rows_of(counts)
    x, bias, gain = randn(rows, DIM).to(EIGHT_BITS), randn(192), randn(rows)
    weight = factor(randn(192, DIM) * torch.logspace(-6, 3, 192, device=DEVICE)[:, None], EIGHT_BITS)
    before = randn(rows, 192)
    for run in runs:
        x[run.start : run.stop, run.width :] = 0
    schedule = schedule_of(runs, [(0, 192)] * len(runs), [run.width for run in runs])
    stream = before.clone()
    grouped_gemm(x, weight, bias, stream, schedule, tiling=TILE, residual=True, gain_R=gain)
    for run in runs:
        own = slice(run.start, run.stop)
        product = x[own].double() @ (weight.values.double() * weight.scale_O[:, None]).T + bias
        assert_near(stream[own], before[own] + gain[own, None] * product, torch.float16)


@COUNTS
def test_products_onto_the_first_features(counts):
    runs, rows = rows_of(counts)
    x, weight, bias = randn(rows, 192, dtype=torch.float16), randn(DIM, 192, dtype=torch.float16) / 14, randn(DIM)
    stream, gain = randn(rows, DIM), randn(rows)
    before = stream.clone()
    schedule = schedule_of(runs, [(0, run.width) for run in runs], [192] * len(runs))
    grouped_gemm(x, Factor(weight, None), bias, stream, schedule, tiling=TILE, residual=True, gain_R=gain)
    for run in runs:
        own, d = slice(run.start, run.stop), run.width
        product = x[own].double() @ weight[:d].double().T + bias[:d]
        assert_near(stream[own, :d], before[own, :d] + gain[own, None] * product, torch.float16)


@COUNTS
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_norms_of_heads_are_those_of_whole_tokens(counts, offset):
    runs, rows = rows_of(counts)
    row_SN = row_of_token(runs, SEQUENCES, DEVICE)
    x_SND = randn(SEQUENCES, sum(counts), DIM) + offset
    head, normal = (torch.full((rows, DIM), torch.nan, device=DEVICE) for _ in range(2))
    mean, spread = torch.empty(2, rows, device=DEVICE).unbind(0)
    enter_rows(Tokens(x_SND), runs, row_SN, head, mean, spread, torch.empty(1, rows, device=DEVICE))
    weight, bias = randn(DIM), randn(DIM)
    norm_rows(head, mean, spread, weight, bias, 1e-6, normal, runs)
    expected = F.layer_norm(x_SND.double(), (DIM,), weight.double(), bias.double(), 1e-6)
    for run in runs:
        tokens = slice(run.token, run.token + run.count)
        actual = normal[row_SN[:, tokens]]
        assert_near(actual[..., : run.width], expected[:, tokens, : run.width], torch.float32)
        padded = max(64, run.width)
        assert not actual[..., run.width : padded].any()


@pytest.mark.parametrize("num_slots", [1, 5, 16, 64, 70, 260])
@pytest.mark.parametrize("attending", [None, Attending(16, 32, 4, 2), Attending(16, 32, 4, 2, whole=False)])
def test_attention_over_rows_in_any_order(num_slots, attending):
    groups, heads = 3, 2
    rows = groups * num_slots + 4
    qkv, out = randn(rows, 3 * 32, dtype=torch.float16), torch.zeros(rows, 32, dtype=torch.float16, device=DEVICE)
    read = torch.randperm(rows, device=DEVICE)[: groups * num_slots].view(groups, num_slots)
    write = read.clone()
    write[0, 0] = -1  # nobody takes this one
    attend_rows(qkv, out, Places(read, write), heads, attending=attending)
    q, k, v = (t.double().view(groups, num_slots, heads, 16).transpose(1, 2) for t in qkv[read].split(32, dim=-1))
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    taken = write >= 0
    assert_near(out[write[taken]], expected[taken], torch.float16)
    untouched = torch.ones(rows, dtype=torch.bool, device=DEVICE)
    untouched[write[taken]] = False
    assert not out[untouched].any()


@pytest.mark.parametrize("num_slots", [1, 70])
@pytest.mark.parametrize("heads", [2, 20])
def test_rows_of_all_widths_are_mixed_by_one_query_for_each_head(num_slots, heads):
    runs, rows = rows_of((1, 50, 3, 16))
    width = torch.zeros(rows, dtype=torch.long, device=DEVICE)
    for run in runs:
        width[run.start : run.stop] = run.width
    known = (width > 0).nonzero().flatten()
    read = known[torch.randperm(len(known), device=DEVICE)[: 2 * num_slots]].view(2, num_slots)
    normal, query = randn(rows, DIM, dtype=torch.float16), randn(heads, 2, DIM, dtype=torch.float16)
    inside = torch.arange(DIM, device=DEVICE) < width[:, None]
    group = torch.where(inside, normal, 0)[read].double()
    weights = (torch.einsum("hgd,gmd->hgm", query.double(), group) / 4).softmax(dim=-1)
    expected = torch.einsum("hgm,gmd->hgd", weights, group)
    normal[~inside] = torch.nan  # what lies past a row's width may be anything
    assert_near(mix_rows(query, normal, read, runs, 1 / 4), expected, torch.float16)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("width", [32, 48, 112])
@pytest.mark.parametrize("dtype", [torch.float16, EIGHT_BITS])
def test_mlp_of_a_narrow_expert(activation, width, dtype):
    runs = runs_of(segments_of((0, 50, 0, 9), (16, width, 64, 128)), SEQUENCES)
    rows = num_rows(runs)
    run, half = runs[0], torch.float16
    x, up, down = randn(rows, DIM, dtype=dtype), randn(256, DIM, dtype=half) / 8, randn(DIM, 256, dtype=half) / 16
    up, down = factor(up, dtype), factor(down, dtype)
    up_bias, down_bias, gain, stream = randn(256), randn(DIM), randn(rows), randn(rows, DIM)
    before = stream.clone()
    x[run.start : run.stop, run.width :] = 0
    narrow_mlp(x, up, up_bias, down, down_bias, stream, run, gain, tiling=TILE, activation=activation)
    own, d = slice(run.start, run.stop), run.width
    up, down = (f.values.double() * (1 if f.scale_O is None else f.scale_O[:, None]) for f in (up, down))
    hidden = x[own, :d].double() @ up[:, :d].T + up_bias
    hidden = F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none").to(dtype).double()
    product = hidden @ down[:d].T + down_bias[:d]
    error = (stream[own, :d] - before[own, :d] - gain[own, None] * product).norm() / product.norm()
    # In 8 bits the two do not always round to the same side; the interpreter does not round at all.
    assert error < (1e-3 if dtype == half else 0.02 if DEVICE.type == "cuda" else 0.1)
    assert torch.equal(stream[runs[1].start :], before[runs[1].start :])


# The largest error, of which the second part grows with the input: what an instruction for tanh leaves.
GELU_ERRORS = {
    "gelu": (1e-6, 1e-6),
    "gelu_tanh": (1e-6, 1e-6),
    "gelu_fast": (2.8e-4, 2.5e-4),
    "gelu_tanh_fast": (1e-6, 2.5e-4),
    "gelu_poly": (1e-4, 3e-6),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 3.0, 10.0, 100.0])
def test_forms_of_gelu_keep_their_bounds(form, scale):
    x, out = randn(128, 32) * scale, torch.empty(128, 32, device=DEVICE)
    eye, nothing, tiling = torch.eye(32, device=DEVICE), torch.zeros(32, device=DEVICE), Tiling(128, 32, 32, 4, 1)
    schedule = scheduled([(0, 0, 32)], tiling, DEVICE)
    grouped_gemm(x, Factor(eye, None), nothing, out, schedule, tiling=tiling, activation=form)
    fixed, relative = GELU_ERRORS[form]
    relative += 2e-3 if DEVICE.type == "cuda" else 0.0  # TF32
    exact = F.gelu(x.double(), approximate="tanh" if "tanh" in form else "none")
    assert ((out - exact).abs() <= fixed + relative * x.abs()).all()


@pytest.mark.parametrize(
    ("approximate", "dtype", "form"),
    [
        ("none", torch.bfloat16, "gelu_fast"),
        ("tanh", torch.bfloat16, "gelu_tanh_fast"),
        ("none", torch.float16, "gelu"),
        ("tanh", torch.float32, "gelu_tanh"),
    ],
)
def test_gelu_is_as_exact_as_the_dtype(approximate, dtype, form):
    assert form_of(approximate, dtype) == form


def test_error_of_fast_gelu_is_small_against_the_rounding_of_bfloat16():
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    exact = F.gelu(x)
    fast = x * torch.sigmoid(2 * x * (0.8001570728575322 + 0.034700895977356414 * x.square()))
    rounding = (exact.bfloat16() - exact).square().mean().sqrt()
    assert (fast - exact).square().mean().sqrt() < 0.05 * rounding


@pytest.mark.parametrize("width", [16, 17, 24, 48, 64, 80, 96, 112, 128, 192, 384, 768])
def test_parts_hold_a_width(width):
    parts = parts_of(width)
    assert width <= sum(parts) <= max(32, triton.next_power_of_2(width))
    assert all(part == 0 or (part >= 32 and part & (part - 1) == 0) for part in parts)
    assert parts == {16: (32, 0), 48: (64, 0), 96: (64, 32), 112: (128, 0), 128: (128, 0)}.get(width, parts)


@pytest.mark.parametrize("cumulative", [False, True])
@pytest.mark.parametrize(
    "counts", [(5, 3, 2, 2), (0, 0, 0, 12), (12, 0, 0, 0), (4, 4), (3, 1, 2), (7,), (60, 30, 20, 9)]
)
@pytest.mark.parametrize("kind", ["all different", "ties", "not a number"])
def test_experts_choose_as_in_the_reference(counts, cumulative, kind):
    probabilities = randn(2, sum(counts), len(counts)).softmax(-1)
    if kind == "ties":
        probabilities = (probabilities * 4).round() / 4
    if kind == "not a number":
        probabilities[:, 1::3] = torch.nan
    for routed in (counts, (counts[0] // 2, *counts[1:])):
        if sum(routed) == 0:
            continue
        expected = expert_preferred_routing(probabilities, routed, cumulative=cumulative)
        actual = prefer(probabilities, routed, cumulative=cumulative)
        for one, other in zip(actual, expected[:3], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.float16, torch.float32), (torch.float16,) * 2]
)
def test_tokens_are_scored_with_their_positions(placed, dtypes):
    x, weight, bias = randn(3, 12, 48, dtype=dtypes[0]), randn(4, 48), randn(4)
    positions = Positions(randn(6, 48, dtype=dtypes[1]), torch.randint(12, (3, 12), device=DEVICE) if placed else None)
    expected = F.linear(positions.added_to(x).float(), weight, bias)
    torch.testing.assert_close(score(x, positions, weight, bias), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("counts", [(5, 3, 2, 2), (4, 0, 1, 1)])
def test_tokens_enter_placed_and_sorted_with_their_gains(placed, counts):
    segments = segments_of(counts, (12, 32, 64, 128), 1)  # 12 is no multiple of 8
    runs = runs_of(segments, SEQUENCES)
    order = torch.stack([torch.randperm(12)[: sum(counts)] for _ in range(SEQUENCES)]).to(DEVICE)
    positions = Positions(randn(4, DIM), torch.randint(12, (SEQUENCES, 12), device=DEVICE) if placed else None)
    gain = Gain(torch.rand(SEQUENCES, 12).to(DEVICE), torch.rand(3).to(DEVICE))
    tokens = Tokens(randn(SEQUENCES, 12, DIM), order, randn(1, DIM), positions, gain)
    row_SN = row_of_token(runs, SEQUENCES, DEVICE)
    head, (mean, spread) = torch.full((num_rows(runs), DIM), torch.nan, device=DEVICE), randn(2, num_rows(runs))
    gain_LR = torch.full((3, num_rows(runs)), torch.nan, device=DEVICE)
    enter_rows(tokens, runs, row_SN, head, mean, spread, gain_LR)
    torch.testing.assert_close(gain_LR[:, row_SN], tokens.gains(3).squeeze(-1))
    for run in runs:
        own = slice(run.token, run.token + run.count)
        expected, tail = tokens.sorted()[:, own].split([run.width, DIM - run.width], dim=-1)
        assert torch.equal(head[row_SN[:, own], : run.width], expected)
        assert head[row_SN[:, own], run.width :].isnan().all()
        if run.width < DIM:
            torch.testing.assert_close(mean[row_SN[:, own]], tail.mean(-1), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(spread[row_SN[:, own]], tail.var(-1, correction=0) * tail.shape[-1])


MEANS = pytest.mark.parametrize("each", [False, True], ids=["one mean", "a mean for each patch"])


@MEANS
@pytest.mark.parametrize(("patch_values", "dim"), [(48, 24), (144, 320)])
def test_patches_become_tokens(each, patch_values, dim):
    patches = torch.randint(256, (3, 50, patch_values), dtype=torch.uint8, device=DEVICE)
    mean = 255 * torch.rand(3, 50, device=DEVICE) if each else 127.5
    weight, bias = randn(dim, patch_values, dtype=torch.float16), randn(dim)
    tokens = torch.full((3, 50, dim), torch.nan, dtype=torch.float16, device=DEVICE)
    assert fits(patches, dim) and not fits(patches[..., 8:], dim) and not fits(patches[:0], dim)
    embed_patches(patches, mean, 64.0, weight, bias, tokens)
    pixels = (patches.double() - (mean.unsqueeze(-1) if each else mean)) / 64
    assert_near(tokens, F.linear(pixels, weight.double(), bias.double()), torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@MEANS
def test_pixels_are_shifted_and_scaled(each, dtype):
    patches = torch.randint(256, (3, 50, 48), dtype=torch.uint8, device=DEVICE)
    mean = 255 * torch.rand(3, 50, device=DEVICE) if each else 127.5
    actual = shift_and_scale(patches[:, 1:], mean[:, 1:] if each else mean, 64.0, dtype)  # not contiguous
    shifted = patches.float() - (mean.unsqueeze(-1) if each else mean)
    assert_near(actual, (shifted / 64)[:, 1:], dtype)
