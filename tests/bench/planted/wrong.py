"""Dense steps with one fault each, by the option "fault"."""

from typing import Any

import torch
from contestants.dense import DIFFERS, PACKAGE, Dense

__all__ = ["DIFFERS", "PACKAGE", "contestant"]


class Wrong(Dense):
    def dense(self, codes: torch.Tensor) -> torch.Tensor:
        fault = self.task.options["fault"]
        if fault == "latent":  # keeps one that is not among the largest
            codes = codes.clone()
            dropped = (codes == 0).float().argmax(1, keepdim=True)
            kept = codes.argmax(1, keepdim=True)
            codes.scatter_(1, dropped, codes.gather(1, kept)).scatter_(1, kept, 0.0)
        elif fault == "value":
            codes = codes * 1.001
        return codes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_hat = super().forward(x)
        return x_hat + 0.01 if self.task.options["fault"] == "reconstruction" else x_hat

    def step(self, x: Any) -> Any:
        fault, before = self.task.options["fault"], self.dense_step.W_enc.detach().clone()
        loss = super().step(x)
        if fault == "direction":  # climbs
            self.dense_step.W_enc.data.copy_(2 * before - self.dense_step.W_enc.detach())
        elif fault == "idle":  # does not train at all
            self.dense_step.W_enc.data.copy_(before)
        elif fault == "nan":
            self.dense_step.W_enc.data[0, 0] = torch.nan
        return loss


contestant = Wrong
