"""Documents as bags of words: 20 Newsgroups, Reuters, or made by the model itself."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from daruma_trainer.errors import ConfigurationError
from daruma_trainer.layout import Ints
from daruma_trainer.programs.data.reading import opened, read_table, sizes

WORD = re.compile(r"[a-z]{3,}")
RARE = 5
"""A word is kept if at least so many documents have it (folders of text alone) …"""
FREQUENT = 0.5
"""… and no more than this share of them."""
MAX_TOKENS = 1 << 31


@dataclass(frozen=True, slots=True)
class Corpus:
    """Tokens one after the other, document by document."""

    words: Ints
    """(tokens,): the number of each token's word."""
    starts: Ints
    """(documents + 1,): where each document's tokens begin."""
    vocabulary: int

    @property
    def documents(self) -> int:
        """How many there are."""
        return len(self.starts) - 1

    @property
    def lengths(self) -> Ints:
        """(documents,): tokens of each."""
        return np.diff(self.starts)


def documents(source: str, seed: int = 0) -> Corpus:
    """Return a corpus.

    `synthetic:DOCS,WORDS,TOPICS,LENGTH`: made by the model. Otherwise a path: a folder of text
    files, in subfolders or not (20 Newsgroups; Reuters), or a bag of words as UCI's `docword.*.txt`
    (three lines of documents, words and entries, then `document word count`), also as .gz.
    """
    if source.startswith("synthetic:"):
        return _synthetic(source, seed)
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _bag(path)
    raise ConfigurationError(
        f"no documents at {source!r}: synthetic:DOCS,WORDS,TOPICS,LENGTH, a folder of text files, "
        "or a bag of words (docword.*.txt)"
    )


def _synthetic(source: str, seed: int) -> Corpus:
    count, vocabulary, topics, length = sizes(source, "DOCS,WORDS,TOPICS,LENGTH")
    if count * length > MAX_TOKENS or topics * vocabulary > MAX_TOKENS:
        raise ConfigurationError(f"{source!r}: at most 2^31 tokens, and words of all topics")
    rng = np.random.default_rng(seed)
    of_topic = rng.dirichlet(np.full(vocabulary, 0.05), topics).cumsum(axis=1)
    of_document = rng.dirichlet(np.full(topics, 0.2), count).cumsum(axis=1)
    lengths = np.maximum(1, rng.poisson(length, count))
    words = []
    for d in range(count):
        z = np.searchsorted(of_document[d], rng.random(lengths[d]) * of_document[d, -1])
        draw = rng.random(lengths[d]) * of_topic[z, -1]
        words += [int(np.searchsorted(of_topic[k], x)) for k, x in zip(z, draw, strict=True)]
    return Corpus(np.array(words), np.concatenate([[0], np.cumsum(lengths)]), vocabulary)


def _folder(path: Path) -> Corpus:
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    texts = []
    for file in files:
        with opened(file) as text:
            texts.append(WORD.findall(text.read().lower()))
    spread = Counter(word for text in texts for word in set(text))
    limit = max(RARE, FREQUENT * len(texts))
    kept = sorted(word for word, n in spread.items() if RARE <= n <= limit)
    number = {word: i for i, word in enumerate(kept)}
    tokens = [[number[word] for word in text if word in number] for text in texts]
    tokens = [text for text in tokens if text]
    if not tokens:
        raise ConfigurationError(
            f"{path}: no word is in at least {RARE} of its {len(files)} files and in no more than "
            "half of them: is it a folder of text files?"
        )
    starts = np.concatenate([[0], np.cumsum([len(text) for text in tokens])])
    return Corpus(np.concatenate([np.array(t, np.int64) for t in tokens]), starts, len(kept))


def _bag(path: Path) -> Corpus:
    with opened(path) as file:
        head = [file.readline() for _ in range(3)]
    try:
        count, vocabulary, entries = (int(line) for line in head)
    except ValueError as error:
        raise ConfigurationError(
            f"{path} is no bag of words: its first three lines are the numbers of documents, "
            "words and entries"
        ) from error
    table = read_table(path, None, 3, skip=3)
    d, w, n = (table[:, c].astype(np.int64) for c in range(3))
    whole = (
        len(table) == entries
        and (table == np.floor(table)).all()
        and d.min() >= 1 and d.max() <= count and w.min() >= 1 and w.max() <= vocabulary
        and n.min() >= 1 and n.sum() <= MAX_TOKENS
    )  # fmt: skip
    if not whole:
        raise ConfigurationError(
            f"{path} does not keep to its head: {entries} lines of a document up to {count}, a "
            f"word up to {vocabulary} and how often it is there"
        )
    order = np.argsort(d, kind="stable")
    lengths = np.bincount(d - 1, weights=n, minlength=count).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths[lengths > 0])])
    return Corpus(np.repeat(w[order] - 1, n[order]), starts, vocabulary)
