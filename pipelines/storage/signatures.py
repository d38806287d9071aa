"""What signed addresses are read with. It comes from the user's list at every run, stays in memory, and is not stored.

Of workers: a run of a million signed addresses hands them all of it, so it is two arrays, which Ray maps and does not
copy.
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
        keys = np.array([hash64(address) for address in addresses], dtype=np.uint64)
        places = np.searchsorted(self.keys_N, keys)
        found = (
            (places < len(self)) & (self.keys_N[np.minimum(places, len(self) - 1)] == keys) if len(self) else keys < 0
        )
        return [
            self.signed[place].as_py() if known else address
            for address, place, known in zip(addresses, places.tolist(), found.tolist(), strict=True)
        ]


UNSIGNED = Signatures.of(())
