"""Data sets as tensors: known ones by name, real digits and pairs of them, a user's files, class-balanced draws.

All randomness comes from generators seeded by what the caller names; nothing touches the global generator.
"""

from __future__ import annotations

from .balanced import probe_batch as probe_batch
from .balanced import subset as subset
from .digits import DigitPairs as DigitPairs
from .digits import Task as Task
from .digits import digit_pairs as digit_pairs
from .digits import digits as digits
from .folder import image_folder as image_folder
from .named import named_data as named_data
from .npz import load_npz as load_npz
from .seeds import stream_seed as stream_seed
from .split import Dataset as Dataset
from .split import Split as Split
from .split import TrainingData as TrainingData
from .text import ParallelText as ParallelText
from .text import SentencePairs as SentencePairs
from .text import parallel_text as parallel_text
