"""Defaults by card, and choices that are kept on disk."""

import itertools

import pytest
import torch

from mone.engine.rows import runs_of
from mone.engine.tilings import (
    NARROW_ROLES,
    Attending,
    Tiling,
    Tilings,
    choices_file,
    chosen,
    default_tilings,
    keep,
    key_of,
    mean_share,
    tilings_for,
)
from mone.nested import segments_of

CPU = torch.device("cpu")
RUNS = runs_of(segments_of((4, 2, 1, 1), (96, 192, 384, 768)), 16)
ODD = Tilings(*[Tiling(32, 32, 32, 4, 1)] * 4, narrow=((96, Tiling(64, 64)),), attention=Attending(64))


@pytest.fixture(autouse=True)
def own_file(tmp_path, monkeypatch):
    monkeypatch.setenv("MONE_TILINGS", str(tmp_path / "deep" / "tilings.json"))
    chosen.cache_clear()
    yield
    chosen.cache_clear()


@pytest.mark.parametrize(("capability", "room"), [((9, 0), 232448), ((8, 0), 166912), ((8, 9), 101376), ((12, 0), 0)])
def test_defaults_leave_room_for_the_loads_of_products(capability, room):
    for share, num_rows, eight_bits in itertools.product((0.2, 0.5, 1.0), (3000, 50_000), (False, True)):
        tilings = default_tilings(capability, share, num_rows, eight_bits=eight_bits)
        for tiling in tilings[:4]:
            loads = tiling.stages * (tiling.rows + tiling.columns) * tiling.inner * (1 if eight_bits else 2)
            assert not room or loads < room


def test_a_choice_is_used_from_the_next_process_on():
    before = tilings_for(CPU, RUNS, 768)
    key = key_of(CPU, RUNS, 768)
    assert keep(key, ODD) == choices_file() and keep("another", before)
    assert tilings_for(CPU, RUNS, 768) == before != ODD
    chosen.cache_clear()
    assert tilings_for(CPU, RUNS, 768) == ODD
    assert chosen() == {key: ODD, "another": before}
    assert tilings_for(CPU, RUNS[-1:], 768) == default_tilings((0, 0), 1.0, 3000)


def test_a_damaged_file_is_named():
    choices_file().parent.mkdir()
    choices_file().write_text('{"a": {"qkv": 3}}')
    with pytest.raises(ValueError, match=r"tilings\.json"):
        chosen()


def test_narrow_experts_are_those_that_a_tiling_is_for():
    assert ODD.narrow_of(96, 512, 1000, 2) == Tiling(64, 64)
    assert ODD.narrow_of(97, 512, 1000, 2) is None
    assert ODD.narrow_of(48, 96, 1000, 2) is None  # hidden features are no multiple of its columns
    assert ODD.narrow_of(48, 512, 1000, 32) is None  # 16 tiles of rows for 32 processors


def test_of_several_tilings_the_one_whose_rounds_are_full_is_taken():
    shared, thin, whole = Tiling(128, 64, programs=2), Tiling(64, 64, programs=3), Tiling(128, 128)
    tilings = ODD._replace(narrow=((128, shared), (128, thin), (128, whole), (192, Tiling(64, 64))))
    taken = [tilings.narrow_of(96, 512, rows, 132) for rows in (30720, 21504, 16128)]
    assert taken == [shared, thin, whole]
    assert shared.share_busy(128 * 132 * 2, 132) == 1
    assert shared.share_busy(128 * 132, 132) == 0.5


def test_warps_have_roles_where_half_of_the_processors_have_a_program():
    tilings = ODD._replace(narrow=NARROW_ROLES)
    taken = [tilings.narrow_of(width, 3072, rows, 132) for width, rows in ((96, 12672), (96, 12671), (97, 8448))]
    assert [tiling and tiling.rows for tiling in taken] == [192, None, 128]
    assert all(tilings.narrow_of(width, 3072, 20000, 132).roles for width in (24, 96, 128, 192))
    assert tilings.narrow_of(193, 3072, 20000, 132) is None


@pytest.mark.parametrize("eight_bits", [False, True])
def test_roles_change_attention_and_narrow_experts_alone(eight_bits):
    for share, rows in itertools.product((0.2, 0.4, 1.0), (100, 3000, 50_000)):
        plain, roles = (
            default_tilings((9, 0), share, rows, eight_bits=eight_bits, roles=roles) for roles in (False, True)
        )
        assert roles.narrow == (plain.narrow if eight_bits else NARROW_ROLES)
        assert roles.attention == plain.attention._replace(roles=True) != plain.attention
        assert roles.norm_inside > plain.norm_inside
        assert roles[:4] == plain[:4]


def test_the_mean_width_is_that_of_all_rows():
    assert mean_share(RUNS, 768) == pytest.approx((4 * 96 + 2 * 192 + 384 + 768) / 8 / 768)
