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

Numbers = NDArray[np.int64]
Batch = tuple[Numbers, Floats]
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

    def derive(self, values: Values) -> Values:
        """See Problem.derive: tokens by (topic, word), and by (document, topic)."""
        counts: Values = [
            np.empty((len(values[0]), TOPICS, WORDS), np.float32),
            np.empty((len(values[0]), DOCUMENTS, TOPICS), np.float32),
        ]
        for arm, by_word, by_document in zip(values[0], *counts, strict=True):
            z = arm.astype(np.int64)
            _count(z * WORDS + self._words, by_word)
            _count(self._rows * TOPICS + z, by_document)
        return counts

    def pushes(self, values: Values, batch: Batch) -> Values:
        """See Problem.pushes."""
        whole = values if len(values) > 1 else [values[0].copy(), *self.derive(values)]
        for arm, by_word, by_document in zip(*whole, strict=True):
            self._sample(arm, by_word, by_document, *batch)
        return whole[: len(values)]

    def losses(self, values: Values) -> NDArray[np.float64]:
        """See Problem.losses: −log p(words, topics), a token."""
        words, topics, totals = self._log
        _, by_words, by_documents = values if len(values) > 1 else values + self.derive(values)
        out = np.empty(len(values[0]))
        for i in range(len(out)):
            by_word, by_document = by_words[i].astype(np.int64), by_documents[i].astype(np.int64)
            total = by_word.sum(axis=1)
            out[i] = totals[total].sum() - words[by_word].sum() - topics[by_document].sum()
        return out / (DOCUMENTS * TOKENS)

    def _sample(
        self, arm: Floats, by_word: Floats, by_document: Floats, documents: Numbers, u: Floats
    ) -> None:
        """Sample all tokens of these documents against the counts of the beginning; change all."""
        old, words = arm[documents].astype(np.int64).ravel(), self._words[documents].ravel()
        here, rows = np.arange(len(old)), np.repeat(np.arange(len(documents)), TOKENS)
        total, share = by_word.sum(axis=1), by_document[documents]
        likely = (by_word + BETA) / (total + WORDS * BETA)[:, None]
        weight = likely.take(words, axis=1, mode="clip")
        weight = weight.reshape(TOPICS, len(documents), TOKENS)
        weight *= (share + ALPHA).T[:, :, None]
        weight = weight.reshape(TOPICS, -1)
        # Counts without the token itself, for the one topic that it has.
        weight[old, here] = (
            (by_word[old, words] - 1 + BETA) * (share[rows, old] - 1 + ALPHA)
            / (total[old] - 1 + WORDS * BETA)
        )  # fmt: skip
        np.cumsum(weight, axis=0, out=weight)
        new = (weight[:-1] < u * weight[-1]).sum(axis=0)
        arm[documents] = new.reshape(len(documents), TOKENS)
        old *= WORDS
        old += words
        size = TOPICS * WORDS
        change = np.bincount(new * WORDS + words, minlength=size) - np.bincount(old, minlength=size)
        by_word += change.reshape(by_word.shape)
        _count(rows * TOPICS + new, share)
        by_document[documents] = share


def _count(flat: Numbers, out: Floats) -> None:
    """Count each number below the size of `out`."""
    out[:] = np.bincount(flat.ravel(), minlength=out.size).reshape(out.shape)


def _log_gammas(size: int, offset: float) -> NDArray[np.float64]:
    """log Γ(n + offset) − log Γ(offset) for counts n."""
    return np.array([lgamma(n + offset) for n in range(size)]) - lgamma(offset)
