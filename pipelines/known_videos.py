"""Which videos a manifest already has, in which version: 16 bytes each, however long their names."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.row_files import has_rows, read_columns
from pipelines.schema import MANIFEST
from pipelines.storage.address import hash64

_IDENTITY = ["video", "size_bytes", "version"]
# Of a video that could not be reached.
_NOWHERE = (0, "")


def identity_hashes(address: str, size_bytes: int, version: str) -> tuple[int, int]:
    """What stands for a video, and for this version of it."""
    return hash64(address), hash64(address, size_bytes, version)


@dataclass(frozen=True, slots=True)
class KnownVideos:
    """Videos and their versions.

    Attributes:
        addresses_V: uint64 hashes of addresses, ascending.
        versions_V: uint64 hashes of addresses with size and version, ascending.
    """

    addresses_V: np.ndarray
    versions_V: np.ndarray

    @staticmethod
    def of(hashes: Iterable[tuple[int, int]]) -> "KnownVideos":
        """From hashes as `identity_hashes` gives them."""
        pairs = np.array(list(hashes), dtype=np.uint64).reshape(-1, 2)
        return KnownVideos(np.unique(pairs[:, 0]), np.unique(pairs[:, 1]))

    @staticmethod
    def read(manifest: Path) -> "KnownVideos":
        """Those of a manifest; none where there is none.

        Raises:
            LedgerError: A file that cannot be read.
        """
        tables = read_columns(manifest, _IDENTITY, MANIFEST) if has_rows(manifest) else ()
        return KnownVideos.joined([KnownVideos.of(_distinct(table)) for table in tables])

    @staticmethod
    def joined(parts: Iterable["KnownVideos"]) -> "KnownVideos":
        """All of them."""
        parts = [KnownVideos.of(()), *parts]
        return KnownVideos(
            np.unique(np.concatenate([part.addresses_V for part in parts])),
            np.unique(np.concatenate([part.versions_V for part in parts])),
        )

    @property
    def has_changes(self) -> bool:
        """Whether there are two versions of a video."""
        return len(self.versions_V) > len(self.addresses_V)

    def has(self, address: str, size_bytes: int, version: str) -> bool:
        """Whether it is there and has not changed; a video that cannot be reached has not."""
        address_hash, version_hash = identity_hashes(address, size_bytes, version)
        if (size_bytes, version) == _NOWHERE:
            return _is_in(address_hash, self.addresses_V)
        return _is_in(version_hash, self.versions_V)

    def outdated_rows(self, manifest: pa.Table) -> np.ndarray:
        """Which rows are of a video that is here in another version only, bool."""
        outdated = {
            identity: _is_in(hashes[0], self.addresses_V) and not _is_in(hashes[1], self.versions_V)
            for identity, hashes in _identities(manifest).items()
        }
        columns = (manifest[name].to_pylist() for name in _IDENTITY)
        return np.array([outdated[identity] for identity in zip(*columns, strict=True)], dtype=bool)


def _identities(manifest: pa.Table) -> dict[tuple[str, int, str], tuple[int, int]]:
    distinct = manifest.select(_IDENTITY).group_by(_IDENTITY).aggregate([])
    columns = (distinct[name].to_pylist() for name in _IDENTITY)
    return {identity: identity_hashes(*identity) for identity in zip(*columns, strict=True)}


def _distinct(manifest: pa.Table) -> Iterable[tuple[int, int]]:
    return _identities(manifest).values()


def _is_in(value: int, ascending: np.ndarray) -> bool:
    place = np.searchsorted(ascending, np.uint64(value))
    return bool(place < len(ascending) and ascending[place] == value)
