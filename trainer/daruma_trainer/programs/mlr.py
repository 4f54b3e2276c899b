"""Multinomial logistic regression by minibatch SGD, as in SCAR's evaluation.

    python -m daruma_trainer.programs.mlr --data digits --steps 400

`--steps` counts each worker's batches. Reports the minibatch loss while it goes, and at the end
`test_accuracy` and `full_loss`, the mean loss over all training samples.
"""

import argparse
import sys
import time

import torch
from torch.nn.functional import cross_entropy

import daruma_trainer as daruma
from daruma_trainer.errors import DarumaError
from daruma_trainer.programs.data import classification


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", default="digits", help="digits, synthetic:N,D,K or a path")
    parser.add_argument("--steps", type=int, default=400, help="batches of each worker")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--momentum", type=float, default=0.0)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--think-ms", type=float, default=0.0, help="extra time a step, to try failures"
    )
    return parser.parse_args(arguments)


def main() -> int:
    """Train as one worker of a job."""
    options = parse(sys.argv[1:])
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    try:
        (x, y), (test_x, test_y) = classification(options.data, options.seed)
    except DarumaError as error:
        sys.exit(f"mlr: {error}")
    train = (torch.from_numpy(x), torch.from_numpy(y))
    test = (torch.from_numpy(test_x), torch.from_numpy(test_y))
    model = torch.nn.Linear(x.shape[1], int(max(y.max(), test_y.max())) + 1)

    def score() -> dict[str, float]:
        with torch.no_grad():
            hits = (model(test[0]).argmax(1) == test[1]).float().mean()
            return {
                "test_accuracy": hits.item(),
                "full_loss": cross_entropy(model(train[0]), train[1]).item(),
            }

    with daruma.join() as job:
        rule = daruma.SGD(
            lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay
        )
        optimizer = job.optimizer(model.named_parameters(), rule)
        job.evaluate(score)
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
