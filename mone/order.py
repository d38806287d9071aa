"""Which clip is seen in which step by which worker: a pure function of seed, epoch and position, for any world."""

import numpy as np


class EpochOrder:
    """The order of every epoch, and its division among workers.

    What the steps see together does not depend on the number of workers, so a run continues on more or fewer of them
    as if nothing had happened: its place is an epoch and a count of global samples.

    Attributes:
        num_samples: Rows of the data set.
        seed: Of all epochs.
        shuffle: False keeps the order of the data set.
    """

    def __init__(self, num_samples: int, seed: int, shuffle: bool = True) -> None:
        self.num_samples, self.seed, self.shuffle = num_samples, seed, shuffle

    def permutation(self, epoch: int) -> np.ndarray:
        """All rows in the order of an epoch, int64 [S].

        Sorted by random keys: NumPy keeps the bits of Philox from version to version, but not what `permutation` makes
        of them.
        """
        if not self.shuffle:
            return np.arange(self.num_samples)
        key = np.array([self.seed % 2**64, epoch], dtype=np.uint64)
        return np.argsort(np.random.Philox(key=key).random_raw(self.num_samples), kind="stable")

    def steps(self, epoch: int, global_batch: int, *, rank: int, world: int, start_sample: int = 0) -> list[np.ndarray]:
        """The rows that one worker sees in each remaining step of an epoch.

        Args:
            epoch: From 0.
            global_batch: Rows of a step, of all workers together; the last step may have fewer.
            rank: Of this worker.
            world: Number of workers.
            start_sample: Rows of this epoch that are done.

        Returns:
            An array for each step, int64; it may be empty where a step has fewer rows than workers need.

        Raises:
            ValueError: Numbers out of range.
        """
        if global_batch < 1 or not 0 <= rank < world or not 0 <= start_sample <= self.num_samples:
            raise ValueError(
                f"no such part: batch {global_batch}, rank {rank} of {world}, from {start_sample} of {self.num_samples}"
            )
        order = self.permutation(epoch)
        batches = [order[start : start + global_batch] for start in range(start_sample, len(order), global_batch)]
        return [batch[part_of(len(batch), rank, world)] for batch in batches]


def part_of(num_rows: int, rank: int, world: int) -> slice:
    """A worker's part of a batch: contiguous, from an even offset, as equal as whole pairs of rows allow.

    Whole pairs, because mixup mixes neighbours. Only the last part that has rows can have an odd number of them.
    """
    num_pairs = -(-num_rows // 2)
    start, end = (-(-num_pairs * edge // world) for edge in (rank, rank + 1))
    return slice(min(2 * start, num_rows), min(2 * end, num_rows))
