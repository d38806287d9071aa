"""A model on disk: a folder with config.json, model.safetensors and labels.json. Nothing is ever unpickled."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors

from mone.card import CARD_FILE, model_card
from mone.config import ModelConfig
from mone.model import ViViT

CONFIG_FILE, WEIGHTS_FILE, LABELS_FILE = "config.json", "model.safetensors", "labels.json"


class CheckpointError(ValueError):
    """A model folder that cannot be used; the message names the file or tensor, in one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model as bytes, cheap to send to many workers.

    Attributes:
        config: Sizes.
        labels: Name of each class.
        weights: Content of model.safetensors.
        model_id: 16 hex digits of the SHA-256 of config and weights.
    """

    config: ModelConfig
    labels: tuple[str, ...]
    weights: bytes
    model_id: str

    def with_config(self, config: ModelConfig) -> "Checkpoint":
        """The same weights under another config of the same sizes, such as a baseline's; a router it lacks is left out.

        Raises:
            CheckpointError: Weights that cannot be read. (Whether they fit the config, `build` finds out.)
        """
        if config == self.config:
            return self
        tensors = _tensors(self.weights)
        if config.router == "random":
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("encoder.router.")}
        weights = dump_tensors(tensors)
        return Checkpoint(config=config, labels=self.labels, weights=weights, model_id=_model_id(config, weights))

    def build(self, device: torch.device | str = "cpu") -> ViViT:
        """The model in evaluation mode, float32, on a device.

        Raises:
            CheckpointError: Weights that do not belong to the config; the first such tensor is named.
        """
        tensors = _tensors(self.weights)
        with torch.device("meta"):
            model = ViViT(self.config)
        _check_tensors(tensors, model.state_dict())
        model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
        return model.eval().to(device)


def _tensors(weights: bytes) -> dict[str, torch.Tensor]:
    try:
        return load_tensors(weights)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch has no name for
        raise CheckpointError(f"{WEIGHTS_FILE} is not a safetensors file: {error}") from error


def _check_tensors(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name in sorted(tensors.keys() ^ expected.keys()):
        raise CheckpointError(f"tensor {name} is {'not in the model' if name in tensors else 'missing'}")
    for name, tensor in sorted(tensors.items()):
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(tensor.shape)}, the config wants {list(expected[name].shape)}"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"tensor {name} has dtype {tensor.dtype}, a floating-point one is needed")


def read_checkpoint(folder: Path | str) -> Checkpoint:
    """Read a model folder and check that its parts fit together.

    Raises:
        CheckpointError: A file that is missing or malformed, or parts that do not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"no model folder at {folder}")
    config_text = _read(folder / CONFIG_FILE).decode(errors="replace")
    try:
        config = ModelConfig.from_dict(json.loads(config_text))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: {error}") from error
    try:
        labels = json.loads(_read(folder / LABELS_FILE))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / LABELS_FILE}: {error}") from error
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise CheckpointError(f"{folder / LABELS_FILE}: a list of strings is needed")
    if len(labels) != config.num_classes:
        raise CheckpointError(f"{folder}: {len(labels)} labels for {config.num_classes} classes")
    weights = _read(folder / WEIGHTS_FILE)
    checkpoint = Checkpoint(config=config, labels=tuple(labels), weights=weights, model_id=_model_id(config, weights))
    try:
        checkpoint.build()
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return checkpoint


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def _model_id(config: ModelConfig, weights: bytes) -> str:
    canonical = json.dumps(dataclasses.asdict(config), sort_keys=True).encode()
    return hashlib.sha256(canonical + weights).hexdigest()[:16]


def save_checkpoint(
    model: ViViT, labels: Sequence[str], folder: Path | str, *, dtype: torch.dtype = torch.float32, notes: str = ""
) -> Path:
    """Write a model folder with its card; each file appears whole or not at all.

    Args:
        model: Its weights and config are written.
        labels: Name of each class.
        folder: Made where it does not exist.
        dtype: Storage type of the weights; they are used as float32 again.
        notes: For the card: where the model comes from and how good it is, as Markdown.

    Raises:
        ValueError: Another number of labels than classes.
    """
    if len(labels) != model.config.num_classes:
        raise ValueError(f"{len(labels)} labels for {model.config.num_classes} classes")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    write_whole(folder / WEIGHTS_FILE, dump_tensors(tensors))
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    write_whole(folder / CARD_FILE, model_card(model.config, labels, notes, num_parameters).encode())
    write_whole(folder / LABELS_FILE, json.dumps(list(labels), indent=1).encode())
    write_whole(folder / CONFIG_FILE, json.dumps(dataclasses.asdict(model.config), indent=1).encode())
    return folder


def write_whole(path: Path, content: bytes) -> Path:
    """Write a file that appears whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    return partial.replace(path)
