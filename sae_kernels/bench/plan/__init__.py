"""The planner: predicts time and memory of a run on one or many devices by a roofline model.

    problem = Problem(d_in=16384, n_latents=2**24, k=128, batch=131072)
    h200 = device("h200")
    for prediction in predict(problem, 512, h200, calibrated(h200)):
        print(prediction.layout.name, prediction.seconds.total, prediction.bound)

Formulas, sources and what is not known: docs/planning.md.
"""

from .calibration import Calibration, calibrated
from .devices import NAMES, Device, device
from .layouts import Layout, Problem, layouts
from .prediction import Prediction, default_batch, fastest, predict, unless_told

__all__ = [
    "NAMES",
    "Calibration",
    "Device",
    "Layout",
    "Prediction",
    "Problem",
    "calibrated",
    "default_batch",
    "device",
    "fastest",
    "layouts",
    "predict",
    "unless_told",
]
