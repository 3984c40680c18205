"""The FLOP accountant against published totals, and against torch's own counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparsekern import Static, densify_, sparsify_
from sparsekern.gpt import flops
from sparsekern.gpt.model import GPT, GPTConfig
from sparsekern.sparsity.masks import Masks
from sparsekern.testing import random_mask

VOCABULARY, CONTEXT = 50257, 2048

# Cerebras-GPT (arXiv 2304.03208): layers, width, heads, tokens, published training FLOPs.
CEREBRAS_GPT = {
    "111M": (10, 768, 12, 2.22e9, 2.5e18),
    "256M": (14, 1088, 17, 5.12e9, 1.1e19),
    "590M": (18, 1536, 12, 1.18e10, 5.3e19),
    "1.3B": (24, 2048, 16, 2.63e10, 2.5e20),
    "2.7B": (32, 2560, 32, 5.30e10, 9.8e20),
    "6.7B": (32, 4096, 32, 1.33e11, 5.9e21),
    "13B": (40, 5120, 40, 2.57e11, 2.1e22),
}


@pytest.mark.parametrize("name", CEREBRAS_GPT)
def test_the_seven_dense_models_within_five_percent(name):
    layers, width, heads, tokens, published = CEREBRAS_GPT[name]
    macs = flops.multiply_adds(GPTConfig(layers, heads, width, CONTEXT, VOCABULARY))
    # They count the embedding look-up too, as a product with the whole table.
    total = 6 * (macs.total + macs.head) * tokens
    assert total == pytest.approx(published, rel=0.05)


XL = GPTConfig(24, 16, 2048, CONTEXT, VOCABULARY)


def test_gpt3_xl_at_its_published_ratios():
    """Sparse pre-training: 2.5x at 75 %. Iterative pruning: 3x at 83.8 %."""
    assert flops.flop_ratio(XL, 0.75) == pytest.approx(2.5, rel=0.01)
    assert flops.flop_ratio(XL, 0.838) == pytest.approx(3.0, rel=0.02)


def test_the_variable_recipe_of_6_7b():
    """62523 steps at 90 %, then 9379 dense ones, against 62523 dense ones: 64 % fewer published,
    65.7 % by this convention."""
    config = GPTConfig(32, 32, 4096, CONTEXT, VOCABULARY)
    spent = 62523 / flops.flop_ratio(config, 0.9) + 9379
    assert 1 - spent / 62523 == pytest.approx(0.64, abs=0.03)
    assert 1 - spent / 62523 == pytest.approx(0.657, abs=1e-3)


def test_rigl_adds_one_weight_gradient_of_what_is_absent():
    config = GPTConfig(2, 2, 32, 16, 256)
    linear = flops.multiply_adds(config).linear
    assert flops.dense_gradient_flops_per_token(config, 0.75) == 2 * linear * 0.75
    # With every weight absent, static training lacks exactly this and the two other products.
    saved = flops.train_flops_per_token(config) - flops.train_flops_per_token(config, 1.0)
    assert saved == 3 * flops.dense_gradient_flops_per_token(config, 1.0)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.75, 1.0])
def test_torch_counts_the_same(sparsity):
    """Forward and training step of a real model, op by op, attention as plain products."""
    config = GPTConfig(2, 2, 32, 16, 256)
    model = GPT(config)
    if sparsity:
        sparsify_(model, Masks(lambda name, weight: random_mask(*weight.shape, sparsity)))
    x = torch.randint(256, (4, 16))
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            model(x)
        with FlopCounterMode(display=False) as step:
            model(x, x)[1].backward()
    per_token = flops.train_flops_per_token(config, sparsity)
    assert forward.get_total_flops() == x.numel() * per_token / 3
    assert step.get_total_flops() == x.numel() * per_token


def test_the_sparsity_of_a_model_is_that_of_its_blocks():
    model = GPT(GPTConfig(2, 2, 32, 16, 256))
    assert flops.linear_sparsity(model) == 0
    sparsify_(model, Static(0.5), lambda module, name: "mlp" in name)
    assert flops.linear_sparsity(model) == pytest.approx(0.5 * 8 / 12)
    assert flops.linear_sparsity(densify_(model)) == 0
