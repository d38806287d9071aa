import dataclasses
import json
import pickle
import re
import struct

import pytest
import torch
from safetensors.torch import load, save

from mone.baselines import METHODS, capacities_of, with_method
from mone.checkpoint import CheckpointError, read_checkpoint, save_checkpoint
from tests.mone.conftest import JOINT, small_config, small_model, some_patches

LABELS = ["walk", "run", "jump", "größer", "sit"]
CONFIG, WEIGHTS, LABEL_FILE = "config.json", "model.safetensors", "labels.json"


@pytest.fixture
def model():
    return small_model(small_config(depth=1, temporal_depth=1), alpha=0.5, dtype=torch.float32)


@pytest.fixture
def folder(model, tmp_path):
    return save_checkpoint(model, LABELS, tmp_path / "deep" / "model")


def refusal(folder) -> str:
    """The message with which a folder is refused."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


def change_config(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, **changes):
    tensors = load((folder / WEIGHTS).read_bytes()) | changes
    (folder / WEIGHTS).write_bytes(save({name: tensor for name, tensor in tensors.items() if tensor is not None}))


def test_round_trip_is_exact(model, folder):
    checkpoint = read_checkpoint(folder)
    back = checkpoint.build()
    assert checkpoint.config == model.config
    assert checkpoint.labels == tuple(LABELS)
    assert back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in back.state_dict().items())
    assert not back.training
    patches = some_patches(model.config)
    assert torch.equal(back(patches, 0.4).logits_BC, model(patches, 0.4).logits_BC)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", CONFIG, LABEL_FILE, WEIGHTS]


def test_bfloat16_storage_rounds_the_weights_once(model, folder, tmp_path):
    half = save_checkpoint(model, LABELS, tmp_path / "half", dtype=torch.bfloat16)
    for name, tensor in read_checkpoint(half).build().state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name].bfloat16().float())
    assert (half / WEIGHTS).stat().st_size < 0.6 * (folder / WEIGHTS).stat().st_size


def test_two_built_models_share_no_memory(folder):
    checkpoint = read_checkpoint(folder)
    first, second = checkpoint.build(), checkpoint.build()
    with torch.no_grad():
        first.head.weight.zero_()
    assert second.head.weight.all()
    assert all(parameter.requires_grad for parameter in first.parameters())


def test_saving_again_replaces_the_model(model, folder):
    with torch.no_grad():
        model.head.bias.fill_(3.0)
    save_checkpoint(model, LABELS, folder)
    assert read_checkpoint(folder).build().head.bias.tolist() == [3.0] * 5


def test_model_id_is_that_of_weights_and_config_only(model, folder, tmp_path):
    def saved_id(name, changed=model, labels=LABELS):
        return read_checkpoint(save_checkpoint(changed, labels, tmp_path / name)).model_id

    model_id = read_checkpoint(folder).model_id
    assert len(bytes.fromhex(model_id)) == 8
    assert saved_id("elsewhere") == model_id
    assert saved_id("renamed", labels=LABELS[::-1]) == model_id
    model.config = dataclasses.replace(model.config, span_s=1.0)
    assert saved_id("other config") != model_id
    model.config = dataclasses.replace(model.config, span_s=small_config().span_s)
    assert saved_id("same config") == model_id
    with torch.no_grad():
        model.head.bias[0] += 1e-3
    assert saved_id("other weights") != model_id


def test_saving_with_another_number_of_labels_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="4 labels for 5 classes"):
        save_checkpoint(model, LABELS[:4], tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_missing_folder_is_refused(tmp_path):
    assert refusal(tmp_path / "nowhere").startswith("no model folder at")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, LABEL_FILE])
def test_missing_file_is_refused(folder, name):
    (folder / name).unlink()
    assert f"cannot read {folder / name}" in refusal(folder)


@pytest.mark.parametrize("name", [CONFIG, LABEL_FILE])
@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2", b"\xff\xfe\x00", b"3", b"null", b"[3]", b'{"a": 1}'])
def test_broken_json_is_refused_with_its_file(folder, name, content):
    (folder / name).write_bytes(content)
    assert str(folder / name) in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "unknown keys 'colour'"),
        ({"dim": 36}, "dim 36 cannot be halved"),
        ({"pooling": ["cls"]}, "pooling must be one of"),
        ({"num_classes": 6}, "5 labels for 6 classes"),
        ({"dim": 64}, r"tensor \S+ has shape \[[\d, ]+\], the config wants \[[\d, ]+\]"),
        ({"depth": 2}, "tensor encoder.blocks.1.attention.out.bias is missing"),
        ({"router": "random"}, "tensor encoder.router.bias is not in the model"),
    ],
)
def test_config_that_does_not_fit_is_refused(folder, changes, message):
    change_config(folder, **changes)
    assert re.search(message, refusal(folder))


@pytest.mark.parametrize(
    "changes",
    [{"dim": 32.0}, {"depth": 1.0}, {"depth": "1"}, {"num_heads": 4.0}, {"mlp_ratio": None}, {"span_s": "2.56"}],
    ids=str,
)
def test_config_value_of_another_type_is_refused_with_its_key(folder, changes):
    change_config(folder, **changes)
    assert next(iter(changes)) in refusal(folder)


def test_message_stays_on_one_line_whatever_the_key(folder):
    change_config(folder, **{"two\nlines": 1})
    refusal(folder)


def test_json_nested_too_deeply_is_refused(folder):
    (folder / CONFIG).write_text("[" * 100_000)
    refusal(folder)


@pytest.mark.parametrize("count", [0, 4, 6])
def test_another_number_of_labels_is_refused(folder, count):
    (folder / LABEL_FILE).write_text(json.dumps(["x"] * count))
    assert f"{count} labels for 5 classes" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("head.bias", None, "tensor head.bias is missing"),
        ("head.extra", torch.zeros(1), "tensor head.extra is not in the model"),
        ("head.bias", torch.zeros(4), "tensor head.bias has shape [4], the config wants [5]"),
        ("head.weight", torch.zeros(32, 5), "tensor head.weight has shape [32, 5], the config wants [5, 32]"),
        ("head.bias", torch.zeros(5, dtype=torch.int64), "tensor head.bias has dtype torch.int64"),
        ("head.bias", torch.zeros(5, dtype=torch.complex64), "tensor head.bias has dtype torch.complex64"),
    ],
)
def test_tensor_that_does_not_fit_is_named(folder, name, tensor, message):
    change_tensors(folder, **{name: tensor})
    assert message in refusal(folder)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_truncated_weights_are_refused(folder, keep):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:keep])
    assert f"{WEIGHTS} is not a safetensors file" in refusal(folder)


def test_weights_of_an_exotic_dtype_are_refused(folder):
    header = json.dumps({"head.bias": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    refusal(folder)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("write", [lambda trap, path: path.write_bytes(pickle.dumps(trap)), torch.save])
def test_a_pickle_in_place_of_the_weights_is_refused_unopened(folder, tmp_path, write):
    trap = Trap(tmp_path / "sprung")
    write(trap, folder / WEIGHTS)
    assert f"{WEIGHTS} is not a safetensors file" in refusal(folder)
    assert not trap.path.exists()
    pickle.loads(pickle.dumps(trap)).close()
    assert trap.path.exists()  # it would have sprung


# --- the weights under another config ---


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("encoder", [{"temporal_depth": 1}, JOINT], ids=["factorised", "joint"])
def test_every_method_runs_on_the_weights_of_any_model(encoder, name, tmp_path):
    config = small_config(depth=1, **encoder)
    model = small_model(config, alpha=0.5, dtype=torch.float32)
    checkpoint = read_checkpoint(save_checkpoint(model, LABELS, tmp_path))
    other = checkpoint.with_config(with_method(config, name))
    assert (other.model_id == checkpoint.model_id) == (with_method(config, name) == config)
    built, patches = other.build(), some_patches(config)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in built.state_dict().items())
    answers = []
    for capacity in capacities_of(name, config, (0.4, 1.0)):
        logits, plan = built(patches, capacity)
        assert logits.isfinite().all()
        assert plan.counts == with_method(config, name).token_counts(capacity)
        answers.append(logits)
    # At full capacity every method but the fixed rules and ToMe (which knows no alpha) is the dense model.
    if name in ("mone", "dense", "submodel"):
        torch.testing.assert_close(answers[-1], model(patches).logits_BC)


def test_a_router_that_the_weights_lack_is_missed_when_the_model_is_built(tmp_path):
    model = small_model(small_config(depth=1, router="random"), dtype=torch.float32)
    checkpoint = read_checkpoint(save_checkpoint(model, LABELS, tmp_path))
    with pytest.raises(CheckpointError, match=r"tensor encoder\.router\.bias is missing"):
        checkpoint.with_config(small_config(depth=1)).build()


def test_methods_are_refused_by_name_and_by_what_a_config_cannot_have():
    with pytest.raises(ValueError, match=r"unknown method 'magic'; there are mone, dense, .*, tome"):
        with_method(small_config(), "magic")
    with pytest.raises(ValueError, match="budget must be 'frame'"):
        with_method(small_config(budget="clip"), "tome")


def test_fixed_rules_have_one_capacity_and_the_others_those_asked_for():
    asked = (0.2, 0.4)
    capacities = {name: capacities_of(name, small_config(), asked) for name in METHODS}
    assert capacities.pop("dense") == (1.0,)
    assert capacities.pop("uniform") == pytest.approx((0.46875,))
    assert capacities.pop("proportionate") == pytest.approx((4 / 15,))
    assert set(capacities.values()) == {asked}
