"""Upkeep of an SAE's weights: start, unit norms, scales, saving, loading and publishing."""

from __future__ import annotations

import dataclasses
import tempfile
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch
from torch import nn

from sae_kernels.config.sae import SAEConfig
from sae_kernels.nn.initialise import geometric_median

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sae_kernels.nn.base import SparseAutoencoder
    from sae_kernels.nn.inference import InferenceSAE
    from sae_kernels.step.ranks import Ranks

_SAE = TypeVar("_SAE", bound="Upkeep")
_ROWS_AT_ONCE = 4096


class Upkeep(nn.Module):
    """Methods of every SAE that are not its function; safetensors is imported when they need it."""

    config: Any
    latents: range
    metadata: dict[str, Any]
    is_fresh: bool
    compute_dtype: torch.dtype | None
    backend: str | None
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    keeps_dtype: ClassVar[tuple[str, ...]]
    config_class: ClassVar[type[SAEConfig]]

    @property
    def target_scale(self) -> float:
        """The factor on targets: the activations' scale, or a transcoder's own."""
        config = self.config
        return float(config.target_scale if config.transcodes else config.activation_scale)

    @classmethod
    def _configured(
        cls, config: SAEConfig | int, n_latents: int | None, settings: dict[str, Any]
    ) -> SAEConfig:
        """The configuration from the constructor's arguments: a config, or plain arguments."""
        if not isinstance(config, SAEConfig):
            given = {} if n_latents is None else {"n_latents": n_latents}
            return cls.config_class.from_dict({"d_in": config, **given, **settings})
        extra = [*settings, *([] if n_latents is None else ["n_latents"])]
        if extra or not isinstance(config, cls.config_class):
            what = f"{', '.join(extra)} beside it" if extra else f"a {type(config).__name__}"
            raise TypeError(
                f"{cls.__name__}: expected a {cls.config_class.__name__}, or d_in, n_latents and "
                f"settings by name, got {what}"
            )
        return config

    def extra_repr(self) -> str:
        """The settings that differ from their defaults, as ``print(sae)`` shows them."""
        values = {f: getattr(self.config, f.name) for f in dataclasses.fields(self.config)}
        return ", ".join(f"{f.name}={v}" for f, v in values.items() if v != f.default)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.is_fresh = False

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        kept = {name: getattr(self, name).data for name in self.keeps_dtype}
        result = super()._apply(fn, recurse)
        for name, before in kept.items():
            now = getattr(self, name)
            if now.dtype != before.dtype:
                now.data = before.to(now.device)
        return result

    @torch.no_grad()
    def initialise_b_dec_(
        self, x: torch.Tensor, centre: Callable[[torch.Tensor], torch.Tensor] = geometric_median
    ) -> None:
        """Sets b_dec to the centre (geometric median) of raw targets [N, output width]."""
        self.b_dec.copy_(centre(x) * self.target_scale)

    def start_training_(
        self: Any, x: torch.Tensor, objective: Any, ranks: Ranks | None = None
    ) -> None:
        """Fits the fresh weights on scaled tokens [n, input width], once b_dec is set.

        ``ranks`` are the processes that have the SAE's other latents. By default nothing is fitted.
        """

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Scales each layer's decoder rows to unit norm; zero rows stay zero."""
        rows = self.W_dec.unflatten(1, (self.config.row_parts, -1))
        norms = rows.norm(dim=2, keepdim=True)
        rows.div_(torch.where(norms > 0, norms, 1))

    @torch.no_grad()
    def remove_parallel_gradient_(self) -> None:
        """Projects the decoder's gradient to be orthogonal to its (unit) rows.

        The parallel part only changes their length, which :meth:`normalize_decoder_` undoes. Call
        it after backward and before clipping and the optimizer.

        Raises:
            RuntimeError: the decoder has no gradient yet.
        """
        if self.W_dec.grad is None:
            raise RuntimeError("W_dec.grad: expected a gradient, got None; call backward() first")
        shape = (self.config.row_parts, -1)
        grad, rows = self.W_dec.grad.unflatten(1, shape), self.W_dec.unflatten(1, shape)
        grad.addcmul_((grad * rows).sum(2, keepdim=True), rows, value=-1)

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        """Activations times the activation scale, as the SAE is trained on them."""
        scale: float = self.config.activation_scale
        if scale == 1:
            return x
        # In fp32 at least: a scaled bf16 or fp16 number is rounded, or infinite.
        return x.to(torch.promote_types(x.dtype, torch.float32)) * scale

    def folded(self: _SAE) -> _SAE:
        """A copy with both scales folded into the weights: the same function, scales of 1."""
        return self.rescaled(1.0, 1.0)

    def rescaled(self: _SAE, activation_scale: float, target_scale: float = 1.0) -> _SAE:
        """A copy with other scales in front of the weights; see :meth:`rescale_`."""
        copy = self._copied()
        copy.rescale_(activation_scale, target_scale)
        return copy.train(self.training)

    @torch.no_grad()
    def rescale_(self: Any, activation_scale: float, target_scale: float = 1.0) -> None:
        """Changes the scales and adapts the weights; the function of raw activations stays.

        All architectures commute with a positive scale once vectors in units of pre-activations
        are divided by it. With scales of 1 codes are in units of the raw activations. Decoder rows
        keep their norm unless the target has a scale of its own.
        """
        config = self.config
        after = target_scale if config.transcodes else activation_scale
        scale, change = config.activation_scale / activation_scale, self.target_scale / after
        self.config = dataclasses.replace(
            config, activation_scale=activation_scale, target_scale=target_scale
        )
        self.fold_vectors_(scale, change)
        self.b_dec.div_(change)
        if scale != change:
            self.W_dec.mul_(scale / change)
            if config.skip:
                self.W_skip.mul_(scale / change)

    @torch.no_grad()
    def fold_b_dec_(self: Any) -> None:
        """Folds the subtraction of b_dec before the encoder into its bias: the same function."""
        if not self.config.subtract_b_dec:
            return
        parts = [rows.double() @ self.b_dec.double() for rows in self.W_enc.split(_ROWS_AT_ONCE)]
        self.config = dataclasses.replace(self.config, subtract_b_dec=False)
        self.shift_preacts_(-torch.cat(parts))

    def shift_preacts_(self: Any, shift: torch.Tensor) -> None:
        """Adds a shift [F] to what the product with W_enc gives, in every vector it goes into."""
        self.b_enc.add_(shift)

    def for_inference(
        self, dtype: torch.dtype | None = None, *, rows: torch.dtype | None = None
    ) -> InferenceSAE:
        """A frozen copy for running inside a model; see :class:`InferenceSAE` for the arguments.

        Example:
            >>> import torch
            >>> from sae_kernels.nn import TopKSAE
            >>> sae = TopKSAE(8, 32, k=4)
            >>> small, x = sae.for_inference(torch.int8), torch.randn(1, 8)
            >>> small.encode(x).indices.tolist() == sae.encode(x).indices.tolist()
            True
        """
        from sae_kernels.nn.inference import InferenceSAE

        return InferenceSAE(cast("SparseAutoencoder", self), dtype, rows=rows)

    def _copied(self: _SAE) -> _SAE:
        """A copy that shares no memory with this module."""
        with torch.device("meta"):
            make: Any = type(self)
            options = {"compute_dtype": self.compute_dtype, "backend": self.backend}
            copy: _SAE = make(self.config, **options, latents=self.latents)
        weights = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        copy.load_state_dict(weights, assign=True)
        copy.metadata, copy.is_fresh = dict(self.metadata), self.is_fresh
        return copy

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``config.json``, ``sae.safetensors`` and a model card, ``README.md``.

        The scale of activations is folded into the weights. Files that are there are replaced, but
        not a README.md that somebody else wrote.

        Args:
            folder: made when missing.

        Raises:
            OSError: something could not be written; what was there before is still there.
            ValueError, TypeError: metadata that JSON cannot hold.
        """
        from sae_kernels.nn import pretrained

        pretrained.save(cast("SparseAutoencoder", self).folded(), folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a sparse autoencoder",
    ) -> str:
        """Uploads what :meth:`save_pretrained` writes to a repository on the Hugging Face hub.

        Args:
            repo_id: ``owner/repo``; made when there is none.
            private: whether a new repository is private; None is the account's default.
            token: of an account that may write there; None is the one that is logged in.
            revision: the branch to commit to, made when missing; None is the main one.
            commit_message: of the commit.

        Returns:
            The address of the commit.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: the hub refused it.
        """
        from sae_kernels.nn import pretrained

        sae = cast("SparseAutoencoder", self).folded()
        with tempfile.TemporaryDirectory() as folder:
            pretrained.save(sae, folder, name=repo_id)
            return pretrained.upload(
                folder,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                commit_message=commit_message,
            )

    @classmethod
    def from_pretrained(
        cls: type[_SAE],
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> _SAE:
        """Reads what :meth:`save_pretrained` wrote, from a folder or a Hugging Face repository.

        On the base class it gives whatever architecture was saved; on an architecture's own class
        another one is an error. :func:`sae_kernels.load` reads the files of other tools too.

        Args:
            name_or_path: a folder, or ``owner/repo``.
            revision: branch, tag or commit of a repository.
            local_files_only: read the hub's cache and never ask the network.

        Returns:
            The module in evaluation mode.

        Raises:
            DataError: files missing or damaged, or an unknown architecture.
            TypeError: an SAE of another class.
        """
        from sae_kernels.nn import pretrained

        sae = pretrained.load(name_or_path, revision=revision, local_files_only=local_files_only)
        if not isinstance(sae, cls):
            raise TypeError(
                f"{name_or_path}: expected a {cls.__name__}, got a {type(sae).__name__}; load it "
                "with SparseAutoencoder.from_pretrained"
            )
        sae.eval()
        return sae
