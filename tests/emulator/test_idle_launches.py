"""What a step, or a decoded token, on a GPU asks of the host.

Of a step's kernels launches that do nothing are left.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sae_kernels as sk
from emulator import library, triton_driver
from sae_kernels.interventions import add, scale
from sae_kernels.nn import TopKSAE
from sae_kernels.step import FusedStep
from tests.interventions import dense_edits
from tests.settings import settings
from tests.step.host_work import host_work

if TYPE_CHECKING:
    from collections.abc import Iterator

B, D, F, K = 128, 64, 4096, 32


@pytest.fixture(params=["sm_80", "sm_90"])
def _idle(request: pytest.FixtureRequest) -> Iterator[None]:
    with triton_driver.emulated(triton_driver.ARCHITECTURES[request.param], idle=True):
        yield


def started(**options: Any) -> FusedStep:
    """A step as on a GPU, where the host does not ask how many latents are dead."""
    sae = TopKSAE(D, F, k=K, backend="triton")
    config = settings(sae, **({"compute": "bfloat16", "auxk_alpha": 0.0} | options))
    step = FusedStep(sae, config.objective, config.optimizer)
    step.dead.padded = True
    return step


@pytest.mark.full
@pytest.mark.usefixtures("_idle")
def test_the_launches_and_the_python_of_a_step() -> None:
    # Before calls went past the dispatcher 775 functions and 99 operators.
    step, x, lr = started(), torch.randn(B, D), torch.tensor(1e-3)
    for _ in range(3):
        step(x, lr=lr)
    before = library.library().emulator_launches()
    step(x, lr=lr)
    # On sm_90 the select has 10; on sm_80, whose tiles are narrower, two more.
    assert library.library().emulator_launches() - before <= 27
    work = host_work(lambda: step(x, lr=lr))
    assert work.functions <= 635
    assert work.operators <= 70


class _Strict(TorchDispatchMode):
    """Refuses whatever waits for the device, inside the primitives' implementations too."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the host waits for a number")
        if torch.Tag.dynamic_output_shape in func.tags and not _by_numbers(func, args):
            raise RuntimeError(f"the host waits for the size that {func} finds")
        if func.namespace == "sae_kernels":
            name = func._schema.name.partition("::")[2]
            operator = getattr(import_module(f"sae_kernels.primitives.{name}"), name)
            with self:  # a mode is off in what it calls
                *arguments, backend = operator._arguments([*args, *(kwargs or {}).values()])
                return operator._run(arguments, backend)
        return func(*args, **(kwargs or {}))


def _by_numbers(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether it takes elements by their numbers, whose count is known, and not by a mask."""
    if func is not torch.ops.aten.index.Tensor:
        return False
    return all(index is None or index.dtype in (torch.int32, torch.int64) for index in args[1])


@pytest.mark.full
@pytest.mark.usefixtures("_idle")
@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.1}, {"auxk_alpha": 0.5}], ids=str)
def test_no_launch_waits_for_the_device(options: dict[str, Any]) -> None:
    step, x, lr = started(**options), torch.randn(B, D), torch.tensor(1e-3)
    step(x, lr=lr)
    with _Strict():
        step(x, lr=lr)


@pytest.mark.parametrize("waits", [lambda x: x.sum().item(), lambda x: x.nonzero()])
def test_waiting_is_noticed(waits: Any) -> None:
    with pytest.raises(RuntimeError, match="the host waits"), _Strict():
        waits(torch.ones(3))


@pytest.mark.full
def test_a_decoded_token_is_read_and_edited_without_waiting() -> None:
    pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")
    if library.unavailable() is not None:
        pytest.skip(str(library.unavailable()))
    model = dense_edits.causal_model(pad_token_id=None).float()  # for a pad token it asks its input
    sae = TopKSAE(dense_edits.D, dense_edits.F, k=5, backend="triton").for_inference(torch.float32)
    tokens = torch.tensor([[3], [4]])

    def launches() -> int:
        before = library.library().emulator_launches()
        with torch.no_grad(), _Strict():
            model(tokens)
        return int(library.library().emulator_launches()) - before

    with triton_driver.emulated(90):
        with sk.watch(model, {"h.1": sae}) as watched:
            assert launches() == 2
            assert watched.codes["h.1"].values.shape == (2, 1, 5)
        edits = [scale(3, 2.0), add(4, 1.0)]
        with sk.intervene(model, {"h.1": sae}, {"h.1": edits}):
            assert launches() == 3  # what changes is decoded
