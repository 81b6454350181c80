"""Reading published weights into the reference models, whatever library wrote them.

``files.py`` reads what a source holds, one file per format family (``native``, ``transformers``, ``torchvision``,
``jax``) renames and reshapes it to the official names, ``load.py`` checks all of it against the model and only then
copies.
"""

from fastvit.reference.weights.load import load_weights
from fastvit.reference.weights.report import LoadReport, ResizedTensor, SkippedHead

__all__ = ["LoadReport", "ResizedTensor", "SkippedHead", "load_weights"]
