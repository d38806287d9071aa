import math
from dataclasses import replace
from itertools import islice

import pytest
import torch
import torch.nn.functional as F

from mone.capacity import token_counts
from mone.clips import MemoryClips
from mone.model import ViViT
from mone.optim import schedule
from mone.parallel import Parallel
from mone.stages import Stage, TrainConfig
from mone.training import DivergedError, Trainer
from mone.tubelets import to_frames, to_patches
from tests.mone.conftest import small_config, some_patches
from tests.mone.training_data import AUGMENTED, CONFIG, assert_same_state, corner_clips, new_trainer


def run_all(trainer, clips):
    """Train to the end; the metrics of each step but its times."""
    found = []
    while not trainer.done:
        for _ in trainer.run(clips):
            found.append(trainer.metrics()._replace(clips_per_s=0.0, data_wait_share=0.0, flops_per_s=0.0))
    return found


def run_epochs(trainer, clips):
    """Train to the end; the metrics of each epoch."""
    found = []
    while not trainer.done:
        list(trainer.run(clips))
        found.append(trainer.metrics())
    return found


def trained(state):
    """Without moments that are zero because nothing is ever learned there, as ToMe does with the router."""
    moments = state["optimizer"]["state"]
    kept = {
        name: own for name, own in moments.items() if any(value.any() for key, value in own.items() if key != "step")
    }
    return state | {"optimizer": state["optimizer"] | {"state": kept}}


RESUMED = {
    "learned router": {},
    "random router, dropout": {"config": replace(CONFIG, router="random", dropout=0.1)},
    "tome": {"config": replace(CONFIG, allocation="tome")},
    "sgd": {"optimizer": "sgd"},
    "layer decay, accumulation": {"layer_decay": 0.7, "micro_batch": 3},
}


@pytest.mark.parametrize("name", RESUMED)
def test_resume_is_exact_after_every_step(name, tmp_path):
    settings = {"augment": AUGMENTED} | RESUMED[name]
    clips = corner_clips(20, seed=0, config=settings.get("config", CONFIG))  # 3 steps an epoch, the last is smaller
    through, reports, states = new_trainer(20, **settings), [], []
    while not through.done:
        for _ in through.run(clips):
            reports.append(through.metrics()._replace(clips_per_s=0.0, data_wait_share=0.0, flops_per_s=0.0))
            states.append(through.state())
    assert [(r.stage, r.epoch, r.step) for r in reports[2:4]] == [("first", 1, 3), ("second", 1, 4)]
    assert len(reports) == 12

    for stop in (0, 1, 3, 5, 11):  # before the first step, within an epoch, between stages, and before the last step
        stopped = new_trainer(20, **settings)
        while stopped.place.step < stop:
            next(stopped.run(clips))
            stopped.metrics()
        torch.save(stopped.state(), tmp_path / "state.pt")
        list(islice(stopped.run(clips), 1))  # what is done after a state was taken is not in it
        resumed = new_trainer(20, seed=1, **settings)
        resumed.load(torch.load(tmp_path / "state.pt", weights_only=True))
        torch.rand(7)  # the global generator is elsewhere
        assert run_all(resumed, clips) == reports[stop:]
        assert_same_state(trained(resumed.state()), trained(states[-1]))


def test_a_state_is_of_its_moment():
    trainer, clips = new_trainer(8), corner_clips(8, seed=0)
    list(trainer.run(clips))
    state = trainer.state()
    kept = {part: {name: tensor.clone() for name, tensor in state[part].items()} for part in ("model", "average")}
    list(trainer.run(clips))
    assert_same_state({part: state[part] for part in kept}, kept)
    with trainer.averaged() as model:
        average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert_same_state(trainer.state()["average"], average)
    assert_same_state(trainer.state()["model"], trainer.model.state_dict())
    assert not torch.equal(average["embed.weight"], trainer.model.embed.weight)


def test_taking_a_state_changes_nothing():
    clips, plain, watched = corner_clips(12, seed=0), new_trainer(12), new_trainer(12)
    watched.state()
    while not plain.done:
        list(plain.run(clips))
        for _ in watched.run(clips):
            watched.state()
            watched.evaluate(clips, 0.4)
    assert_same_state(watched.state(), plain.state() | {"lowest_loss": watched.state()["lowest_loss"]})


def test_a_finished_run_is_done():
    trainer, clips = new_trainer(8), corner_clips(8, seed=0)
    assert len(run_epochs(trainer, clips)) == 4
    assert trainer.done and trainer.place == (4, 0, 4)
    with pytest.raises(AssertionError):
        next(trainer.run(clips))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_learnable_problem_is_learned(pooling, optimizer):
    rate = {"adamw": 3e-3, "sgd": 0.1}[optimizer]
    stages = (
        Stage(name="nested", epochs=8, routing="nested", learning_rate=rate),
        Stage(name="mone", epochs=8, routing="mone", learning_rate=rate),
    )
    config = replace(CONFIG, pooling=pooling)
    trainer = new_trainer(64, config=config, stages=stages, batch_size=16, optimizer=optimizer)
    reports = run_epochs(trainer, corner_clips(64, seed=0))
    assert reports[-1].loss < 0.6 * reports[0].loss
    assert reports[-1].accuracy > 0.95
    unseen = corner_clips(80, seed=1)
    for capacity in (0.2, 0.4, 1.0):
        assert trainer.evaluate(unseen, capacity).top1 > 0.9


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
    trainer = new_trainer(64, config=config, stages=stages, batch_size=16)
    reports = run_epochs(trainer, corner_clips(64, seed=0, config=config))
    assert reports[-1].loss < 0.7 * reports[0].loss
    assert trainer.evaluate(corner_clips(80, seed=1, config=config), 0.5).top1 > 0.6  # chance is 0.25


def test_alphas_move_within_their_bounds():
    config = replace(CONFIG, depth=3)
    stages = (Stage(name="mone", epochs=6, routing="mone", learning_rate=0.1),)
    trainer, clips = new_trainer(16, config=config, stages=stages), corner_clips(16, seed=0, config=config)
    with torch.no_grad():
        trainer.model.encoder.alpha_L.copy_(torch.tensor([-3.0, 0.5, 5.0]))  # the outer ones are put back
    seen = []
    while not trainer.done:
        for _ in trainer.run(clips):
            seen += trainer.model.encoder.alpha_L.tolist()
    assert min(seen) >= 0 and max(seen) < 1
    assert len(set(seen)) > 5


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
    trainer, clips = new_trainer(11, batch_size=4), corner_clips(11, seed=0)
    epochs = []
    while not trainer.done:
        batches = list(trainer.run(clips))
        assert [len(batch.samples_B) for batch in batches] == [4, 4, 3]
        for batch in batches:
            assert torch.equal(batch.labels_B, clips.labels_S[batch.samples_B])
            assert torch.equal(batch.frames_BTHWC, clips.frames_STHWC[batch.samples_B])
        epochs.append(tuple(torch.cat([batch.samples_B for batch in batches]).tolist()))
    assert [sorted(epoch) for epoch in epochs] == [list(range(11))] * 4
    assert len(set(epochs)) == 4
    assert trainer.place.step == 4 * 3


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(poison):
    trainer = new_trainer(16)
    with torch.no_grad():
        trainer.model.head.bias[0] = poison
    next(trainer.run(corner_clips(16, seed=0)))
    with pytest.raises(DivergedError, match="not finite at step 1"):
        trainer.metrics()


def test_a_loss_that_grows_stops_the_run():
    trainer, clips = new_trainer(16), corner_clips(16, seed=0)
    steps = trainer.run(clips)
    next(steps)
    first = trainer.metrics().loss
    with torch.no_grad():
        trainer.model.head.bias += torch.tensor([80.0, 0, 0, 0])
    next(steps)
    with pytest.raises(DivergedError, match=f"grown from {first:.3g} to .* at step 2"):
        trainer.metrics()


def test_each_stage_has_its_own_schedule():
    stages = tuple(
        Stage(name=name, epochs=2, routing="dense", learning_rate=rate) for name, rate in [("a", 1e-3), ("b", 2e-3)]
    )
    reports = run_all(new_trainer(8, stages=stages, batch_size=4), corner_clips(8, seed=0))
    expected = [rate * schedule(share, 0.05) for rate in (1e-3, 2e-3) for share in (0, 0.25, 0.5, 0.75)]
    assert [report.learning_rate for report in reports] == pytest.approx(expected)
    assert [report.stage for report in reports] == [*"aaaabbbb"]


def test_average_follows_the_weights_at_its_decay():
    """At step t the decay is (1 + t) / (10 + t), at most that of the config."""
    stages = (Stage(name="one", epochs=6, routing="dense"),)
    trainer, clips = new_trainer(8, stages=stages, ema_decay=0.3), corner_clips(8, seed=0)
    expected = trainer.model.embed.weight.detach().clone()
    for decay in (1 / 10, 2 / 11, 3 / 12, 0.3, 0.3, 0.3):
        list(trainer.run(clips))  # one step an epoch
        weight = trainer.model.embed.weight.detach().clone()
        expected = decay * expected + (1 - decay) * weight
        with trainer.averaged() as model:
            torch.testing.assert_close(model.embed.weight.detach(), expected)
        assert torch.equal(trainer.model.embed.weight, weight)
    assert not torch.allclose(expected, weight)


@pytest.mark.parametrize(("optimizer", "rate"), [("adamw", 1e-3), ("sgd", 0.02)])
def test_micro_batches_give_the_same_steps(optimizer, rate):
    """float32 sums in another order: 1e-5. Keys' biases are left out: AdamW makes steps of what is only rounding."""
    stages = (Stage(name="mone", epochs=3, routing="mone", learning_rate=rate),)
    clips, runs = corner_clips(20, seed=0), []
    for micro_batch in (0, 3, 1):
        trainer = new_trainer(20, micro_batch=micro_batch, augment=AUGMENTED, stages=stages, optimizer=optimizer)
        runs.append((run_all(trainer, clips), trainer.state()["model"]))
    for reports, weights in runs[1:]:
        for found, expected in zip(reports, runs[0][0], strict=True):
            assert found.loss == pytest.approx(expected.loss, abs=1e-5)
            assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
            assert found._replace(loss=0, grad_norm=0, alpha=0) == expected._replace(loss=0, grad_norm=0, alpha=0)
        for name, weight in weights.items():
            if optimizer == "sgd" or "qkv.bias" not in name:
                torch.testing.assert_close(weight, runs[0][1][name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("routing", ["dense", "nested", "mone"])
@pytest.mark.parametrize("allocation", ["mone", "token_drop", "tome"])
def test_all_counts_are_what_is_drawn_and_equally_likely(routing, allocation):
    config = replace(CONFIG, allocation=allocation)
    stage = Stage(name="s", epochs=1, routing=routing, capacities=(0.2, 0.5, 0.9))
    choices = stage.all_counts(config)
    drawn = [stage.draw_counts(config, torch.Generator().manual_seed(seed)) for seed in range(300)]
    assert set(drawn) == set(choices) and len(set(choices)) == len(choices)
    for counts in choices:  # four standard deviations
        share = 1 / len(choices)
        assert abs(drawn.count(counts) - 300 * share) <= 4 * math.sqrt(300 * share * (1 - share))


@pytest.mark.parametrize(
    "stages, only",
    [
        ([("mone", (0.3,))], 0.3),
        ([("nested", (0.2, 0.5)), ("mone", (0.3, 0.3))], 0.3),
        ([("mone", (0.3,)), ("mone", (0.4,))], None),
        ([("mone", (0.3, 0.4))], None),
        ([("dense", (0.3,)), ("nested", (0.3,))], None),
    ],
)
def test_the_only_capacity_is_that_of_all_adaptive_stages(stages, only):
    values = (
        Stage(name="s", epochs=1, routing=routing, capacities=capacities, learning_rate=1e-3)
        for routing, capacities in stages
    )
    assert TrainConfig(stages=tuple(values)).only_capacity == only


@pytest.mark.parametrize("favourite", range(3))
def test_a_score_is_the_share_of_right_answers_and_their_cross_entropy(favourite):
    config = small_config(num_classes=3)
    model = ViViT(config)
    with torch.no_grad():
        model.head.bias[favourite] = 1.0
    labels = torch.tensor([0, 1, 1, 2, 2, 2, 2])
    clips = MemoryClips(to_frames(some_patches(config, 7), config), labels)
    train = TrainConfig(stages=(Stage(name="s", epochs=1, routing="dense"),))
    score = Trainer(model, train, 1, Parallel(torch.device("cpu"))).evaluate(clips, 0.4, batch_size=3)
    assert score.top1 == pytest.approx([1 / 7, 2 / 7, 4 / 7][favourite])
    logits_SC = model.eval()(to_patches(clips.frames_STHWC, config), 0.4).logits_BC
    assert score.nll == pytest.approx(float(F.cross_entropy(logits_SC.detach(), labels)), rel=1e-5)
    assert score.num_clips == 7
