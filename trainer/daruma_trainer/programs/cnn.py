"""A small convolutional network with Adam, as in SCAR's evaluation.

    python -m daruma_trainer.programs.cnn --data digits --steps 200

Every layer's weight and bias is a table, so that blocks never mix layers; `spec.blockBytes` says
how finely a layer is cut. Reports the minibatch loss, and at the end `test_accuracy`, `test_loss`.
"""

import sys
import time

import torch
from torch.nn.functional import cross_entropy

import daruma_trainer as daruma
from daruma_trainer.programs.common import parser_of, read_or_exit
from daruma_trainer.programs.data import images


def network(
    side: int, classes: int, channels: int = 8, hidden: int = 32, dropout: float = 0.0
) -> torch.nn.Sequential:
    """Two convolutions with pooling, two full layers; for images (1, side, side), side ≥ 4.

    `dropout`: the share of hidden units that each training batch goes without.
    """
    flat = 2 * channels * (side // 4) ** 2
    dropped = [torch.nn.Dropout(dropout)] if dropout else []
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, channels, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(channels, 2 * channels, 3, padding=1), torch.nn.ReLU(),
        torch.nn.MaxPool2d(2), torch.nn.Flatten(),
        torch.nn.Linear(flat, hidden), torch.nn.ReLU(), *dropped,
        torch.nn.Linear(hidden, classes),
    )  # fmt: skip


def accuracy(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """Score a model on samples, a thousand at a time, without dropout."""
    training = model.training
    model.eval()
    with torch.no_grad():
        parts = [model(part) for part in x.split(1000)]
        logits = torch.cat(parts)
        hits = (logits.argmax(1) == y).float().mean()
    model.train(training)
    return {"test_accuracy": hits.item(), "test_loss": cross_entropy(logits, y).item()}


def main() -> int:
    """Train as one worker of a job."""
    parser = parser_of(__doc__, "digits", "digits, synthetic:N,SIDE,K or a folder of MNIST's files")
    parser.add_argument("--steps", type=int, default=200, help="batches of each worker")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=32)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    train, test = read_or_exit("cnn", lambda: images(options.data, seed=options.seed))
    x, y = torch.from_numpy(train[0]).unsqueeze(1), torch.from_numpy(train[1])
    held = torch.from_numpy(test[0]).unsqueeze(1), torch.from_numpy(test[1])
    classes = int(max(train[1].max(), test[1].max())) + 1
    model = network(x.shape[2], classes, options.channels, options.hidden)
    with daruma.join() as job:
        optimizer = job.optimizer(model.named_parameters(), daruma.Adam(lr=options.lr))
        job.evaluate(lambda: accuracy(model, *held))
        for inputs, labels in job.batches(
            (x, y), options.batch_size, steps=options.steps, seed=options.seed
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
