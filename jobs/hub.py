"""A public checkpoint from a model hub, by way of huggingface_hub, which is installed only where it is wanted."""

import os
import re
from pathlib import Path

from jobs.cli import UserError

_SCHEME = "hf://"
_ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_JSON, _WEIGHTS, _PICKLED_WEIGHTS = "*.json", "*.safetensors", "pytorch_model*.bin"


def is_hub_address(source: str) -> bool:
    """Whether a source is an address of the hub and not a folder."""
    return source.startswith(_SCHEME)


def download(address: str) -> Path:
    """Fetch config and weights of hf://org/name[@revision] into the hub's own cache; nothing else is fetched.

    A token comes from HF_TOKEN only, goes to the hub only, and is not kept.

    Raises:
        UserError: An address of another form, no huggingface_hub, or what the hub answers.
    """
    match = _ADDRESS.fullmatch(address)
    if not match:
        raise UserError(f"{address} is not of the form hf://org/name or hf://org/name@revision")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(f"{address} needs huggingface_hub: pip install 'mone-video[hub]'") from error
    token = os.environ.get("HF_TOKEN") or False  # False: no token from a file either

    def fetch(*patterns: str) -> Path:
        # fnmatch's * crosses slashes: folders hold other formats of the same weights.
        return Path(
            snapshot_download(
                match[1], revision=match[2], allow_patterns=list(patterns), ignore_patterns=["*/*"], token=token
            )
        )

    try:
        folder = fetch(_JSON, _WEIGHTS)
        return folder if any(folder.glob(_WEIGHTS)) else fetch(_JSON, _PICKLED_WEIGHTS)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot fetch {address}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What a person can do, else the first line that says something."""
    name = type(error).__name__
    if name == "RevisionNotFoundError":
        return "no such revision"
    if name in ("RepositoryNotFoundError", "GatedRepoError"):
        return "no such model, or not without a token that may read it; set HF_TOKEN"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), name)
