import math
from dataclasses import replace
from itertools import islice

import pytest
import torch

from mone.capacity import token_counts
from mone.model import ViViT
from mone.training import Batch, DivergedError, Stage, TrainConfig, Trainer, accuracy, schedule
from tests.mone.conftest import small_config, some_patches

CONFIG = small_config(num_classes=4, num_frames=2, height_px=16, dim=32, depth=1, temporal_depth=1)  # 4 x 4 tokens
STAGES = (
    Stage(name="first", epochs=1, routing="nested"),
    Stage(name="second", epochs=3, routing="mone", learning_rate=3e-3),
)


class Clips:
    """Clips in memory."""

    def __init__(self, patches_BFNP, labels_B):
        self.patches_BFNP, self.labels_B = patches_BFNP, labels_B

    def __len__(self):
        return len(self.labels_B)

    def batches(self, batch_size, generator):
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for chosen in order.split(batch_size):
            yield Batch(self.patches_BFNP[chosen], self.labels_B[chosen])


def corner_clips(num_clips, seed, config=CONFIG):
    """Noise in which one corner of every tubelet is bright: the class."""
    patches, labels = some_patches(config, num_clips, seed) // 2, torch.arange(num_clips) % 4
    half_px = config.tubelet_px // 2
    pixels = patches.unflatten(-1, (config.tubelet_frames, 2, half_px, 2, half_px, 3))
    for clip, label in enumerate(labels.tolist()):
        pixels[clip, :, :, :, label // 2, :, label % 2] += 100
    return Clips(patches, labels)


def noisy(batch, generator):
    """An augmentation that draws."""
    noise = torch.randint(0, 20, batch.patches_BFNP.shape, dtype=torch.uint8, generator=generator)
    return batch._replace(patches_BFNP=batch.patches_BFNP + noise)


def new_trainer(seed=0, config=CONFIG, **kwargs):
    torch.manual_seed(seed)
    settings = {"stages": STAGES, "batch_size": 8, "ema_decay": 0.9} | kwargs.pop("settings", {})
    return Trainer(ViViT(config), TrainConfig(**settings), **kwargs)


def state_of(trainer):
    """Every tensor of a trainer's state."""
    tensors = {**trainer.model.state_dict(), **{f"average {k}": v for k, v in trainer.average.state_dict().items()}}
    for index, moments in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"{name} {index}": value for name, value in moments.items()}
    return tensors


@pytest.mark.parametrize("router", ["learned", "random"])
@pytest.mark.parametrize("stop", [1, 2])  # between stages, within one
def test_resume_is_exact(router, stop, tmp_path):
    config = replace(CONFIG, router=router)
    clips, through = corner_clips(20, seed=0, config=config), new_trainer(config=config, augment=noisy)
    reports = list(through.run(clips))

    stopped = new_trainer(config=config, augment=noisy)
    first = list(islice(stopped.run(clips), stop))
    stopped.save(tmp_path / "state.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    resumed = new_trainer(seed=1, config=config, augment=noisy)
    resumed.load(tmp_path / "state.pt")
    torch.rand(7)  # the global generator is elsewhere
    second = list(resumed.run(clips))

    assert [report[:-1] for report in (*first, *second)] == [report[:-1] for report in reports]
    assert [(report.stage, report.epoch) for report in reports] == [
        ("first", 1),
        ("second", 2),
        ("second", 3),
        ("second", 4),
    ]
    expected = state_of(through)
    assert state_of(resumed).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state_of(resumed).items())


def test_a_finished_run_has_no_more_epochs():
    trainer, clips = new_trainer(), corner_clips(8, seed=0)
    assert len(list(trainer.run(clips))) == 4
    assert list(trainer.run(clips)) == []


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_learnable_problem_is_learned(pooling):
    config = replace(CONFIG, pooling=pooling)
    stages = (
        Stage(name="nested", epochs=8, routing="nested", learning_rate=3e-3),
        Stage(name="mone", epochs=8, routing="mone", learning_rate=3e-3),
    )
    trainer = new_trainer(config=config, settings={"stages": stages, "batch_size": 16})
    reports = list(trainer.run(corner_clips(64, seed=0)))
    assert reports[-1].loss < 0.5 * reports[0].loss
    assert reports[-1].accuracy > 0.95
    unseen = corner_clips(80, seed=1)
    for capacity in (0.2, 0.4, 1.0):
        assert accuracy(trainer.averaged, unseen, capacity) > 0.9


@pytest.mark.parametrize(
    "changes",
    [
        {"budget": "clip"},
        {"encoder": "joint", "temporal_depth": 0},
        {"encoder": "joint", "temporal_depth": 0, "budget": "clip", "pooling": "mean"},
        {"allocation": "tome"},
    ],
    ids=str,
)
def test_every_encoder_learns_with_dropout_over_adaptive_capacities(changes):
    config = replace(CONFIG, num_frames=4, dropout=0.05, drop_path=0.1, **changes)
    stages = (Stage(name="mone", epochs=10, routing="mone", learning_rate=3e-3),)
    trainer = new_trainer(config=config, settings={"stages": stages, "batch_size": 16})
    reports = list(trainer.run(corner_clips(64, seed=0, config=config)))
    assert reports[-1].loss < 0.7 * reports[0].loss
    assert accuracy(trainer.averaged, corner_clips(80, seed=1, config=config), 0.5) > 0.6  # chance is 0.25


@pytest.mark.parametrize("allocation", ["uniform", "proportionate", "submodel", "token_drop", "tome"])
@pytest.mark.parametrize("budget", ["frame", "clip"])
def test_a_dense_stage_is_at_full_width_whatever_the_allocation(allocation, budget):
    if budget == "clip" and allocation in ("token_drop", "tome"):
        budget = "frame"
    config = replace(CONFIG, num_frames=4, allocation=allocation, budget=budget)
    tokens = 16 if budget == "frame" else 32
    experts = (3,) if allocation == "tome" else range(4)  # ToMe has no narrow ones
    for routing, possible in [
        ("dense", {(0, 0, 0, tokens)}),
        ("nested", {tuple(tokens * (index == expert) for index in range(4)) for expert in experts}),
    ]:
        stage = Stage(name="s", epochs=1, routing=routing)
        assert {stage.draw_counts(config, torch.Generator().manual_seed(seed)) for seed in range(40)} == possible


@pytest.mark.parametrize(
    ("routing", "possible"),
    [
        ("dense", [(0, 0, 0, 16)]),
        ("nested", [(16, 0, 0, 0), (0, 16, 0, 0), (0, 0, 16, 0), (0, 0, 0, 16)]),
        ("mone", [token_counts(capacity, 16, 4) for capacity in (0.2, 0.5, 0.9)]),
    ],
)
def test_a_stage_draws_all_its_splits_and_no_other(routing, possible):
    stage = Stage(name="s", epochs=1, routing=routing, capacities=(0.2, 0.5, 0.9))
    drawn = [stage.draw_counts(CONFIG, torch.Generator().manual_seed(seed)) for seed in range(60)]
    assert set(drawn) == set(possible)
    assert drawn == [stage.draw_counts(CONFIG, torch.Generator().manual_seed(seed)) for seed in range(60)]


def test_every_clip_is_trained_on_once_an_epoch_in_a_new_order():
    seen = []

    def record(batch, generator):
        seen.extend(batch.labels_B.tolist())
        return batch

    config = small_config(num_classes=11, depth=1, temporal_depth=1)
    trainer = new_trainer(config=config, augment=record, settings={"batch_size": 4})
    epochs = []
    for _ in trainer.run(Clips(some_patches(config, 11), torch.arange(11))):
        epochs.append(tuple(seen))
        seen.clear()
    assert [sorted(epoch) for epoch in epochs] == [list(range(11))] * 4
    assert len(set(epochs)) == 4
    assert trainer.average.n_averaged == 4 * 3  # a step for each batch, the small one too


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(poison):
    trainer = new_trainer()
    with torch.no_grad():
        trainer.model.head.bias[0] = poison
    with pytest.raises(DivergedError, match="loss of epoch 1 is nan"):
        next(trainer.run(corner_clips(8, seed=0)))


@pytest.mark.parametrize("warmup_share", [0.0, 0.05, 0.5])
def test_schedule_rises_to_one_and_falls_to_zero(warmup_share):
    shares = [step / 200 for step in range(201)]
    rates = [schedule(share, warmup_share) for share in shares]
    peak = round(200 * warmup_share)
    assert rates[peak] == max(rates) == 1
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert rates[: peak + 1] == sorted(set(rates[: peak + 1]))
    assert rates[peak:] == sorted(set(rates[peak:]), reverse=True)
    assert 0 < rates[0] < 0.03 or not warmup_share
    assert schedule((1 + warmup_share) / 2, warmup_share) == pytest.approx(0.5)


def test_each_stage_has_its_own_schedule():
    stages = tuple(
        Stage(name=name, epochs=2, routing="dense", learning_rate=rate) for name, rate in [("a", 1), ("b", 2)]
    )
    trainer = new_trainer(settings={"stages": stages, "batch_size": 4})
    rates = [report.learning_rate for report in trainer.run(corner_clips(8, seed=0))]
    # 4 steps a stage, the last ones of its epochs are 1/4 and 3/4 through.
    expected = [rate * schedule(share, 0.05) for rate in (1, 2) for share in (0.25, 0.75)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_weight_decay_covers_each_parameter_once_and_decays_only_matrices(pooling):
    trainer = new_trainer(config=small_config(pooling=pooling), settings={"weight_decay": 0.3})
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    decay_of = [
        (names[id(p)], group["weight_decay"]) for group in trainer.optimizer.param_groups for p in group["params"]
    ]
    assert sorted(name for name, _ in decay_of) == sorted(names.values())
    for name, decay in decay_of:
        matrix = name.endswith(".weight") and "norm" not in name
        assert decay == (0.3 if matrix else 0.0), name


def test_average_follows_the_weights_at_its_decay():
    stages = (Stage(name="one", epochs=3, routing="dense"),)
    trainer, clips = new_trainer(settings={"stages": stages, "ema_decay": 0.75}), corner_clips(8, seed=0)
    expected = None
    for _ in trainer.run(clips):  # one step an epoch
        weight = trainer.model.embed.weight.detach().clone()
        expected = weight if expected is None else 0.75 * expected + 0.25 * weight
        torch.testing.assert_close(trainer.averaged.embed.weight.detach(), expected)
    assert not torch.allclose(expected, weight)


@pytest.mark.parametrize("favourite", range(3))
def test_accuracy_is_the_share_of_right_answers(favourite):
    config = small_config(num_classes=3)
    model = ViViT(config)
    with torch.no_grad():
        model.head.bias[favourite] = 1.0
    labels = torch.tensor([0, 1, 1, 2, 2, 2, 2])
    share = [1 / 7, 2 / 7, 4 / 7][favourite]
    assert accuracy(model, Clips(some_patches(config, 7), labels), 0.4, batch_size=3) == pytest.approx(share)
