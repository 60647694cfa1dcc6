"""Random streams that depend on nothing but their key.

Every random draw of a run comes from a stream named by (seed, stream name, keys), for example `(0, "shuffle", task, epoch)`. Nothing
is carried from one epoch to the next, so a resumed run needs no saved generator state, and adding a draw in one place shifts no
other. Augmentation draws are keyed by the sample too (`uniform`), hence independent of batch order, workers and processes.
"""

import hashlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The increments and multipliers of SplitMix64 (Steele, Lea & Flood 2014), as signed 64-bit integers: torch has no uint64 arithmetic.
_GOLDEN = -7046029254386353131
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685


def stream_seed(seed: int, name: str, *keys: int) -> int:
    """A 63-bit seed for the stream `name` of run `seed`, e.g. `stream_seed(0, "shuffle", task, epoch)`."""
    text = "\0".join([str(seed), name, *map(str, keys)])  # a separator no name contains: ("a:1",) and ("a", 1) are two streams
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest(), "little") >> 1


def generator(seed: int, name: str, *keys: int) -> torch.Generator:
    """A CPU generator at the start of the stream `name` of run `seed`.

    torch's CPU generator uses the low 32 bits of its seed only: two given streams are the same with probability 2**-32.
    """
    return torch.Generator().manual_seed(stream_seed(seed, name, *keys))


def seed_everything(seed: int, name: str, *keys: int) -> None:
    """Put the global generators (Python, NumPy, torch) at the start of a stream: for code that draws from them (layers, dropout)."""
    value = stream_seed(seed, name, *keys)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


@torch.no_grad()
def draw_(weight: Tensor, init: Callable[..., Tensor], **options: Any) -> None:
    """Fill a weight as one of `torch.nn.init` does, with numbers drawn on the CPU: a CUDA generator would give others."""
    weight.copy_(init(torch.empty(weight.shape), **options))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch shifts int64 arithmetically; the mask makes it logical


def _scramble(x: Tensor) -> Tensor:
    """A round of SplitMix64: int64 -> int64, one to one, every bit of the result depending on all of `x`."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def uniform(key: int | Tensor, sample_ids: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1) that depend only on (key, sample id, position).

    Args:
        key: a `stream_seed`, or a 0-dimensional int64 tensor on the CPU.
        sample_ids: (B,) integer ids of the samples, on any device.
        count: numbers per sample.

    Returns:
        (B, count) float32, on the device of `sample_ids`.
    """
    position = torch.arange(count, device=sample_ids.device)
    x = (key + sample_ids.long().unsqueeze(1) * _GOLDEN) ^ (position * _MIX_1 + _MIX_2)
    x = _scramble(_scramble(x))  # one round passes our tests too; the second is a margin, as the inputs are so regular
    return _shift_right(x, 40).float() * 2**-24


def scrambled(words: Tensor, start: int = 0) -> Tensor:
    """(n,) int64 -> (n,) int64: noise that depends, one to one, on each word, and on its position, counted from `start`."""
    return _scramble(words + torch.arange(start, start + len(words), device=words.device) * _GOLDEN)
