"""How flat the loss is around a model's weights, in the full weight space of its layers with weight noise.

    report = flatness(model, loss)      # loss: a function without arguments, model and data in its closure
    print(report)

For saved models of transformers and adapters of PEFT also `python -m flatlora_kernels.flatness --help`.

The perturbed weights are never made: the op draws the noise, as in training. The model is in eval mode meanwhile, and
is left as it was: modes, weights, gradients, generators and the noise controller, also after an exception.
"""

from .command import main
from .intruders import intruder_dimensions, intruders
from .measures import SIGMAS as SIGMAS
from .measures import (
    Eigenvalue,
    Flatness,
    Increase,
    OnChips,
    expected_increase,
    flatness,
    line,
    plane,
    top_eigenvalue,
)
from .measures import Loss as Loss
from .plots import plot, plot_plane

__all__ = [
    "Increase",
    "Eigenvalue",
    "Flatness",
    "OnChips",
    "flatness",
    "expected_increase",
    "line",
    "plane",
    "top_eigenvalue",
    "intruders",
    "intruder_dimensions",
    "plot",
    "plot_plane",
    "main",
]
