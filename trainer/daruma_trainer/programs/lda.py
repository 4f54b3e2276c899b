"""Latent Dirichlet allocation by collapsed Gibbs sampling, as in SCAR's evaluation.

    python -m daruma_trainer.programs.lda --data synthetic:300,500,8,60 --sweeps 40

The state is one topic for each token: table `z`, whose rows are pieces of documents. Every document
belongs to one worker, which draws its topics anew in each sweep. The counts of topics are derived:
each worker counts them from `z` when a sweep begins, so that a document that was set back by a
failure perturbs the sampler and leaves no error behind. What other workers draw meanwhile is not
seen before the next sweep (AD-LDA, Newman et al. 2009). Reports the log likelihood of a token under
the topics and mixtures that the counts give (`log_likelihood`), and its `perplexity`.
"""

import sys
import time
from dataclasses import dataclass

import numpy as np

import daruma_trainer as daruma
from daruma_trainer.layout import Floats, Ints
from daruma_trainer.programs.common import parser_of, read_or_exit
from daruma_trainer.programs.data import Corpus, documents

PIECE = 32
"""Tokens in a row of `z`: documents differ in length, rows of a table do not."""
AT_ONCE = 64
"""Documents that are drawn side by side."""


@dataclass(frozen=True, slots=True)
class Model:
    """The number of topics and both priors."""

    topics: int
    alpha: float
    beta: float


@dataclass(frozen=True, slots=True)
class Counts:
    """How often a word has a topic, and a topic a token; both derived from all topics."""

    word_topic: Ints
    """(vocabulary, topics)"""
    totals: Ints
    """(topics,)"""


def count(corpus: Corpus, z: Ints, topics: int) -> Counts:
    """Count the topics of all tokens."""
    flat = np.bincount(corpus.words * topics + z, minlength=corpus.vocabulary * topics)
    table = flat.reshape(corpus.vocabulary, topics)
    return Counts(table, table.sum(axis=0))


def mixtures(corpus: Corpus, z: Ints, topics: int) -> Ints:
    """Count the topics of each document; shape (documents, topics)."""
    of = np.repeat(np.arange(corpus.documents), corpus.lengths)
    flat = np.bincount(of * topics + z, minlength=corpus.documents * topics)
    return flat.reshape(corpus.documents, topics)


def sweep(
    corpus: Corpus, z: Ints, mine: Ints, model: Model, rng: np.random.Generator,
    at_once: int = AT_ONCE,
) -> Counts:  # fmt: skip
    """Draw the topics of the documents `mine` anew, in place; returns the counts after it.

    `at_once` documents go side by side, one token of each at a time. So a document's own counts
    are exact, and those of words are behind by at most `at_once` tokens; with 1 it is the exact
    sampler. A test compares its stationary distribution with the posterior of a toy model.
    """
    counts = count(corpus, z, model.topics)
    own = mixtures(corpus, z, model.topics)
    # Longest first: those drawn side by side are about equally long.
    mine = mine[np.argsort(-corpus.lengths[mine], kind="stable")]
    for first in range(0, len(mine), at_once):
        group = mine[first : first + at_once]
        lengths = corpus.lengths[group]
        for place in range(int(lengths[0])):
            d = group[lengths > place]
            t = corpus.starts[d] + place
            z[t] = _draw(corpus.words[t], z[t], d, (counts, own), (model, rng))
    return counts


def _draw(
    words: Ints, old: Ints, d: Ints, have: tuple[Counts, Ints],
    how: tuple[Model, np.random.Generator],
) -> Ints:  # fmt: skip
    """Draw one token of each of the documents `d`, given all others; updates the counts."""
    (counts, own), (model, rng) = have, how
    own[d, old] -= 1
    np.subtract.at(counts.word_topic, (words, old), 1)
    np.subtract.at(counts.totals, old, 1)
    weight = (own[d] + model.alpha) * (counts.word_topic[words] + model.beta)
    weight /= counts.totals + model.beta * len(counts.word_topic)
    ladder = weight.cumsum(axis=1)
    level = rng.random(len(d)) * ladder[:, -1]
    new: Ints = np.minimum((ladder <= level[:, None]).sum(axis=1), model.topics - 1)
    own[d, new] += 1
    np.add.at(counts.word_topic, (words, new), 1)
    np.add.at(counts.totals, new, 1)
    return new


def log_likelihood(corpus: Corpus, z: Ints, model: Model) -> float:
    """Return the mean of log p(word) over all tokens, with what the counts say of both mixtures."""
    counts = count(corpus, z, model.topics)
    phi = (counts.word_topic + model.beta) / (counts.totals + model.beta * len(counts.word_topic))
    theta = mixtures(corpus, z, model.topics) + model.alpha
    theta /= theta.sum(axis=1, keepdims=True)
    of = np.repeat(np.arange(corpus.documents), corpus.lengths)
    total = 0.0
    for first in range(0, len(of), 1 << 16):
        part = slice(first, first + (1 << 16))
        total += float(np.log((theta[of[part]] * phi[corpus.words[part]]).sum(axis=1)).sum())
    return total / len(of)


class Pieces:
    """Where each token stands in a table whose rows are pieces of documents."""

    def __init__(self, corpus: Corpus) -> None:
        rows = -(-corpus.lengths // PIECE)
        self._begins: Ints = np.concatenate([[0], np.cumsum(rows)])
        self.shape = (int(self._begins[-1]), PIECE)
        of = np.repeat(np.arange(corpus.documents), corpus.lengths)
        self._at: Ints = self._begins[of] * PIECE + np.arange(len(of)) - corpus.starts[of]

    def pack(self, z: Ints) -> Floats:
        """Write all topics as a table."""
        table = np.zeros(self.shape[0] * PIECE, np.float32)
        table[self._at] = z
        return table.reshape(self.shape)

    def unpack(self, table: Floats) -> Ints:
        """Read all topics from a table."""
        return table.reshape(-1)[self._at].astype(np.int64)

    def rows(self, mine: Ints) -> Ints:
        """Return the rows of some documents."""
        parts = [np.arange(self._begins[d], self._begins[d + 1]) for d in mine.tolist()]
        return np.concatenate([np.empty(0, np.int64), *parts])


def main() -> int:
    """Train as one worker of a job."""
    parser = parser_of(
        __doc__, "synthetic:300,500,8,60", "synthetic:DOCS,WORDS,TOPICS,LENGTH or a path"
    )
    parser.add_argument("--sweeps", type=int, default=40)
    parser.add_argument("--topics", type=int, default=20)
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--beta", type=float, default=0.05)
    options = parser.parse_args()
    model = Model(options.topics, options.alpha, options.beta)
    corpus = read_or_exit("lda", lambda: documents(options.data, options.seed))
    pieces = Pieces(corpus)
    start = np.random.default_rng(options.seed).integers(0, model.topics, len(corpus.words))
    with daruma.join() as job:
        rule = daruma.Assign(labels=model.topics)
        table = job.table("z", pieces.shape, rule, initial=pieces.pack(start))
        mine = np.arange(job.index, corpus.documents, job.workers)
        rows = pieces.rows(mine)

        def score() -> dict[str, float]:
            found = log_likelihood(corpus, pieces.unpack(table.values()), model)
            return {"log_likelihood": found, "perplexity": float(np.exp(-found))}

        job.evaluate(score)
        for phase in job.phases(options.sweeps):
            z = pieces.unpack(table.values())
            rng = np.random.default_rng((options.seed, job.index, phase))
            sweep(corpus, z, mine, model, rng)
            time.sleep(options.think_ms / 1000)
            table.push(rows, pieces.pack(z)[rows])
            if job.index == 0:
                job.report(loss=-score()["log_likelihood"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
