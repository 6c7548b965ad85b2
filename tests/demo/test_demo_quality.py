"""The demo's bars on real activations, and a plain dense loop beside it (minutes)."""

from __future__ import annotations

import pytest
import torch

from sae_kernels.data import ShardDataset, ShuffledBatches
from sae_kernels.demo import run_demo, sae_config, train_config
from sae_kernels.training import evaluate, prepare

STEPS, SEED = 600, 0


@pytest.mark.slow
def test_the_demo_is_good_and_a_dense_loop_is_hardly_better(tmp_path):
    ours = run_demo(tmp_path / "demo", steps=STEPS, seed=SEED)
    assert ours.fvu < 0.1
    assert ours.dead_fraction <= 0.02
    folders = (tmp_path / "demo" / "activations" / side for side in ("train", "held_out"))
    train, held_out = map(ShardDataset, folders)
    dense = evaluate(_dense_loop(train), held_out)
    assert ours.fvu <= 1.03 * dense.fvu


def _dense_loop(data):
    """The same data, order, weights and schedule in plain fp32 torch, without AuxK."""
    config = train_config(STEPS, SEED)
    sae = prepare(data, sae_config(data.d_in), config)
    k, n_latents = sae.config.k, sae.config.n_latents
    optimizer = torch.optim.Adam(sae.parameters(), betas=(config.beta1, config.beta2), fused=True)
    batches = ShuffledBatches(data, config.batch_size, seed=SEED)
    for step in range(STEPS):
        x = next(batches).float() * sae.config.activation_scale
        kept = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).topk(k)
        codes = x.new_zeros(len(x), n_latents).scatter(1, kept.indices, kept.values.relu())
        x_hat = codes @ sae.W_dec + sae.b_dec
        loss = (x_hat - x).square().sum() / (x - x.mean(0)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        sae.remove_parallel_gradient_()
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate(step, n_latents)
        optimizer.step()
        sae.normalize_decoder_()
    return sae
