"""A public checkpoint folder: its JSON files and its tensors, of which each has to be taken exactly once.

Read are config.json, and model.safetensors, or its shards by model.safetensors.index.json, or the same two as
pytorch_model.bin. Nothing is unpickled but tensors.
"""

import json
import pickle
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mone.checkpoint import CheckpointError

CONFIG_FILE = "config.json"
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


class Source:
    """Config and tensors of a public checkpoint.

    Attributes:
        folder: Where it lies.
        config: Parsed config.json.
    """

    def __init__(self, folder: Path | str) -> None:
        """Read config.json; tensors are read when first asked for.

        Raises:
            CheckpointError: No such folder, or no config.json that holds an object.
        """
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"no model folder at {self.folder}")
        self.config = self.json(CONFIG_FILE)
        self._tensors: dict[str, Tensor] | None = None

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file that holds an object.

        Raises:
            CheckpointError: It is missing or holds something else.
        """
        path = self.folder / name
        try:
            content = json.loads(path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{path}: an object is needed, not {type(content).__name__}")
        return content

    def refuse_key(self, key: str, value: object, reason: str) -> CheckpointError:
        """The error of a config that cannot be expressed; it names the key and its value."""
        return CheckpointError(f"{self.folder / CONFIG_FILE}: {key} {value!r}: {reason}")

    def integer(self, key: str, default: int) -> int:
        """A positive integer of the config.

        Raises:
            CheckpointError: It is something else.
        """
        value = self.config.get(key, default)
        if type(value) is not int or value < 1:
            raise self.refuse_key(key, value, "a positive integer is needed")
        return value

    def number(self, key: str, default: float) -> float:
        """A positive number of the config.

        Raises:
            CheckpointError: It is something else.
        """
        value = self.config.get(key, default)
        if type(value) not in (int, float) or not value > 0:
            raise self.refuse_key(key, value, "a positive number is needed")
        return float(value)

    def pair(self, key: str, value: object) -> tuple[int, int]:
        """Height and width from one integer or two.

        Raises:
            CheckpointError: The value is something else.
        """
        pair = (value, value) if type(value) is int else value
        if not isinstance(pair, list | tuple) or len(pair) != 2 or any(type(v) is not int or v < 1 for v in pair):
            raise self.refuse_key(key, value, "an integer or two are needed")
        return pair[0], pair[1]

    def load(self, renames: Sequence[tuple[str, str]] = ()) -> None:
        """Read the tensors.

        Args:
            renames: Regular expressions and replacements, for layouts that differ in names only.

        Raises:
            CheckpointError: Files that are missing, damaged, or hold more than tensors.
        """
        self._tensors = {}
        for path in self._weight_paths():
            for name, tensor in _read_tensors(path).items():
                for pattern, replacement in renames:
                    name = re.sub(pattern, replacement, name)
                self._tensors[name] = tensor

    def _weight_paths(self) -> list[Path]:
        for name in _WEIGHT_FILES:
            if (self.folder / name).exists():
                return [self.folder / name]
            index = f"{name}.index.json"
            if (self.folder / index).exists():
                weight_map = self.json(index).get("weight_map")
                shards = sorted({str(shard) for shard in weight_map.values()}) if isinstance(weight_map, dict) else []
                if not shards or any(Path(shard).name != shard for shard in shards):
                    raise CheckpointError(f"{self.folder / index}: weight_map must name files of this folder")
                return [self.folder / shard for shard in shards]
        raise CheckpointError(f"{self.folder} has no weights: {' or '.join(_WEIGHT_FILES)} is needed")

    @property
    def names(self) -> tuple[str, ...]:
        """Tensors that were not taken yet."""
        assert self._tensors is not None, "load() comes first"
        return tuple(self._tensors)

    def shape(self, name: str, reason: str = "") -> tuple[int, ...]:
        """The shape of a tensor, for sizes that no config tells.

        Raises:
            CheckpointError: It is missing; the reason is added.
        """
        assert self._tensors is not None, "load() comes first"
        if name not in self._tensors:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing{reason and f': {reason}'}")
        return tuple(self._tensors[name].shape)

    def outputs(self, name: str, reason: str = "") -> int:
        """Rows of a matrix.

        Raises:
            CheckpointError: It is missing, and then the reason is added, or no matrix.
        """
        if len(shape := self.shape(name, reason)) != 2:
            raise CheckpointError(f"{self.folder}: tensor {name} has shape {list(shape)}, a matrix is needed")
        return shape[0]

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor, as float32.

        Raises:
            CheckpointError: It is missing, of another shape, or not of a floating-point type.
        """
        if self.shape(name) != shape:
            raise CheckpointError(
                f"{self.folder}: tensor {name} has shape {list(self.shape(name))}, the config wants {list(shape)}"
            )
        assert self._tensors is not None
        tensor = self._tensors.pop(name)
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{self.folder}: tensor {name} has dtype {tensor.dtype}, a floating-point one is needed"
            )
        return tensor.float()

    def refuse_tensors(self, reasons: dict[str, str]) -> None:
        """Stop where a tensor's name matches a pattern; said before sizes are compared, since it explains them.

        Raises:
            CheckpointError: Names the tensor and the reason.
        """
        for pattern, reason in reasons.items():
            for name in self.names:
                if re.search(pattern, name):
                    raise CheckpointError(f"{self.folder}: tensor {name} cannot be expressed: {reason}")

    def finish(self, ignored: str) -> None:
        """Check that every tensor was taken.

        Args:
            ignored: Regular expression of names that the forward pass does not read.

        Raises:
            CheckpointError: Names the first that was not.
        """
        for name in sorted(self.names):
            if not re.fullmatch(ignored, name):
                raise CheckpointError(f"{self.folder}: tensor {name} has no place in the model")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else _unpickle_tensors(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or 'no such file'}") from error
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch has no name for
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged or holds more than tensors; nothing else is unpickled") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{path} is damaged or holds more than tensors; a dictionary of tensors is needed")
    return tensors


def _unpickle_tensors(path: Path) -> dict[str, Tensor]:
    """With torch's restricted unpickler, which knows tensors and containers only."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"  # the format before torch 1.6 cannot be mapped
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickles that it then refuses anyway
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
