"""The regression of programs/mlr.py without torch, which takes seconds to import.

    python softmax.py STEPS [DATA [RATE [THINK_MS [RULE]]]]

RULE: `sgd`, `momentum`, `adam`, or `rows`: SGD of those classes alone that a small batch has.
For tests that start many workers. On a cluster it is handed to Python as text (`python -c`).
"""

import sys
import time

import numpy as np

import daruma_trainer as daruma
from daruma_trainer.programs.data import classification

RULES: dict[str, daruma.SGD | daruma.Adam] = {
    "sgd": daruma.SGD(),
    "momentum": daruma.SGD(momentum=0.9),
    "adam": daruma.Adam(),
    "rows": daruma.SGD(),
}


def train(
    steps: str,
    data: str = "digits",
    rate: str = "0.5",
    think_ms: str = "10",
    rule: str = "sgd",
) -> None:
    """Train as one worker; reports the minibatch loss, and at the end the test accuracy."""
    (x, y), (test_x, test_y) = classification(data, 0)
    with daruma.join() as job:
        table = job.table("weight", (int(y.max()) + 1, x.shape[1]), rule=RULES[rule])
        weight = table.pull()

        def score() -> dict[str, float]:
            return {"test_accuracy": float(np.mean((test_x @ table.pull().T).argmax(1) == test_y))}

        job.evaluate(score)
        for inputs, labels in job.batches((x, y), 8 if rule == "rows" else 32, steps=int(steps)):
            scores = np.exp(inputs @ weight.T)
            chances = scores / scores.sum(axis=1, keepdims=True)
            rows = np.arange(len(labels))
            job.report(loss=float(-np.log(chances[rows, labels]).mean()))
            chances[rows, labels] -= 1
            time.sleep(float(think_ms) / 1000)
            gradient = chances.T @ inputs / len(labels)
            if rule == "rows":
                classes = np.unique(labels)
                table.push(classes, gradient[classes], lr=float(rate))
            else:
                table.push(None, gradient, lr=float(rate))
            weight = job.values(table.spec.id)


if __name__ == "__main__":
    train(*sys.argv[1:])
