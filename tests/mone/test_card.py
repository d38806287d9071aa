"""The card says what the folder holds: sizes as in the config, costs as computed, where it comes from."""

import re

import pytest

from mone.baselines import METHODS, with_method
from mone.card import model_card
from mone.checkpoint import save_checkpoint
from mone.compute import clip_compute
from mone.config import ModelConfig
from tests.mone.conftest import small_config, small_model

LABELS = ["walk", "run", "jump", "sit", "wave"]


def costs(card: str) -> dict[float, tuple[str, str]]:
    """GFLOP and share of each capacity in the table."""
    rows = re.findall(r"^\| ([\d.]+) \| ([\d.]+) \| ([\d.]+%) \|$", card, re.MULTILINE)
    return {float(capacity): (gflop, share) for capacity, gflop, share in rows}


def advised(card: str) -> float:
    """Capacity of the command under "Use"."""
    (capacity,) = re.findall(r"python -m jobs\.annotate .* --capacity (\S+)", card)
    return float(capacity)


@pytest.mark.parametrize(
    "config, capacities",
    [
        (small_config(), [0.2, 0.4, 0.6, 1.0]),
        (small_config(num_experts=3), [0.4, 0.6, 1.0]),
        (small_config(num_experts=2), [0.6, 1.0]),
        (small_config(num_experts=1), [1.0]),
        (small_config(encoder="joint", temporal_depth=0), [0.2, 0.4, 0.6, 1.0]),
        (small_config(budget="clip", router="motion", pooling="mean"), [0.2, 0.4, 0.6, 1.0]),
    ],
    ids=["4 experts", "3 experts", "2 experts", "1 expert", "joint", "clip budget"],
)
def test_costs_are_those_of_the_capacities_that_the_model_has(config, capacities):
    found = costs(model_card(config, LABELS, "", 1))
    assert list(found) == capacities
    for capacity, shown in found.items():
        compute = clip_compute(config, capacity)
        assert shown == (f"{compute.flops / 1e9:.3f}", f"{compute.flops / compute.dense_flops:.1%}")
    assert found[1.0][1] == "100.0%"


@pytest.mark.parametrize("num_experts", [1, 2, 3, 4, 5])
def test_the_command_that_it_gives_is_one_that_the_model_can_run(num_experts):
    config = small_config(num_experts=num_experts)
    clip_compute(config, advised(model_card(config, LABELS, "", 1)))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_card(method):
    config = with_method(small_config(), method)
    found = costs(model_card(config, LABELS, "", 1))
    fixed = {"uniform": [(1 / 8 + 1 / 4 + 1 / 2 + 1) / 4], "proportionate": [4 / 15]}.get(method)
    assert list(found) == ([round(capacity, 3) for capacity in fixed] if fixed else [0.2, 0.4, 0.6, 1.0])
    for capacity, (gflop, _) in found.items():
        assert gflop == f"{clip_compute(config, capacity).flops / 1e9:.3f}"
    assert f"allocation: {config.allocation}" in card_line(config, "router")


def card_line(config: ModelConfig, word: str) -> str:
    return next(line for line in model_card(config, LABELS, "", 1).splitlines() if word in line)


def test_sizes_are_those_of_the_config():
    card = " ".join(model_card(small_config(), LABELS, "", 1_234_567).split())
    assert card.startswith("# Factorised ViViT with Mixtures of Nested Experts")
    for said in (
        "1.2 M parameters: 2 nested and 2 temporal blocks of width 32, 4 heads; experts of width 4, 8, 16, 32",
        "4 frames of 12 x 16 over 2.56 s, tubelets of 2 x 4 x 4",
        "router: learned; one budget per frame; allocation: mone",
        "5 classes: walk, run, jump, sit, wave | effective capacity",
    ):
        assert said in card
    joint = model_card(small_config(encoder="joint", temporal_depth=0), LABELS, "", 1)
    assert joint.startswith("# Joint ViViT") and "2 nested and 0 temporal blocks" in joint


@pytest.mark.parametrize("count, more", [(1, False), (20, False), (21, True), (400, True)])
def test_the_first_twenty_labels_are_named(count, more):
    labels = [f"class{number:03d}" for number in range(count)]
    card = model_card(small_config(num_classes=count), labels, "", 1)
    assert re.findall(r"class\d+", card) == labels[:20]
    assert f"{count} classes" in card and ("class019, ..." in card) == more


def test_notes_are_taken_as_they_are_and_their_absence_is_said():
    assert "{config} 40 % \\| `x`" in model_card(small_config(), LABELS, "{config} 40 % \\| `x`", 1)
    assert "Nothing is recorded." in model_card(small_config(), LABELS, "", 1)


def test_a_saved_model_has_its_card(tmp_path):
    model = small_model(small_config())
    card = (save_checkpoint(model, LABELS, tmp_path / "model", notes="From nowhere.") / "README.md").read_text()
    num_parameters = sum(tensor.numel() for tensor in model.state_dict().values())
    assert card == model_card(model.config, LABELS, "From nowhere.", num_parameters)
    assert not list(tmp_path.rglob("*.partial"))
