"""What signed addresses are read with. It comes from the user's list at every run, stays in memory, and is not stored.

All of it goes to every worker, be it a million addresses: so it is two arrays, which Ray maps and does not copy.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipelines.storage.address import hash64, public_address


@dataclass(frozen=True, slots=True)
class Signatures:
    """Signed addresses by their public part.

    Attributes:
        keys_N: uint64, hashes of the public addresses, ascending.
        signed: The addresses to read.
    """

    keys_N: np.ndarray
    signed: pa.LargeStringArray = field(repr=False)

    @staticmethod
    def of(uris: Iterable[str]) -> "Signatures":
        """Those of the addresses that have something to hide."""
        signed = pa.array([uri for uri in uris if uri != public_address(uri)], pa.large_string())
        keys_N = np.array([hash64(public_address(uri.as_py())) for uri in signed], dtype=np.uint64)
        order_N = np.argsort(keys_N, kind="stable")
        return Signatures(keys_N[order_N], signed.take(order_N))

    def __len__(self) -> int:
        """How many."""
        return len(self.keys_N)

    def sign(self, addresses: Sequence[str]) -> list[str]:
        """What to read the files at these public addresses with; those without a signature stand as they are."""
        if not len(self):
            return list(addresses)
        keys = np.array([hash64(address) for address in addresses], dtype=np.uint64)
        places = np.minimum(np.searchsorted(self.keys_N, keys), len(self) - 1)
        found = self.keys_N[places] == keys
        return [
            self.signed[place].as_py() if known else address
            for address, place, known in zip(addresses, places.tolist(), found.tolist(), strict=True)
        ]

    def sign_table(self, manifest: pa.Table) -> pa.Table:
        """Rows with a column `video` to read the files with."""
        place = manifest.schema.get_field_index("video")
        signed = pa.array(self.sign(manifest["video"].to_pylist()), pa.string())
        return manifest.set_column(place, manifest.schema.field(place), signed)


UNSIGNED = Signatures.of(())
