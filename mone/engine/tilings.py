"""How the kernels cut their work into tiles: defaults by card, and choices that were measured and kept on disk.

Nothing is measured in inference: whoever measures keeps a choice with `keep`, and a process reads the file once.
Another tiling sums in another order, so a process never changes its mind.
"""

import functools
import json
import math
import os
import platform
from pathlib import Path
from typing import NamedTuple

import torch

from mone.engine.rows import Run
from mone.engine.support import gluon_runs


class Tiling(NamedTuple):
    """Sizes of a tile, and how a program runs: warps, stages of loads in flight, programs on a processor.

    With `halves` a tile is finished one half of its columns after the other, which takes half the room. With `roles` it
    is for the kernel whose warps have roles, which has four warps for each 64 rows and sums over whole widths.
    """

    rows: int = 128
    columns: int = 128
    inner: int = 64
    warps: int = 8
    stages: int = 3
    programs: int = 1
    halves: bool = False
    roles: bool = False

    def share_busy(self, num_rows: int, processors: int) -> float:
        """How full the rounds are in which a card takes one program for each tile of rows."""
        tiles, places = math.ceil(num_rows / self.rows), processors * self.programs
        return tiles / (math.ceil(tiles / places) * places)


class Attending(NamedTuple):
    """How attention is cut: queries and keys of a block, warps and stages of loads in flight of a program.

    `whole`: a program has all queries and keys of a head on the chip, and takes several heads; for short groups.
    `roles`: where groups are as it needs them, that is done by the kernel whose warps have roles.
    """

    block_q: int = 128
    block_k: int = 64
    warps: int = 8
    stages: int = 2
    whole: bool = True
    roles: bool = False


class Tilings(NamedTuple):
    """How each of a block's parts is cut into tiles.

    Attributes:
        qkv, out, up, down: The products.
        narrow: For MLPs in one launch, (largest width, tiling) by width, with a choice of tilings for some; wider
            experts take two launches.
        attention: Attention.
        norm_inside: Whether experts whose MLP is one launch have the LayerNorms before and after their other products
            done there, where the kernels for that, whose warps have roles, take them.
    """

    qkv: Tiling
    out: Tiling
    up: Tiling
    down: Tiling
    narrow: tuple[tuple[int, Tiling], ...] = ()
    attention: Attending = Attending()
    norm_inside: bool = False

    def narrow_of(self, width: int, num_hidden: int, num_rows: int, processors: int) -> Tiling | None:
        """The tiling of an expert whose MLP is one launch: of those for its width the one that keeps a card busiest.

        None where the expert is too wide, or where its rows leave most processors idle, as each program
        goes through the whole hidden layer.
        """
        fitting = [
            (widest, tiling) for widest, tiling in self.narrow if width <= widest and num_hidden % tiling.columns == 0
        ]
        closest = [tiling for widest, tiling in fitting if widest == fitting[0][0]]
        if not closest or 2 * num_rows < processors * max(tiling.rows for tiling in closest):
            return None
        return max(closest, key=lambda tiling: tiling.share_busy(num_rows, processors))


def _deeper(tilings: Tilings) -> Tilings:
    """The same number of bytes at a time, of factors half as large."""
    products = {name: getattr(tilings, name) for name in ("qkv", "out", "up", "down")}
    return tilings._replace(**{name: tiling._replace(inner=2 * tiling.inner) for name, tiling in products.items()})


def _with_roles(tilings: Tilings) -> Tilings:
    return tilings._replace(attention=tilings.attention._replace(roles=True), norm_inside=True)


class _Card(NamedTuple):
    """Tilings for dense tokens, for nested ones of about 0.4 of the width or more, for narrower ones.

    And for a clip or two, which leave a card half empty, dense and nested; and for the vectors of a temporal encoder.
    """

    dense: Tilings
    nested: Tilings
    narrow: Tilings
    few_dense: Tilings
    few: Tilings
    fewest: Tilings


# Measured on an H100. Two programs share a processor, so that one finishes a tile while the other multiplies.
_FINE = Tiling(128, 128, 64, 4, 3, 2, True)
_WIDE = Tiling(128, 256, 64, 8, 4, 1, True)
_FLAT = Tiling(64, 128, 64, 4, 4, 2)
_NARROW = (
    *[
        (128, tiling)
        for tiling in (Tiling(128, 64, 64, 8, 3, 2), Tiling(64, 64, 64, 4, 2, 3), Tiling(128, 128, 64, 8, 3))
    ],
    (192, Tiling(128, 64, 64, 8, 2)),
)
NARROW_ROLES = tuple(
    (widest, Tiling(rows, 64, stages=3, roles=True)) for widest, rows in ((96, 192), (128, 128), (192, 128))
)
_NARROW_8 = (
    *[(128, tiling) for tiling in (Tiling(64, 64, 64, 4, 2, 4), Tiling(128, 128, 64, 8, 2))],
    (192, Tiling(128, 128, 64, 8, 3)),
)
_ALL_FINE = Tilings(_FINE, _FINE, _FINE, _FINE, _NARROW)
_ONLINE = Attending(64, 64, 4, 2, whole=False)
# Weights are read once, by as many programs and as far ahead as possible.
_THIN, _THINNEST = Tiling(64, 128, 128, 4, 4), Tiling(64, 32, 128, 4, 4)
_HOPPER = _Card(
    dense=Tilings(_WIDE, _WIDE, _WIDE, _WIDE._replace(stages=3), _NARROW),
    nested=Tilings(_FINE, _FINE, _FINE, _WIDE, _NARROW),
    narrow=_ALL_FINE,
    few_dense=_ALL_FINE._replace(attention=_ONLINE),
    few=Tilings(_FINE, _FLAT, _FLAT, _FLAT, _NARROW, _ONLINE),
    fewest=Tilings(_THIN, _THINNEST, _THIN, _THINNEST),
)
_DENSE_8 = Tilings(_FINE, _FINE, _FINE, _WIDE, _NARROW)
_HOPPER_8 = _Card(*(_deeper(tilings)._replace(narrow=_NARROW_8) for tilings in _HOPPER._replace(dense=_DENSE_8)))
_HOPPER_ROLES = _Card(*(_with_roles(tilings)._replace(narrow=NARROW_ROLES) for tilings in _HOPPER))
_HOPPER_8_ROLES = _Card(*(_with_roles(tilings) for tilings in _HOPPER_8))
# Never measured: what fits. A100 has 163 KB of shared memory for a program, L4 and other cards of its kind 99 KB.
_LARGE = Tiling(128, 128, 64, 8, 3)
_A100 = Tilings(*[_LARGE] * 4, narrow=((128, Tiling(128, 64, 64, 8, 2)),), attention=_ONLINE)
_SMALL = Tiling(128, 128, 32, 8, 3)
_L4 = Tilings(*[_SMALL] * 4, narrow=((64, Tiling(64, 64, 64, 4, 2)),), attention=_ONLINE)
_L4_8 = _deeper(_L4)
# Of the full width: from which on tokens are as good as dense, and from which on wide tiles fill the card.
_DENSE_SHARE, _NESTED_SHARE = 0.75, 0.38
_FEW_ROWS, FEWEST_ROWS = 8192, 512


def tilings_for(device: torch.device, runs: tuple[Run, ...], dim: int, *, eight_bits: bool = False) -> Tilings:
    """Those that were measured for this card and such a batch, else the card's defaults."""
    if found := chosen().get(key_of(device, runs, dim, eight_bits=eight_bits)):
        return found
    return defaults_for(device, runs, dim, eight_bits=eight_bits)


def defaults_for(
    device: torch.device, runs: tuple[Run, ...], dim: int, *, eight_bits: bool = False, roles: bool = True
) -> Tilings:
    """What a device takes for such a batch where nothing was measured; if so asked, without kernels with roles."""
    rows, roles = sum(run.stop - run.start for run in runs), roles and gluon_runs(device)
    return default_tilings(_capability(device), mean_share(runs, dim), rows, eight_bits=eight_bits, roles=roles)


def default_tilings(
    capability: tuple[int, int], share: float, num_rows: int, *, eight_bits: bool = False, roles: bool = False
) -> Tilings:
    """Without measuring.

    Args:
        capability: Compute capability.
        share: Mean width of the tokens as a share of the full width.
        num_rows: Tokens of the batch.
        eight_bits: Whether factors have 8 bits.
        roles: Whether the kernels run whose warps have roles; on Hopper alone.
    """
    if capability >= (9, 0):
        plain, with_roles = (_HOPPER_8, _HOPPER_8_ROLES) if eight_bits else (_HOPPER, _HOPPER_ROLES)
        card = with_roles if roles else plain
        if num_rows <= FEWEST_ROWS:
            return card.fewest
        few = num_rows < _FEW_ROWS
        if share >= _DENSE_SHARE:
            return card.few_dense if few else card.dense
        if few:
            return card.few
        return card.nested if share >= _NESTED_SHARE else card.narrow
    if eight_bits:
        return _L4_8
    return _A100 if capability == (8, 0) else _L4


def mean_share(runs: tuple[Run, ...], dim: int) -> float:
    """Mean width of the rows as a share of the full width."""
    rows = sum(run.stop - run.start for run in runs)
    return sum((run.stop - run.start) * run.width for run in runs) / (rows * dim)


def key_of(device: torch.device, runs: tuple[Run, ...], dim: int, *, eight_bits: bool = False) -> str:
    """What a choice holds for: card, Triton, bits, D, mean width to a tenth, rows to a power of two."""
    import triton

    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    rows = sum(run.stop - run.start for run in runs)
    card += " fp8" * eight_bits
    return f"{card} triton-{triton.__version__} dim-{dim} share-{mean_share(runs, dim):.1f} rows-{rows.bit_length()}"


def choices_file() -> Path:
    """Where choices are kept: MONE_TILINGS, else in the user's folder of caches."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MONE_TILINGS") or Path(cache) / "mone" / "tilings.json")


@functools.cache
def chosen() -> dict[str, Tilings]:
    """The choices on disk, read once; none where there is no file.

    Raises:
        ValueError: The file is not one of these.
    """
    file = choices_file()
    if not file.is_file():
        return {}
    try:
        return {key: _decoded(value) for key, value in json.loads(file.read_text()).items()}
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} holds no tilings; remove it or tune again") from error


def keep(key: str, tilings: Tilings) -> Path:
    """Add a choice to those on disk, for processes that start after it."""
    file = choices_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(file.read_text()) if file.is_file() else {}
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({**known, key: tilings._asdict()}, indent=1))
    partial.replace(file)
    return file


def _decoded(value: dict) -> Tilings:
    narrow = tuple((widest, Tiling(*tiling)) for widest, tiling in value["narrow"])
    products = {name: Tiling(*value[name]) for name in ("qkv", "out", "up", "down")}
    attention, norm_inside = Attending(*value["attention"]), value["norm_inside"]
    return Tilings(**products, narrow=narrow, attention=attention, norm_inside=norm_inside)


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
