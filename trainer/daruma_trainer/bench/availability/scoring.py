"""How good copies of the parameters were. Done when the job has ended: it takes nobody's time."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from daruma_trainer.programs.cnn import accuracy
from daruma_trainer.programs.fashion import Tensors, model_of, samples

MOST_SAMPLES = 1000
"""Of the test set, the first ones; FashionMNIST has 10,000."""


class Judge:
    """Scores copies on one split of the data."""

    def __init__(self, source: str, seed: int) -> None:
        torch.set_num_threads(os.cpu_count() or 1)
        train, (x, y) = samples(source, seed)
        self._test: Tensors = (x[:MOST_SAMPLES], y[:MOST_SAMPLES])
        self._model = model_of(int(max(train[1].max(), y.max())) + 1)

    @property
    def parameters(self) -> int:
        """How many the model has."""
        return sum(p.numel() for p in self._model.parameters())

    def scores(self, files: Sequence[Path]) -> list[tuple[float, float]]:
        """Return (accuracy, loss) of each copy."""
        found = []
        for file in files:
            flat = torch.from_numpy(np.fromfile(file, np.float32))
            torch.nn.utils.vector_to_parameters(flat, self._model.parameters())
            score = accuracy(self._model, *self._test)
            found.append((score["test_accuracy"], score["test_loss"]))
        return found
