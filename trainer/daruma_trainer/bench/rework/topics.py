"""Latent Dirichlet allocation by collapsed Gibbs sampling.

As in SCAR the topic of each token is the state: a table with a row for each document, rule
`assign`. The counts are made from it, so a lost document that goes back to old topics leaves no
count wrong. A step samples a sixteenth of the documents anew, all of its tokens against the counts
of the step's beginning, less the token itself, as workers in parallel do.
"""

from math import lgamma

import numpy as np
from numpy.typing import NDArray

from daruma_trainer.bench.rework.problems import Table, Values
from daruma_trainer.layout import Floats
from daruma_trainer.rules import Assign

DOCUMENTS, TOKENS, WORDS, TOPICS = 512, 200, 1000, 10
PART = 16
ALPHA, BETA = 0.1, 0.05

Batch = tuple[NDArray[np.int64], NDArray[np.float32]]
"""Documents, and a uniform number for each of their tokens."""


class Topics:
    """Topics of the tokens of a synthetic corpus."""

    name = "lda"
    title = (
        f"LDA by collapsed Gibbs sampling, {DOCUMENTS * TOKENS:,} tokens in {DOCUMENTS} synthetic "
        f"documents, {WORDS} words, {TOPICS} topics; a step samples {DOCUMENTS // PART} documents; "
        "the state is the topic of each token, and the counts are made from it"
    )
    lr = 1.0
    budget = 360

    def __init__(self) -> None:
        rng = np.random.default_rng(22)
        phi = rng.dirichlet(np.full(WORDS, BETA), TOPICS)
        theta = rng.dirichlet(np.full(TOPICS, ALPHA), DOCUMENTS)
        topic = np.stack([rng.choice(TOPICS, TOKENS, p=t) for t in theta])
        bounds = np.cumsum(phi, axis=1)
        drawn = rng.random((DOCUMENTS, TOKENS))
        words = np.empty((DOCUMENTS, TOKENS), np.int64)
        for k in range(TOPICS):
            of = topic == k
            words[of] = np.minimum(np.searchsorted(bounds[k], drawn[of]), WORDS - 1)
        self._words = words
        self._rows = np.arange(DOCUMENTS)[:, None]
        size = DOCUMENTS * TOKENS + 1
        self._log = [_log_gammas(size, c) for c in (BETA, ALPHA, WORDS * BETA)]
        self.tables: tuple[Table, ...] = (
            Table("topics", DOCUMENTS, TOKENS, Assign(labels=TOPICS)),
        )

    def initial(self, rng: np.random.Generator) -> Values:
        """See Problem.initial."""
        return [rng.integers(0, TOPICS, (1, DOCUMENTS, TOKENS)).astype(np.float32)]

    def batch(self, rng: np.random.Generator, step: int) -> Batch:
        """See Problem.batch."""
        del step
        chosen = rng.choice(DOCUMENTS, DOCUMENTS // PART, replace=False)
        return chosen, rng.random(len(chosen) * TOKENS, np.float32)

    def pushes(self, values: Values, batch: Batch) -> Values:
        """See Problem.pushes."""
        out = values[0].copy()
        for arm in out:
            self._sample(arm, *batch)
        return [out]

    def losses(self, values: Values) -> NDArray[np.float64]:
        """See Problem.losses: −log p(words, topics), a token."""
        words, topics, totals = self._log
        out = np.empty(len(values[0]))
        for i, arm in enumerate(values[0]):
            z = arm.astype(np.int64)
            by_word = self._by_word(z)
            by_document = np.bincount(
                (self._rows * TOPICS + z).ravel(), minlength=DOCUMENTS * TOPICS
            )
            total = by_word.sum(axis=1)
            out[i] = totals[total].sum() - words[by_word].sum() - topics[by_document].sum()
        return out / (DOCUMENTS * TOKENS)

    def _by_word(self, z: NDArray[np.int64]) -> NDArray[np.int64]:
        """Count tokens by (topic, word)."""
        flat = (z * WORDS + self._words).ravel()
        return np.bincount(flat, minlength=TOPICS * WORDS).reshape(TOPICS, WORDS)

    def _sample(self, arm: Floats, documents: NDArray[np.int64], u: NDArray[np.float32]) -> None:
        z = arm.astype(np.int64)
        by_word = self._by_word(z).astype(np.float32)
        old, words = z[documents].ravel(), self._words[documents].ravel()
        n = len(documents)
        flat = np.repeat(np.arange(n), TOKENS) * TOPICS + old
        by_document = np.bincount(flat, minlength=n * TOPICS).reshape(n, TOPICS).astype(np.float32)
        # Counts without the token itself, for the one topic that it has.
        here = np.arange(len(old))
        weight = (by_word + np.float32(BETA))[:, words]
        weight[old, here] -= 1
        share = np.repeat((by_document + np.float32(ALPHA)).T, TOKENS, axis=1)
        share[old, here] -= 1
        weight *= share
        total = by_word.sum(axis=1) + np.float32(WORDS * BETA)
        weight /= total[:, None]
        weight[old, here] *= total[old] / (total[old] - 1)
        np.cumsum(weight, axis=0, out=weight)
        new = (weight[:-1] < u * weight[-1]).sum(axis=0)
        arm[documents] = new.reshape(n, TOKENS)


def _log_gammas(size: int, offset: float) -> NDArray[np.float64]:
    """log Γ(n + offset) − log Γ(offset) for counts n."""
    return np.array([lgamma(n + offset) for n in range(size)]) - lgamma(offset)
