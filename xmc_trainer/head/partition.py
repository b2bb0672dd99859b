"""Which labels a rank owns: contiguous, group-aligned, as even as that allows."""

from __future__ import annotations


def label_range(num_labels: int, group_size: int, rank: int, world_size: int) -> range:
    """Global label ids of `rank`. A group is never split, because its labels share one index row.

    Raises ValueError if there are fewer groups than ranks.
    """
    groups = -(-num_labels // group_size)
    if groups < world_size:
        raise ValueError(f"{groups} groups of labels cannot be shared by {world_size} ranks; start fewer processes")
    first, last = groups * rank // world_size, groups * (rank + 1) // world_size
    return range(first * group_size, min(last * group_size, num_labels))
