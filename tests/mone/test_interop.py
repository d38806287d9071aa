"""Converted models against the libraries that published them."""

import json
import os
import pickle
import warnings

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, VideoMAEImageProcessor, VivitForVideoClassification, VivitImageProcessor

from mone.checkpoint import CheckpointError, read_checkpoint, save_checkpoint
from mone.clips import MemoryClips
from mone.interop import convert, export_vivit, family_of
from mone.parallel import Parallel
from mone.stages import Stage, TrainConfig
from mone.training import Trainer
from mone.tubelets import to_patches
from tests.mone.conftest import small_config, small_model
from tests.public_checkpoints import LABELS, timm_vit, videomae, vit, vivit

TOLERANCE = 1e-4
CONFIG, WEIGHTS, PREPROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"


def some_clips(config, batch=2):
    """Noise uint8 [B, T, H, W, 3]."""
    shape = (batch, config.num_frames, config.height_px, config.width_px, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def difference(public, conversion):
    """Largest difference of logits at capacity 1; an image model averages over the central frames of tubelets."""
    model, config = conversion.model, conversion.model.config
    clips = some_clips(config)
    ours = model(to_patches(clips, config), 1.0).logits_BC
    if conversion.family in ("vivit", "videomae"):
        theirs = public.logits(clips)
    else:
        images = clips[:, config.tubelet_frames // 2 :: config.tubelet_frames]
        theirs = public.logits(images.flatten(0, 1)).unflatten(0, images.shape[:2]).mean(dim=1)
    assert theirs.std() > 0.1
    return float((ours - theirs).abs().max())


VIDEO_VARIANTS = {
    "vivit": (vivit, {}),
    "vivit wide": (vivit, {"image_size": [24, 40], "num_frames": 6, "tubelet_size": [3, 8, 8]}),
    "vivit exact gelu": (vivit, {"hidden_act": "gelu", "layer_norm_eps": 1e-3, "tubelet_size": [1, 12, 12]}),
    "vivit without bias": (vivit, {"qkv_bias": False, "hidden_act": "gelu_new", "intermediate_size": 192}),
    "videomae": (videomae, {}),
    "videomae tall": (videomae, {"image_size": [40, 24], "num_frames": 6, "tubelet_size": 2, "qv_bias": False}),
    "videomae tanh": (videomae, {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-5, "tubelet_size": 1}),
}
IMAGE_VARIANTS = {
    "vit": (vit, {}, {}),
    "vit wide": (vit, {"image_size": [16, 40], "qkv_bias": False}, {"num_frames": 9, "tubelet_frames": 3}),
    "timm": (timm_vit, {}, {}),
    "timm tall": (timm_vit, {"img_size": (48, 32), "depth": 1}, {"num_frames": 3, "tubelet_frames": 1}),
    "timm layer scale": (timm_vit, {"architecture": "deit3_small_patch16_224"}, {"tubelet_frames": 2}),
    "timm deit": (timm_vit, {"architecture": "deit_tiny_patch16_224", "mlp_ratio": 2.0}, {"tubelet_frames": 4}),
    "timm dinov2": (timm_vit, {"architecture": "vit_small_patch14_dinov2", "img_size": 42}, {"num_frames": 4}),
    "timm average": (timm_vit, {"class_token": False, "global_pool": "avg", "act_layer": "gelu_tanh"}, {}),
    "timm late norm": (timm_vit, {"fc_norm": True, "qkv_bias": False, "patch_size": 8}, {"num_frames": 2}),
}


@pytest.mark.parametrize("name", VIDEO_VARIANTS)
def test_video_model_answers_as_its_source(name, tmp_path):
    make, changes = VIDEO_VARIANTS[name]
    public = make(tmp_path, **changes)
    conversion = convert(tmp_path)
    assert family_of(tmp_path) == conversion.family == name.split()[0]
    assert conversion.labels == tuple(LABELS.values())
    assert conversion.model.config.joint
    assert not conversion.model.training
    assert difference(public, conversion) < TOLERANCE


@pytest.mark.parametrize("name", IMAGE_VARIANTS)
def test_image_model_answers_with_the_mean_over_central_frames(name, tmp_path):
    make, changes, options = IMAGE_VARIANTS[name]
    public = make(tmp_path, **changes)
    conversion = convert(tmp_path, **options)
    config = conversion.model.config
    assert family_of(tmp_path) == conversion.family == name.split()[0]
    assert config.tubelet_frames == options.get("tubelet_frames", 2)
    assert config.num_frames == options.get("num_frames", 16 * config.tubelet_frames)
    assert (config.encoder, config.temporal_depth) == ("factorised", 0)
    assert difference(public, conversion) < TOLERANCE


def test_default_spans_are_those_of_training(tmp_path):
    vivit(tmp_path / "vivit", num_frames=32, image_size=8)
    videomae(tmp_path / "videomae", num_frames=16, image_size=8)
    vit(tmp_path / "vit", image_size=8)
    spans = {name: convert(tmp_path / name).model.config.span_s for name in ("vivit", "videomae", "vit")}
    assert spans == pytest.approx({"vivit": 2.56, "videomae": 2.13, "vit": 2.56}, abs=0.01)


@pytest.mark.parametrize(
    ("processor", "scale", "shift"),
    [
        (VivitImageProcessor(do_normalize=False), (1 / 127.5,) * 3, (-1,) * 3),
        (VivitImageProcessor(image_mean=[0.1, 0, -0.1], image_std=0.5), (2 / 127.5,) * 3, (-2.2, -2, -1.8)),
        (VivitImageProcessor(do_rescale=False, offset=False, image_mean=100, image_std=50), (1 / 50,) * 3, (-2,) * 3),
        (VideoMAEImageProcessor(image_mean=[0.2, 0.4, 0.6], image_std=[0.1, 0.2, 0.4]), None, None),
    ],
)
def test_normalisation_of_a_preprocessor_is_folded_in(processor, scale, shift, tmp_path):
    make = vivit if scale else videomae
    public = make(tmp_path)
    processor.save_pretrained(tmp_path)
    conversion = convert(tmp_path)
    clips = some_clips(conversion.model.config).double()
    if scale:
        wanted = clips * torch.tensor(scale).double() + torch.tensor(shift).double()
        equal_to_theirs = (wanted + 1) * 127.5  # the model is fed x / 127.5 - 1 of this
    else:
        wanted = (clips / 255 - torch.tensor([0.2, 0.4, 0.6])) / torch.tensor([0.1, 0.2, 0.4])
        equal_to_theirs = 255 * (wanted * torch.tensor([0.229, 0.224, 0.225]) + torch.tensor([0.485, 0.456, 0.406]))
    with torch.inference_mode():
        theirs = public.logits(equal_to_theirs.float())
        ours = conversion.model(to_patches(clips.to(torch.uint8), conversion.model.config)).logits_BC
    assert (ours - theirs).abs().max() < TOLERANCE


def test_normalisation_of_timm_is_that_of_its_config(tmp_path):
    assert timm_vit(tmp_path).logits  # the architecture's own: 0.5 and 0.5
    config = json.loads((tmp_path / CONFIG).read_text())
    embed = convert(tmp_path).model.embed
    config["pretrained_cfg"] |= {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    other = convert(tmp_path).model.embed
    ratio_P = (other.weight / embed.weight)[:, -3 * 16 * 16 :].mean(dim=0)
    assert torch.allclose(ratio_P, 0.5 / torch.tensor([0.229, 0.224, 0.225]).repeat(256), rtol=1e-4)


def test_central_frame_of_an_even_number_is_the_later(tmp_path):
    vit(tmp_path)
    model = convert(tmp_path, tubelet_frames=4).model
    weight_DtX = rearrange(model.embed.weight, "d (t x) -> d t x", t=4)
    assert [bool(weight_DtX[:, frame].any()) for frame in range(4)] == [False, False, True, False]


def test_the_norm_after_pooling_of_videomae_has_an_epsilon_of_its_own(tmp_path):
    videomae(tmp_path)
    encoder = convert(tmp_path).model.encoder
    assert (encoder.blocks[0].norm_mlp.eps, encoder.norm.eps) == (1e-12, 1e-5)


def test_position_of_the_class_token_is_folded_into_it(tmp_path):
    vivit(tmp_path)
    theirs, ours = load_file(tmp_path / WEIGHTS), convert(tmp_path).model.encoder
    position = theirs["vivit.embeddings.position_embeddings"][0]
    assert torch.equal(ours.class_token_KD, theirs["vivit.embeddings.cls_token"][0] + position[:1])
    assert torch.equal(ours.position_ND, position[1:])


def test_conversion_is_the_same_each_time_and_leaves_the_global_generator_alone(tmp_path):
    vivit(tmp_path)
    first = convert(tmp_path).model.state_dict()
    state = torch.manual_seed(2).get_state()
    second = convert(tmp_path).model.state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert not first["encoder.alpha_L"].any()
    assert first["encoder.router.weight"].any()


@pytest.mark.parametrize(("make", "experts"), [(vivit, 4), (videomae, 3), (vit, 2), (timm_vit, 5)])
def test_converted_model_is_saved_routed_and_trained_with_nesting(make, experts, tmp_path):
    make(tmp_path / "theirs")
    conversion = convert(tmp_path / "theirs", num_experts=experts)
    model = read_checkpoint(save_checkpoint(conversion.model, conversion.labels, tmp_path / "ours")).build()
    config = model.config
    clips = some_clips(config)
    patches = to_patches(clips, config)
    with torch.inference_mode():
        full = model(patches, 1.0).logits_BC
        logits, plan = model(patches, 0.6)
        assert torch.equal(full, conversion.model(patches, 1.0).logits_BC)
    assert logits.isfinite().all()
    assert not torch.allclose(logits, full)
    assert len(plan.counts) == experts and sum(count > 0 for count in plan.counts) > 1
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stage = Stage(name="nested", epochs=1, routing="nested", learning_rate=1e-4)
    trainer = Trainer(model, TrainConfig(stages=(stage,), batch_size=2), 2, Parallel(torch.device("cpu")))
    assert len([*trainer.run(MemoryClips(clips, torch.tensor([0, 1])))]) == 1
    assert 0 < trainer.metrics().loss < 100
    assert not torch.equal(model.state_dict()["head.weight"], before["head.weight"])


def test_shards_pickled_tensors_and_half_precision_are_read(tmp_path):
    public = vivit(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert difference(public, convert(tmp_path / "sharded")) < TOLERANCE

    public = vivit(tmp_path / "zip")
    tensors = load_file(tmp_path / "zip" / WEIGHTS)
    (tmp_path / "zip" / WEIGHTS).unlink()
    for zipped in (True, False):
        torch.save(tensors, tmp_path / "zip" / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        assert difference(public, convert(tmp_path / "zip")) < TOLERANCE

    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(half, tmp_path / "zip" / WEIGHTS)
    model = convert(tmp_path / "zip").model
    assert model.head.weight.dtype == torch.float32
    assert torch.equal(model.head.weight, half["classifier.weight"].float())


def test_names_inside_transformers_and_an_unread_pooler_are_understood(tmp_path):
    public = vivit(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    renames = {
        ".encoder.layer.": ".layers.",
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    renamed = {"vivit.pooler.dense.weight": torch.ones(48, 48), "vivit.pooler.dense.bias": torch.ones(48)}
    for name, tensor in tensors.items():
        for old, new in renames.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    save_file(renamed, tmp_path / WEIGHTS)
    assert difference(public, convert(tmp_path)) < TOLERANCE


def refusal(folder, **options):
    """The one line with which a folder is refused."""
    with warnings.catch_warnings(), pytest.raises(CheckpointError) as caught:
        warnings.simplefilter("error")
        convert(folder, **options)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


def change_config(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, **changes):
    """None takes a tensor out; a dot in a name is written __."""
    tensors = load_file(folder / WEIGHTS) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"classifier__weight": None}, "tensor classifier.weight is missing: the checkpoint is no classifier"),
        ({"classifier__weight": torch.ones(())}, "tensor classifier.weight has shape [], a matrix is needed"),
        ({"vivit__layernorm__bias": None}, "tensor vivit.layernorm.bias is missing"),
        ({"vivit__layernorm__bias": torch.ones(3)}, "vivit.layernorm.bias has shape [3], the config wants [48]"),
        ({"vivit__layernorm__bias": torch.ones(48).int()}, "vivit.layernorm.bias has dtype torch.int32"),
        ({"vivit__extra": torch.ones(3)}, "tensor vivit.extra has no place in the model"),
        ({"vivit__embeddings__position_embeddings": torch.ones(1, 7, 48)}, "[1, 7, 48], the config wants [1, 19, 48]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(changes, named, tmp_path):
    vivit(tmp_path)
    change_tensors(tmp_path, **changes)
    assert named in refusal(tmp_path)


@pytest.mark.parametrize(
    ("make", "changes", "named"),
    [
        (vivit, {"model_type": "bert"}, "'bert'"),
        (vivit, {"model_type": None}, "neither"),
        (vivit, {"hidden_act": "relu"}, "hidden_act 'relu'"),
        (vivit, {"hidden_act": ["gelu"]}, "hidden_act"),
        (vivit, {"tubelet_size": [2, 8, 4]}, "tubelet_size [2, 8, 4]"),
        (vivit, {"tubelet_size": 2}, "tubelet_size 2"),
        (vivit, {"num_channels": 1}, "num_channels 1"),
        (vivit, {"hidden_size": "48"}, "hidden_size '48'"),
        (vivit, {"layer_norm_eps": None}, "layer_norm_eps None"),
        (vivit, {"image_size": [24, 24, 24]}, "image_size [24, 24, 24]"),
        (vivit, {"intermediate_size": 100}, "intermediate_size 100"),
        (vivit, {"num_attention_heads": 5}, "num_heads 5"),
        (vivit, {"num_hidden_layers": 1}, "tensor vivit.encoder.layer.1."),
        (vivit, {"id2label": {"0": "a"}}, "id2label"),
        (videomae, {"use_mean_pooling": False}, "use_mean_pooling False"),
        (videomae, {"num_frames": 10**9}, "num_frames 1000000000: 4,500,000,000 tokens in a clip are too many"),
        (videomae, {"patch_size": [8, 4]}, "patch_size [8, 4]"),
        (timm_vit, {"architecture": "vit_base_patch16_rpn_224"}, "architecture 'vit_base_patch16_rpn_224'"),
        (timm_vit, {"architecture": "resnet50"}, "'resnet50'"),
        (timm_vit, {"model_args": {"embed_dim": 48, "norm_layer": "rmsnorm"}}, "model_args.norm_layer 'rmsnorm'"),
        (timm_vit, {"model_args": {"act_layer": "quick_gelu"}}, "model_args.act_layer 'quick_gelu'"),
        (timm_vit, {"model_args": {"num_heads": "3"}}, "model_args.num_heads '3'"),
        (timm_vit, {"model_args": {"img_size": 32}}, "model_args.num_heads"),
        (timm_vit, {"model_args": [1]}, "model_args [1]"),
        (timm_vit, {"pretrained_cfg": {"mean": [1], "input_size": [3, 32, 32]}}, "pretrained_cfg"),
        (timm_vit, {"label_names": ["a"]}, "label_names"),
    ],
)
def test_configs_that_cannot_be_expressed_are_named(make, changes, named, tmp_path):
    make(tmp_path)
    change_config(tmp_path, **changes)
    assert named in refusal(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"qk_norm": True}, "attn.k_norm.bias cannot be expressed: normalised queries and keys"),
        ({"reg_tokens": 2}, "reg_token cannot be expressed: register tokens"),
        ({"pre_norm": True}, "norm_pre.bias cannot be expressed"),
        ({"class_token": True, "global_pool": "avg"}, "cls_token cannot be expressed: a class token beside averaging"),
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, "a norm before averaging cannot be expressed"),
        ({"class_token": False, "global_pool": "map"}, "attn_pool"),
        ({"mlp_ratio": 2.7}, "blocks.0.mlp.fc1.weight 129"),
        ({"num_classes": 0}, "head.weight is missing"),
        ({"architecture": "deit_tiny_distilled_patch16_224"}, "dist_token cannot be expressed"),
        ({"architecture": "vit_small_patch16_18x2_224"}, "vit_small_patch16_18x2_224"),
    ],
)
def test_timm_variants_that_cannot_be_expressed_are_named(arguments, named, tmp_path):
    timm_vit(tmp_path, **arguments)
    assert named in refusal(tmp_path)


def test_labels_of_timm(tmp_path):
    timm_vit(tmp_path)
    assert convert(tmp_path).labels == ("class 0", "class 1", "class 2", "class 3")
    change_config(tmp_path, label_names=["n0", "n1", "n2", "n3"], label_descriptions={"n1": "a goldfish"})
    assert convert(tmp_path).labels == ("n0", "a goldfish", "n2", "n3")


def test_experts_that_a_width_does_not_allow_and_options_of_images(tmp_path):
    vivit(tmp_path)
    assert "dim 48 cannot be halved 5 times" in refusal(tmp_path, num_experts=6)
    with pytest.raises(ValueError, match="tubelet_frames 4: only an image checkpoint"):
        convert(tmp_path, tubelet_frames=4)


class Evil:
    def __reduce__(self):
        return os.system, ("touch was-run",)


def test_damaged_files_are_refused_and_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vivit(folder := tmp_path / "model")
    assert "no model folder" in refusal(tmp_path / "nowhere")
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    assert "is not a safetensors file" in refusal(folder)
    (folder / WEIGHTS).unlink()
    assert "has no weights" in refusal(folder)
    bin_path = folder / "pytorch_model.bin"
    for content in (pickle.dumps({"classifier.weight": Evil()}), pickle.dumps(Evil(), protocol=2), b"PK nothing", b""):
        bin_path.write_bytes(content)
        assert "holds more than tensors" in refusal(folder)
    torch.save({"state": Evil()}, bin_path)
    assert "holds more than tensors" in refusal(folder)
    torch.save([torch.ones(1)], bin_path)
    assert "a dictionary of tensors is needed" in refusal(folder)
    assert not (tmp_path / "was-run").exists()
    (folder / CONFIG).write_text("[]")
    assert "an object is needed" in refusal(folder)
    (folder / CONFIG).write_text("{")
    assert "is not JSON" in refusal(folder)


def test_an_index_reads_no_file_outside_its_folder(tmp_path):
    vivit(folder := tmp_path / "model")
    (folder / WEIGHTS).rename(tmp_path / WEIGHTS)
    index = folder / "model.safetensors.index.json"
    for weight_map in ({"a": f"../{WEIGHTS}"}, {"a": 5, "b": None}, {}, []):
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert str(index) in refusal(folder) or "cannot read" in refusal(folder)


JOINT = {"encoder": "joint", "temporal_depth": 0}


@pytest.mark.parametrize("changes", [{"activation": "gelu_tanh"}, {"height_px": 16, "norm_eps": 1e-3}])
def test_exported_model_answers_in_transformers_as_ours(changes, tmp_path):
    model = small_model(small_config(**JOINT | changes), dtype=torch.float32)
    config, labels = model.config, ["walk", "größer", "a", "b", "c"]
    export_vivit(model, labels, tmp_path)
    theirs, info = VivitForVideoClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert [theirs.config.id2label[index] for index in range(5)] == labels
    clips = some_clips(config)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    pixels = processor([list(clip.numpy()) for clip in clips], return_tensors="pt")
    with torch.inference_mode():
        logits = theirs.eval()(**pixels).logits
        assert (logits - model(to_patches(clips, config)).logits_BC).abs().max() < TOLERANCE
    back = convert(tmp_path)
    assert back.labels == tuple(labels)
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.model.state_dict()[name], tensor) or "router" in name or "embed" in name, name


@pytest.mark.parametrize(
    ("changes", "alpha", "named"),
    [
        ({}, 0.0, "encoder is 'factorised'"),
        (JOINT | {"pooling": "mean"}, 0.0, "pooling is 'mean'"),
        (JOINT | {"pixels": "centred"}, 0.0, "pixels is 'centred'"),
        (JOINT | {"pool_norm_eps": 1e-3}, 0.0, "pool_norm_eps is 0.001"),
        (JOINT, 0.5, "alpha of block 0 is 0.5"),
    ],
)
def test_what_transformers_cannot_express_is_not_exported(changes, alpha, named, tmp_path):
    model = small_model(small_config(**changes), alpha=alpha, dtype=torch.float32)
    with pytest.raises(ValueError, match=named):
        export_vivit(model, list("abcde"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
