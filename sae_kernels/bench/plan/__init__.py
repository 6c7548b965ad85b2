"""What a run would cost on one device or on many, from roofline formulas and stored results.

    problem = Problem(d_in=16384, n_latents=2**24, k=128, batch=131072)
    h200 = device("h200")
    for prediction in predict(problem, 512, h200, calibrated(h200)):
        print(prediction.layout.name, prediction.seconds.total, prediction.bound)

Formulas, sources and what is not known: docs/planning.md.
"""

from .calibration import Calibration, calibrated
from .devices import NAMES, Device, device
from .layouts import Layout, Message, layouts
from .predict import Prediction, default_batch, fastest, predict
from .problem import Problem
from .step import StepTime

__all__ = [
    "NAMES",
    "Calibration",
    "Device",
    "Layout",
    "Message",
    "Prediction",
    "Problem",
    "StepTime",
    "calibrated",
    "default_batch",
    "device",
    "fastest",
    "layouts",
    "predict",
]
