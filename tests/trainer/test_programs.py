"""The programs' data and mathematics, without servers."""

import gzip
import struct
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from daruma_trainer.errors import ConfigurationError
from daruma_trainer.programs import lda, mf
from daruma_trainer.programs.data import Corpus, classification, documents, images, ratings

# Ratings

TRIPLES = [(7, 30, 4.0), (7, 10, 3.5), (9, 30, 1.0), (2, 20, 5.0)]


def written(path: Path, text: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "head", "between"),
    [
        ("ratings.csv", "userId,movieId,rating,timestamp\n", ","),
        ("u.data", "", "\t"),
        ("ratings.dat", "", "::"),
        ("ratings.csv.gz", "userId,movieId,rating,timestamp\n", ","),
    ],
)
@pytest.mark.parametrize("by_folder", [True, False])
def test_movielens_in_all_its_forms(
    tmp_path: Path, name: str, head: str, between: str, by_folder: bool
) -> None:
    lines = [between.join([str(u), str(i), str(v), "978300760"]) for u, i, v in TRIPLES]
    path = written(tmp_path / name, head + "\n".join(lines) + "\n")
    train, test = ratings(str(tmp_path if by_folder else path))
    assert (train.shape, len(train), len(test)) == ((3, 3), 4, 0)
    found = zip(train.users.tolist(), train.items.tolist(), train.values.tolist(), strict=True)
    assert sorted(found) == [(0, 1, 5.0), (1, 0, 3.5), (1, 2, 4.0), (2, 2, 1.0)]


def test_jester_in_several_files(tmp_path: Path) -> None:
    written(tmp_path / "jester-data-1.csv", "2,-7.82,99,8.79\n1,99,4.08,99\n")
    written(tmp_path / "jester-data-2.csv", "1,99,99,-10\n")
    train, _ = ratings(str(tmp_path))
    assert train.shape == (3, 3)
    np.testing.assert_allclose(train.values, [-7.82, 8.79, 4.08, -10], rtol=1e-6)
    assert train.items.tolist() == [0, 2, 1, 2]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ratings.csv", "userId,movieId,rating\n1,2\n", "ratings.csv"),
        ("ratings.csv", "userId,movieId,rating\n", "has no rows"),
        ("u.data", "a\tb\tc\n", "u.data"),
        ("u.data", "1.5\t2\t3\n", "no numbers of users and items"),
        ("u.data", "1\t2\tnan\n", "not numbers"),
        ("jester-1.csv", "1,2\n1,2,3\n", "jester-1.csv:2: 3 columns"),
        ("jester-1.csv", "1,x\n", "jester-1.csv:1"),
        ("jester-1.csv", "1,55\n", "no Jester file"),
        ("jester-1.csv", "", "no Jester file"),
        ("ratings.csv.gz", "", "has no rows"),
        ("other.txt", "", "has none of ratings.csv"),
    ],
)
def test_bad_ratings_are_refused_in_a_sentence(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    written(tmp_path / name, text)
    with pytest.raises(ConfigurationError, match=message):
        ratings(str(tmp_path))


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "u.data.gz").write_bytes(b"\x1f\x8bnot gzip")
    with pytest.raises(ConfigurationError, match=r"cannot read .*u\.data\.gz"):
        ratings(str(tmp_path))


@pytest.mark.parametrize("source", ["synthetic:3,4", "synthetic:3,4,x,9", "synthetic:3,4,0,9"])
def test_synthetic_ratings_say_how_they_are_written(source: str) -> None:
    with pytest.raises(ConfigurationError, match="USERS,ITEMS,RANK,RATINGS"):
        ratings(source)


# Documents


def test_a_folder_of_texts_keeps_words_that_are_neither_rare_nor_everywhere(tmp_path: Path) -> None:
    for i in range(20):
        folder = tmp_path / ("space" if i % 2 else "cars")
        folder.mkdir(exist_ok=True)
        text = "the orbit the orbit" if i % 2 else "the engine"
        (folder / str(i)).write_text(text + (" once" if i == 3 else "") + " a b")
    corpus = documents(str(tmp_path))
    assert corpus.vocabulary == 2, "the: everywhere; once: too rare; a, b: too short"
    assert sorted(corpus.lengths.tolist()) == [1] * 10 + [2] * 10


@pytest.mark.parametrize("name", ["docword.tiny.txt", "docword.tiny.txt.gz"])
def test_a_bag_of_words_is_read(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, "3\n4\n3\n1 2 2\n3 1 1\n1 4 1\n")
    corpus = documents(str(path))
    assert corpus.vocabulary == 4
    assert corpus.words.tolist() == [1, 1, 3, 0]
    assert corpus.starts.tolist() == [0, 3, 4], "the second document is empty and left out"


@pytest.mark.parametrize(
    "text",
    ["", "3\n4\nmany\n", "3\n4\n2\n1 1 1\n", "3\n4\n1\n4 1 1\n", "3\n4\n1\n1 5 1\n",
     "3\n4\n1\n1 1 0\n", "3\n4\n1\n1 1 x\n", "3\n4\n1\n1 1\n"],
)  # fmt: skip
def test_a_bad_bag_of_words_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"docword\.txt"):
        documents(str(written(tmp_path / "docword.txt", text)))


def test_no_documents(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is it a folder of text files"):
        documents(str(tmp_path))
    with pytest.raises(ConfigurationError, match="DOCS,WORDS,TOPICS,LENGTH"):
        documents(str(tmp_path / "nowhere"))


# Images


def idx(shape: tuple[int, ...]) -> bytes:
    head = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
    return head + bytes(i % 7 for i in range(int(np.prod(shape))))


def mnist(folder: Path) -> None:
    for part, n in (("train", 6), ("t10k", 3)):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx((n, 28, 28)))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx((n,))))


def test_images_of_every_kind(tmp_path: Path) -> None:
    mnist(tmp_path)
    (x, y), (held, _) = images(str(tmp_path))
    assert (x.shape, held.shape, y.tolist()) == ((6, 28, 28), (3, 28, 28), [0, 1, 2, 3, 4, 5])
    (x, _), _ = images("digits", side=16)
    small = classification("digits")[0][0].reshape(-1, 8, 8)
    np.testing.assert_array_equal(x[:, 1::2, ::2], small)
    assert images("synthetic:20,12,3")[0][0].shape == (16, 12, 12)


def test_images_that_are_none(tmp_path: Path) -> None:
    mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03")
    with pytest.raises(ConfigurationError, match="no idx file"):
        images(str(tmp_path))
    with pytest.raises(ConfigurationError, match="no multiple"):
        images("digits", side=20)


# Matrix factorisation


def test_a_solved_row_is_the_regularised_least_squares_solution() -> None:
    rng = np.random.default_rng(0)
    train, _ = ratings("synthetic:12,30,3,150", 1)
    other = rng.normal(size=(30, 3)).astype(np.float32)
    parts = [mf.part_of(train.users, train.items, train.values, w, 2) for w in range(2)]
    assert not set(parts[0].rows.tolist()) & set(parts[1].rows.tolist())
    for part in parts:
        for row, factor in zip(part.rows.tolist(), mf.solve(part, other, 0.1), strict=True):
            mine = train.users == row
            n = int(mine.sum())
            # Least squares of the ratings with √(λ n) times the identity below them.
            left = np.vstack([other[train.items[mine]], np.sqrt(0.1 * n) * np.eye(3)])
            right = np.concatenate([train.values[mine], np.zeros(3)])
            np.testing.assert_allclose(factor, np.linalg.lstsq(left, right)[0], atol=1e-5)


def factors_after(iterations: int) -> tuple[float, float]:
    """Train without servers, as one worker would; returns both errors."""
    train, test = ratings("synthetic:120,80,3,5000")
    users = np.zeros((120, 3), np.float32)
    items = np.random.default_rng(0).normal(size=(80, 3)).astype(np.float32)
    for _ in range(iterations):
        part = mf.part_of(train.users, train.items, train.values, 0, 1)
        users[part.rows] = mf.solve(part, items, 0.02)
        part = mf.part_of(train.items, train.users, train.values, 0, 1)
        items[part.rows] = mf.solve(part, users, 0.02)
    return mf.rmse(train, users, items, 0.0), mf.rmse(test, users, items, 0.0)


def test_als_comes_down_to_the_noise() -> None:
    errors = [factors_after(n)[0] for n in (1, 3, 15)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.12, "the noise is 0.1"
    assert factors_after(15)[1] < 0.15


# Topics


def test_counts_are_those_of_the_topics_after_every_sweep() -> None:
    corpus = documents("synthetic:40,60,4,30")
    model, rng = lda.Model(4, 0.1, 0.05), np.random.default_rng(1)
    z = rng.integers(0, 4, len(corpus.words))
    untouched = z.copy()
    mine = np.arange(0, 40, 2)
    for _ in range(3):
        counts = lda.sweep(corpus, z, mine, model, rng, at_once=7)
        again = lda.count(corpus, z, 4)
        np.testing.assert_array_equal(counts.word_topic, again.word_topic)
        np.testing.assert_array_equal(counts.totals, again.totals)
    others = np.repeat(np.arange(40) % 2 == 1, corpus.lengths)
    np.testing.assert_array_equal(z[others], untouched[others])
    assert (z[~others] != untouched[~others]).any()


def test_the_likelihood_rises_side_by_side_as_one_by_one() -> None:
    corpus = documents("synthetic:40,60,4,20", 3)
    model = lda.Model(4, 0.1, 0.05)
    ends = []
    for at_once in (1, 40):
        rng = np.random.default_rng(2)
        z = rng.integers(0, 4, len(corpus.words))
        before = lda.log_likelihood(corpus, z, model)
        for _ in range(12):
            lda.sweep(corpus, z, np.arange(40), model, rng, at_once)
        ends.append(lda.log_likelihood(corpus, z, model))
        assert ends[-1] > before + 0.3
    assert ends[0] == pytest.approx(ends[1], abs=0.15)


def posterior(corpus: Corpus, model: lda.Model) -> dict[tuple[int, ...], float]:
    """Return p(z | words) of every assignment, by enumeration of the collapsed joint."""
    from math import lgamma

    def prior(counts: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]", a: float) -> float:
        """Of rows that a symmetric Dirichlet prior stands over, up to a constant."""
        return sum(
            sum(lgamma(n + a) for n in row) - lgamma(sum(row) + a * len(row))
            for row in counts.tolist()
        )

    weights = {}
    for z in product(range(model.topics), repeat=len(corpus.words)):
        array = np.array(z)
        words = lda.count(corpus, array, model.topics).word_topic
        of = lda.mixtures(corpus, array, model.topics)
        weights[z] = np.exp(prior(words.T, model.beta) + prior(of, model.alpha))
    total = sum(weights.values())
    return {z: float(w / total) for z, w in weights.items()}


def test_the_sampler_stays_in_the_posterior_of_a_toy_model() -> None:
    corpus = Corpus(np.array([0, 1, 1, 0]), np.array([0, 3, 4]), 2)
    model, rng = lda.Model(2, 0.6, 0.4), np.random.default_rng(4)
    expected = posterior(corpus, model)
    z = np.zeros(4, np.int64)
    seen = dict.fromkeys(expected, 0)
    sweeps = 4000
    for _ in range(sweeps):
        lda.sweep(corpus, z, np.arange(2), model, rng, at_once=1)
        seen[tuple(z.tolist())] += 1
        # Topics have no names: an assignment is as good as its mirror image.
        seen[tuple((1 - z).tolist())] += 1
    apart = sum(abs(seen[key] / (2 * sweeps) - p) for key, p in expected.items()) / 2
    assert apart < 0.03, "total variation; 0.056 where a token counts in its own draw"


def test_topics_survive_their_table() -> None:
    corpus = documents("synthetic:9,50,3,50")
    pieces = lda.Pieces(corpus)
    z = np.random.default_rng(0).integers(0, 3, len(corpus.words))
    np.testing.assert_array_equal(pieces.unpack(pieces.pack(z)), z)
    rows = [set(pieces.rows(np.arange(w, 9, 2)).tolist()) for w in range(2)]
    assert not rows[0] & rows[1]
    assert rows[0] | rows[1] == set(range(pieces.shape[0]))
    assert pieces.rows(np.empty(0, np.int64)).tolist() == []


# The network


@pytest.mark.parametrize(("side", "classes", "expected"), [(16, 10, 9_802), (28, 10, 26_698)])
def test_the_network_has_the_parameters_of_its_layers(
    side: int, classes: int, expected: int
) -> None:
    import torch  # takes seconds: only the process that runs this pays for it

    from daruma_trainer.programs import cnn

    model = cnn.network(side, classes)
    flat = 16 * (side // 4) ** 2
    layers = (9 + 1) * 8 + (8 * 9 + 1) * 16 + (flat + 1) * 32 + (32 + 1) * classes
    assert sum(p.numel() for p in model.parameters()) == layers == expected
    x = torch.zeros(3, 1, side, side)
    assert model(x).shape == (3, classes)
    assert cnn.accuracy(model, x, torch.zeros(3, dtype=torch.int64))["test_loss"] > 0


def test_the_second_papers_network_has_its_parameters_and_is_scored_without_dropout() -> None:
    import torch

    from daruma_trainer.programs import cnn, fashion

    model = fashion.model_of()
    assert sum(p.numel() for p in model.parameters()) == 813_258
    train, (x, y) = fashion.samples("digits")
    assert x.shape[1:] == train[0].shape[1:] == (1, 28, 28)
    assert x[:, :, :2].abs().max() == x[:, :, :, -2:].abs().max() == 0, "a frame"
    assert x.max() == 1
    assert model.training
    torch.manual_seed(0)
    assert cnn.accuracy(model, x, y) == cnn.accuracy(model, x, y)
    assert model.training, "and goes on with it"
    with pytest.raises(ConfigurationError, match="no images of 28 × 28"):
        fashion.samples("synthetic:20,16,2")
    assert fashion.samples("synthetic:20,28,2")[0][0].shape == (16, 1, 28, 28)
