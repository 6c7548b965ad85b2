"""An architecture defined outside the package is one like its own."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

from examples.custom_architecture import RelativeTopKConfig, RelativeTopKSAE, activations
from sae_kernels.data import ShardWriter
from sae_kernels.errors import DataError
from sae_kernels.nn import SAEConfig, SparseAutoencoder, TopKSAE, architecture, preset, register
from sae_kernels.testing import assert_bitwise, assert_steps_agree
from sae_kernels.training import evaluate, train

if TYPE_CHECKING:
    from pathlib import Path


def test_it_keeps_what_is_not_small_beside_the_first() -> None:
    sae = RelativeTopKSAE(8, 40, k=6, share=0.5).double()
    x = torch.randn(200, 8, dtype=torch.float64)
    codes = sae.encode(x)
    h = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    largest = h.topk(6)
    values = torch.where(largest.values >= 0.5 * largest.values[:, :1], largest.values.relu(), 0)
    assert 0 < int((values == 0).sum()) < values.numel() / 2
    expected = torch.zeros_like(h).scatter(1, largest.indices, values)
    torch.testing.assert_close(codes.to_dense(), expected)


@pytest.mark.parametrize("changes", [{}, {"subtract_b_dec": False}, {"unit_norm_decoder": False}])
def test_both_steps_have_its_gradients(changes: dict[str, Any]) -> None:
    assert_steps_agree(RelativeTopKConfig(8, 32, k=4, **changes))


def test_the_check_sees_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """FusedStep learns from other values than autograd does."""

    def halved(self: RelativeTopKSAE, preacts: Any, context: Any) -> Any:
        (main,) = SparseAutoencoder.reconstructions(self, preacts, context)
        factor = 1.0 if context.leaves is None else 0.5
        return [main._replace(weight=factor)]

    monkeypatch.setattr(RelativeTopKSAE, "reconstructions", halved)
    with pytest.raises(AssertionError, match="expected FusedStep within 8 times"):
        assert_steps_agree(RelativeTopKConfig(8, 32, k=4))


@pytest.mark.parametrize("route", ["fused", "autograd"])
def test_it_is_trained_saved_loaded_and_evaluated(route: str, tmp_path: Path) -> None:
    x = activations(2048)
    sae = RelativeTopKSAE(32, 64, k=4)
    before = evaluate(sae, x).fvu
    result = train(sae, x, steps=60, batch_size=256, lr=3e-3, route=route, folder=tmp_path / "run")
    assert evaluate(sae, x).fvu < 0.7 * before
    loaded = SparseAutoencoder.from_pretrained(tmp_path / "run/sae")
    assert isinstance(loaded, RelativeTopKSAE)
    assert_bitwise("W_dec", loaded.W_dec.data, result.sae.folded().W_dec.data)
    assert 1 <= evaluate(loaded, x).l0 < 4


def test_an_entry_point_is_enough_for_the_command_line(tmp_path: Path) -> None:
    """In a process that has never heard of the class."""
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[sae_kernels.architectures]\n"
        "relative_topk = examples.custom_architecture:RelativeTopKSAE\n"
    )
    with ShardWriter(tmp_path / "acts", d_in=32) as writer:
        writer.write(activations(1024))
    train_it = "train acts --arch relative_topk --k 4 --steps 3 --batch-size 256 --out run"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-m", "sae_kernels", *train_it.split(" ")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (
        json.loads((tmp_path / "run/sae/config.json").read_text())["architecture"]
        == "relative_topk"
    )


@dataclasses.dataclass(frozen=True)
class Nameless(SAEConfig):
    """Forgot to say what it is called."""


@dataclasses.dataclass(frozen=True)
class Taken(SAEConfig):
    """Calls itself like another."""

    architecture: ClassVar[str] = "topk"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Nameless, r"Nameless\.architecture: expected a name for files and commands"),
        (
            Taken,
            r"architecture 'topk': expected a name of its own for .*Theirs, it is that of .*TopK",
        ),
    ],
)
def test_a_name_is_needed_and_ones_own(config: type[SAEConfig], message: str) -> None:
    class Theirs(SparseAutoencoder):
        config_class = config

    with pytest.raises(ValueError, match=message):
        register(Theirs)
    assert architecture("topk") is TopKSAE


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"expected one of topk, .*switch.*, got 'moe'"):
        architecture("moe")
    with pytest.raises(
        ValueError, match="expected a preset, got 'jumprelo'; did you mean 'jumprelu'"
    ):
        preset("jumprelo")


def test_a_file_of_an_unknown_architecture_says_how_to_add_it(tmp_path: Path) -> None:
    TopKSAE(4, 8, k=2).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"topk"', '"moe"'))
    with pytest.raises(DataError, match=r"one of topk, .*got 'moe'; .*sae_kernels\.nn\.register"):
        SparseAutoencoder.from_pretrained(tmp_path)


class SquashedSAE(TopKSAE):
    """A decoder that is not a sum of rows."""

    decodes_by_rows = False

    def decode_scaled(self, codes: Any, x: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        """Bounded reconstructions."""
        return 3 * torch.tanh(super().decode_scaled(codes) / 3)


def test_a_decoder_of_another_kind_trains_through_autograd() -> None:
    x = activations(1024)
    sae = SquashedSAE(32, 64, k=4)
    before = evaluate(sae, x).fvu
    with pytest.raises(ValueError, match=r"sum of rows of W_dec, got SquashedSAE; train it with A"):
        train(sae, x, steps=1, batch_size=64)
    train(sae, x, steps=60, batch_size=256, lr=3e-3, route="autograd")
    after = evaluate(sae, x).fvu
    assert after < 0.75 * before
    error = (sae(x).x_hat - x).detach().square().sum()
    assert after == pytest.approx(float(error / (x - x.mean(0)).square().sum()), rel=1e-4)
