"""The network of Cao et al. (arXiv 2406.05546) by plain SGD: 813,258 parameters, 28 × 28 images.

    python -m daruma_trainer.programs.fashion --data folder/of/FashionMNIST --steps 400

`--steps` counts each worker's batches. Without FashionMNIST's idx files: `digits`, scikit-learn's
8 × 8 images enlarged three times, in a frame of two. Reports the minibatch loss while it goes, and
at the end `test_accuracy` and `test_loss`.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import cross_entropy

import daruma_trainer as daruma
from daruma_trainer.errors import ConfigurationError
from daruma_trainer.programs.cnn import accuracy, network
from daruma_trainer.programs.common import parser_of, read_or_exit
from daruma_trainer.programs.data import images

SIDE = 28
Tensors = tuple[torch.Tensor, torch.Tensor]
"""Images (n, 1, 28, 28) and labels (n,)."""


def model_of(classes: int = 10) -> torch.nn.Sequential:
    """Layers of 16, 32, 512 and `classes`, with dropout before the last."""
    return network(SIDE, classes, channels=16, hidden=512, dropout=0.5)


def samples(source: str, seed: int = 0) -> tuple[Tensors, Tensors]:
    """Return training and test samples. ConfigurationError: these are no images of 28 × 28."""
    parts = []
    for x, y in images(source, side=24, seed=seed):
        framed = np.pad(x, ((0, 0), (2, 2), (2, 2))) if source == "digits" else x
        if framed.shape[1] != SIDE:
            raise ConfigurationError(f"{source!r} has no images of {SIDE} × {SIDE}")
        parts.append((torch.from_numpy(framed).unsqueeze(1), torch.from_numpy(y)))
    return parts[0], parts[1]


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__, "digits", "digits, synthetic:N,28,K or a folder of idx files")
    parser.add_argument("--steps", type=int, default=400, help="batches of each worker")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.01)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as one worker of a job."""
    options = options_of(arguments)
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    train, test = read_or_exit("fashion", lambda: samples(options.data, options.seed))
    model = model_of(int(max(train[1].max(), test[1].max())) + 1)
    with daruma.join() as job:
        optimizer = job.optimizer(model.named_parameters(), daruma.SGD(lr=options.lr))
        job.evaluate(lambda: accuracy(model, *test))
        for inputs, labels in job.batches(
            train, options.batch_size, steps=options.steps, seed=options.seed
        ):
            loss = cross_entropy(model(inputs), labels)
            loss.backward()
            time.sleep(options.think_ms / 1000)
            optimizer.step()
            optimizer.zero_grad()
            job.report(loss=loss.item())
    return 0


if __name__ == "__main__":
    sys.exit(main())
