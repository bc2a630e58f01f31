"""What each of a round's questions is about, roughly, so that replay keeps some of everything.

Spherical k-means on hashed TF-IDF, in numpy. On 600 customer messages of 77 intents its sixteen
topics share .49 of the intents' information (NMI, mean of four samples); sixteen SimHash buckets
.31, sixteen random ones .27; the top TF-IDF term puts nearly every question into a topic of its
own.
"""

import math
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from perennial.training.text import words

_NUM_TOPICS = 16
_NUM_BUCKETS = 1024  # hashed vocabulary, D below; N texts, K topics
_NUM_PASSES = 8

Vectors = NDArray[np.float32]


def topics(texts: Sequence[str]) -> list[str]:
    """For each text the word that stands for its topic; equal for any order of `texts`.

    At most 16 topics, and "" for texts that share no word with two others. A word names a topic of
    these texts only: that of other texts is another.
    """
    found = {text: {word for word in words(text) if len(word) > 2} for text in texts}
    frequency = Counter(word for said in found.values() for word in said)
    idf = {word: math.log(len(found) / df) for word, df in frequency.items() if df > 2}
    shared = {text: sorted(said & idf.keys()) for text, said in sorted(found.items())}
    grouped = {text: said for text, said in shared.items() if said}
    nearest_N = _clusters(_vectors([*grouped.values()], idf))
    weights: dict[int, Counter[str]] = {}
    for cluster, said in zip(nearest_N, grouped.values(), strict=True):
        weights.setdefault(cluster, Counter()).update({word: idf[word] for word in said})
    names = {cluster: _heaviest(weight) for cluster, weight in weights.items()}
    of_text = {text: names[at] for text, at in zip(grouped, nearest_N, strict=True)}
    return [of_text.get(text, "") for text in texts]


def _vectors(said: Sequence[Sequence[str]], idf: dict[str, float]) -> Vectors:
    vectors_ND = np.zeros((len(said), _NUM_BUCKETS), dtype=np.float32)
    for row, found in enumerate(said):
        for word in found:
            vectors_ND[row, zlib.crc32(word.encode()) % _NUM_BUCKETS] += idf[word]
    return _unit(vectors_ND)


def _clusters(vectors_ND: Vectors) -> list[int]:
    """Nearest centre of each row; centres begin as rows far from each other."""
    if not len(vectors_ND):
        return []
    chosen, closest_N = [0], vectors_ND @ vectors_ND[0]
    while len(chosen) < min(_NUM_TOPICS, len(vectors_ND)):
        chosen.append(int(closest_N.argmin()))
        closest_N = np.maximum(closest_N, vectors_ND @ vectors_ND[chosen[-1]])
    centres_KD = vectors_ND[chosen]
    nearest_N = (vectors_ND @ centres_KD.T).argmax(axis=1)
    for _ in range(_NUM_PASSES):
        sums = [vectors_ND[nearest_N == k].sum(axis=0) for k in range(len(chosen))]
        centres_KD = _unit(np.stack(sums))
        nearest_N = (vectors_ND @ centres_KD.T).argmax(axis=1)
    return [int(k) for k in nearest_N]


def _unit(vectors_ND: Vectors) -> Vectors:
    norms_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    unit: Vectors = vectors_ND / np.maximum(norms_N1, 1e-9)
    return unit


def _heaviest(weights: Counter[str]) -> str:
    return max(weights, key=lambda word: (weights[word], word))
