"""Which boxes a loss looks at: random samples that depend on a key alone, and hard mining.

Random choices are counter-based: a candidate's priority is a hash of (key, stream, name of the candidate), so the
same image with the same key samples the same candidates on any machine, in any company, however it is padded and
after any restart.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(value: int) -> int:
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value


# splitmix64's increment and multipliers (Steele, Lea, Flood 2014), as the signed integers that torch has.
_INCREMENT = _signed(0x9E3779B97F4A7C15)
_MULTIPLY_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = _signed(0x94D049BB133111EB)

# One stream per place that draws, so that no two draws for an image share their numbers.
REFINEMENT, TEACHER, STUDENT = 1, 2, 3


def _shift(x: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically; the hash needs zeros from the left.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MULTIPLY_1
    x = (x ^ _shift(x, 27)) * _MULTIPLY_2
    return x ^ _shift(x, 31)


def priority(key: Tensor, stream: int, candidates: Tensor) -> Tensor:
    """Pseudo-random int64 of each candidate, by its name (n,), under an image's key (scalar int64) and a stream."""
    start = _mix(key + _signed(stream * _INCREMENT))
    return _mix(start + (candidates + 1) * _INCREMENT)


def sample(
    positive: Tensor, negative: Tensor, num_samples: int, positive_fraction: float, priorities: Tensor
) -> Tensor:
    """Draw positives and negatives at random; negatives fill what positives leave free.

    Args:
        positive, negative: (n,) bool, disjoint; the rest is ignored.
        num_samples: how many are wanted; fewer come back where there are fewer candidates.
        positive_fraction: at most this share of `num_samples` is positive.
        priorities: (n,) int64 of `priority`.

    Returns:
        Indices (m,) int64, positives first.
    """
    return _quota(positive, negative, num_samples, positive_fraction, priorities)


def mine(positive: Tensor, negative: Tensor, num_samples: int, positive_fraction: float | None, rank: Tensor) -> Tensor:
    """Choose the candidates of the highest rank (n,), as a loss, positives and negatives each by themselves.

    With a `positive_fraction` of None the highest are taken whatever they are. Returns indices (m,).
    """
    if positive_fraction is None:
        return _best(positive | negative, num_samples, rank)
    return _quota(positive, negative, num_samples, positive_fraction, rank)


def _quota(positive: Tensor, negative: Tensor, num: int, fraction: float, rank: Tensor) -> Tensor:
    # One at least: a share of a small number must not round to no positive at all.
    chosen = _best(positive, max(1, round(num * fraction)), rank)
    return torch.cat([chosen, _best(negative, num - len(chosen), rank)])


def _best(mask: Tensor, num: int, rank: Tensor) -> Tensor:
    candidates = mask.nonzero().flatten()
    return candidates[rank[candidates].topk(min(num, len(candidates))).indices]
