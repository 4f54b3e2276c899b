"""A program whose gradients are sparse: each batch looks at some rows of an embedding.

    python embedding_program.py STEPS GATE

`GATE`: a file; until it is there nobody goes on after the fifth batch.
"""

import sys
import time
from pathlib import Path

import torch

import daruma_trainer as daruma

WORDS, SIZE, LOOKED_AT = 40, 4, 6
RATE = 0.01


def words_of(worker: int, batch: int) -> torch.Tensor:
    """Which rows a batch is about, some of them twice; those above 32 nobody ever looks at."""
    draw = torch.Generator().manual_seed(1000 * worker + batch)
    return torch.randint(WORDS - 8, (LOOKED_AT,), generator=draw)


class Net(torch.nn.Module):
    """An embedding, and a layer that is pushed whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = torch.nn.Embedding(WORDS, SIZE, sparse=True)
        self.head = torch.nn.Linear(SIZE, 1)

    def loss(self, worker: int, batch: int) -> torch.Tensor:
        words = words_of(worker, batch)
        found: torch.Tensor = self.head(self.words(words)).squeeze(1)
        return (found - words / WORDS).square().mean()


def main(steps: int, gate: Path) -> None:
    """Train."""
    torch.set_num_threads(1)
    net = Net()
    with daruma.join() as job:
        optimizer = job.optimizer(net.named_parameters(), daruma.Adam(lr=RATE))
        while job.batch < steps:
            while job.batch >= 5 and not gate.exists():
                time.sleep(0.01)
            torch.autograd.backward(net.loss(job.index, job.batch + 1))
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
