"""Data of the programs: bundled, synthetic, or files that the user names."""

from daruma_trainer.programs.data.documents import Corpus, documents
from daruma_trainer.programs.data.ratings import Ratings, ratings
from daruma_trainer.programs.data.samples import Samples, classification, images

__all__ = ["Corpus", "Ratings", "Samples", "classification", "documents", "images", "ratings"]
