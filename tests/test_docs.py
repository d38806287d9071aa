"""What the documents say is so: files exist, numbers are those of the code, snippets run, the figure can be drawn."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from docs.figure import make_figure
from jobs.curve_record import read_records
from jobs.curve_rows import markdown, rows_of
from mone.baselines import METHODS, capacities_of
from mone.capacity import expert_shares
from mone.compute import clip_compute
from mone.config import preset
from mone.engine.roofline import block_parts
from mone.nested import segments_of

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    *(ROOT / "docs" / name for name in ("mone.md", "performance.md", "results.md", "cluster.md")),
]
TEXT = DOCUMENTS[1].read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def table_below(header: str) -> list[list[str]]:
    """Cells of the rows of the Markdown table that has this header."""
    lines = TEXT[TEXT.index(header) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_and_every_file_named_exists(document):
    text = document.read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    named = re.findall(r"`([a-z_]+/[\w/]*(?:\.\w+)?)`", text)
    assert links and named
    missing = [link for link in links if not (document.parent / link).exists()]
    assert missing + [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name", ["motions", "ucf101_5", "scfd_fight"])
def test_tables_of_results_are_those_of_their_runs(name):
    folder = ROOT / "docs/results" / name
    rows = rows_of(read_records(folder / "curves.json"))
    assert (folder / "curves.md").read_text() == markdown(rows)
    assert {row.series.method for row in rows} >= {"dense", "mone", "random_router"}
    assert min(row.num_runs for row in rows) >= 3


def test_shares_counts_and_costs_are_those_of_the_code():
    rows = table_below("| e_c | D/8 ")
    assert len(rows) >= 5
    config = preset("base", num_classes=400)
    for capacity, *shares, counts, gflop, of_full in rows:
        cost = clip_compute(config, float(capacity))
        assert shares == [f"{share:.3f}" for share in expert_shares(float(capacity), 4)]
        assert counts == ", ".join(map(str, config.token_counts(float(capacity))))
        assert gflop == f"{cost.flops / 1e9:.1f}"
        assert of_full == f"{cost.flops / cost.dense_flops:.1%}".replace("%", " %")


def test_the_floor_is_that_of_the_formulas():
    config = preset("base", num_classes=400)
    floor = DOCUMENTS[2].read_text().partition("## The floor")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([\d.]+) \| (.*) \|$", floor, re.MULTILINE)
    assert len(rows) >= 4
    for capacity, cells in rows:
        parts = block_parts(config, segments_of(config.token_counts(float(capacity)), config.widths, 1), 256)
        floors = [12e3 * sum(part.seconds(*rates) for part in parts) for rates in ((989e12, 3.35e12), (600e12, 3e12))]
        totals = 12e-12 * sum(part.flops for part in parts), 12e-9 * sum(part.num_bytes for part in parts)
        assert cells == " | ".join([f"{totals[0]:.2f}", *(f"{value:.1f}" for value in (totals[1], *floors))])


def test_attention_costs_a_joint_encoder_more():
    shares = []
    for config in (preset("base", num_classes=400, encoder=encoder) for encoder in ("factorised", "joint")):
        cost = clip_compute(config, 0.4)
        shares.append(f"{cost.flops / cost.dense_flops:.0%}".replace("%", " %"))
    assert f"0.4 costs {shares[0]} and not 40 %, and {shares[1]} in a joint encoder" in TEXT


def test_the_projections_of_a_token_cost_what_the_formula_says():
    assert sum(int(number or 1) for number in re.findall(r"\| (\d*) ?d D \|", TEXT)) == 4 + 2 * 4


def test_every_method_is_named_with_its_capacity():
    rows = dict(table_below("| name | what it is |"))
    assert [name.strip("`") for name in rows] == list(METHODS)
    for name in ("uniform", "proportionate"):
        (fixed,) = capacities_of(name, preset("base", num_classes=2), [])
        assert rows[f"`{name}`"].endswith(f"capacity {fixed:.3f}")


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippets_run(snippet, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(snippet, "docs/mone.md", "exec"), {})


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_figure_can_be_drawn(tmp_path, suffix):
    path = make_figure(tmp_path / f"figure.{suffix}")
    if suffix == "svg":
        assert path.read_text().count("<image") == 8  # four frames, four maps
        assert all(file.stat().st_size < 300_000 for file in (path, ROOT / "docs/mone.svg"))
    else:
        with Image.open(path) as image:
            assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 1000
