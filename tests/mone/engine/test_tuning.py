"""The search for tilings: it finds the fastest of each part and passes over what does not run."""

import pytest

from mone.engine.tilings import default_tilings
from mone.engine.tuning import CANDIDATES, fastest


@pytest.mark.parametrize("seed", range(3))
def test_the_fastest_of_each_part_is_found(seed):
    start = default_tilings((9, 0), 0.4, 50_000)
    wanted = {part: candidates[(seed + 1) % len(candidates)] for part, candidates in CANDIDATES.items()}
    broken = {part: candidates[(seed + 2) % len(candidates)] for part, candidates in CANDIDATES.items()}
    told = []

    def seconds(tilings):
        for part, candidate in broken.items():
            if getattr(tilings, part) == candidate != wanted[part] and getattr(start, part) != candidate:
                raise RuntimeError("out of resource: shared memory")
        return 1.0 - sum(0.05 for part, candidate in wanted.items() if getattr(tilings, part) == candidate)

    best, best_s = fastest(seconds, start, told.append)
    assert best._asdict() == best._asdict() | wanted
    assert best_s == pytest.approx(1.0 - 0.05 * len(wanted))
    assert [line.partition(":")[0] for line in told] == [*CANDIDATES]


def test_noise_changes_nothing():
    start = default_tilings((9, 0), 1.0, 50_000)
    assert fastest(lambda tilings: 1.0 if tilings == start else 0.999, start) == (start, 1.0)
