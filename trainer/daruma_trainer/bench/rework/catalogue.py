"""The programs that can be measured, by name."""

from collections.abc import Callable, Mapping

from daruma_trainer.bench.rework.convolution import Convolution
from daruma_trainer.bench.rework.factors import Factors
from daruma_trainer.bench.rework.problems import Problem, mlr, toy
from daruma_trainer.bench.rework.topics import Topics

PROGRAMS: Mapping[str, Callable[[], Problem]] = {
    "toy": toy,
    "mlr": mlr,
    "mf": Factors,
    "cnn": Convolution,
    "lda": Topics,
}
