"""The pass of few launches: interpreted on a CPU, compiled for a GPU, and on one."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from sparsekern.gpt import fused
from sparsekern.gpt.generate import Decoder, pass_of
from sparsekern.gpt.llama import LlamaConfig, make
from sparsekern.gpt.model import Cache, GPTConfig
from sparsekern.gpt.presets import random_gpt
from sparsekern.kernels.cuda import e4m3

installed = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
CONFIGS = {
    "GPT": GPTConfig(2, 4, 256, 512, 256),
    "LLaMA": LlamaConfig(2, 8, 512, 512, 256, n_inner=648, n_kv_head=2),
}
WIDE_HEADS = LlamaConfig(2, 2, 512, 512, 256, n_inner=648, n_kv_head=1)


@installed
@pytest.mark.slow
def test_interpreted():
    file = Path(__file__).with_name("fused_interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)


NUMBERS = {"rows", "T", "S", "H", "G", "first", "parts", "C", "width", "size"}
KINDS = {"position": "*i64", "sums": "*fp32", "weights": "*fp32", "eps": "fp32", "scale": "fp32"}
KINDS["factor"] = "fp32"
KERNELS = {
    "add_norm": {
        **{"HAS_ADDED": True, "HAS_BIAS": True, "HAS_MEAN": True},
        **{"IN_E4M3": False, "BLOCK": 4096},
    },
    "activate": {"GATED": True, "IN_E4M3": True, "BLOCK": fused.ELEMENTS},
    "remember": {"TURNS": True, "ROWS": fused.ROWS, "D": 128},
    "attend": {
        **{"R": 8, "TURNS": True, "IS_WHOLE": False},
        **{"BLOCK_R": 16, "BLOCK_S": fused.SHARED_TILE, "D": 128},
    },
    "combine": {"R": 8, "PARTS": fused.MOST_PARTS, "D": 128},
}


@installed
@pytest.mark.parametrize("name", KERNELS)
def test_compiles(name):
    """Ahead of time, for Hopper: it waits for the kernel before, and lets the next one start."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(fused._kernels(), f"{name}_kernel")
    constants = KERNELS[name] | {"EARLY": True}
    kinds = KINDS | ({"y": "*fp8e4nv"} if constants.get("IN_E4M3") else {})
    types = {
        n: "constexpr" if n in constants else "i32" if n in NUMBERS else kinds.get(n, "*bf16")
        for n in kernel.arg_names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if t[0] == "*"}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"launch_pdl": True})
    assert compiled.metadata.shared <= 100 * 1024
    assert compiled.asm["ptx"].count("griddepcontrol") == 2


@pytest.mark.parametrize(
    "groups, length, parts", [(1, 192, 1), (8, 2112, 33), (128, 2112, 3), (512, 2112, 1)]
)
def test_parts_fill_the_gpu(groups, length, parts):
    assert fused.parts_of(groups, length, 396) == parts


def test_what_does_not_fit_takes_its_own_way():
    model = make(CONFIGS["GPT"]).eval()
    assert not fused.fits(model)  # on a CPU
    idx, cache = torch.zeros(1, 3, dtype=torch.int64), Cache(model, 1, 64)
    with torch.no_grad():
        got = pass_of(model)(idx, cache, None)
        torch.testing.assert_close(got, model(idx)[0][:, -1:])


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_with_hooks_or_other_parts_are_left_alone(name):
    block = make(CONFIGS[name]).blocks[0]
    assert fused._is_known(block)
    hook = block.mlp.register_forward_hook(lambda *_: None)
    assert not fused._is_known(block)
    hook.remove()
    assert fused._is_known(block) and not fused._is_known(block.mlp)
    block.mlp = torch.nn.Sequential(block.mlp)
    assert not fused._is_known(block)


@pytest.mark.parametrize("name", CONFIGS)
def test_norms_and_forwards_that_are_others_are_left_alone(name):
    def changed(change) -> bool:
        block = make(CONFIGS[name]).blocks[0]
        change(block)
        return fused._is_known(block)

    width = CONFIGS[name].n_embd
    for norm in (
        torch.nn.Identity(),
        torch.nn.RMSNorm(width),  # of an eps that torch chooses
        torch.nn.LayerNorm(width, elementwise_affine=False),
    ):
        assert not changed(lambda block, norm=norm: setattr(block, "norm2", norm))
    assert not changed(lambda block: setattr(block.attention, "forward", lambda *_: None))
    assert changed(lambda block: setattr(block, "norm2", type(block.norm1)(width, eps=1e-6)))


def test_kernels_get_no_cache_that_is_too_small():
    """They check nothing: they would write past its end."""
    model = make(CONFIGS["LLaMA"]).eval()
    run, idx = fused.Fused(model, starts_early=False), torch.zeros(2, 70, dtype=torch.int64)
    for cache in (Cache(model, 2, 64), Cache(model, 1, 128), Cache(make(CONFIGS["GPT"]), 2, 128)):
        with pytest.raises(ValueError, match="cache: expected at least .* positions"):
            run(idx, cache)
    with pytest.raises(
        ValueError, match="cache: .* torch.float32 on cpu, got .* torch.float16 on cpu"
    ):
        run(idx, Cache(make(CONFIGS["LLaMA"]).half(), 2, 128))
    for tokens, position in ((513, None), (2, torch.tensor([0]))):
        with pytest.raises(ValueError, match=f"idx has {tokens} positions, expected 512 or fewer"):
            run(torch.zeros(2, tokens, dtype=torch.int64), Cache(model, 2, 1024), position)


def test_a_machine_where_triton_does_not_run():
    fused._runs.cache_clear()
    with pytest.warns(UserWarning, match="slower, since Triton does not run"):
        assert not fused._runs(torch.device("cpu"))


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype, batch, length",
    [
        *((torch.bfloat16, *sizes) for sizes in ((1, 5), (3, 100), (16, 300))),
        (torch.float16, 3, 300),
        (torch.float32, 2, 300),
    ],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_on_a_gpu(name, batch, length, dtype):
    check_logits(CONFIGS[name], batch, length, dtype)


@pytest.mark.gpu
def test_a_row_of_a_head_that_two_warps_turn():
    """Neither reads what the other has turned already."""
    for _ in range(5):
        check_logits(WIDE_HEADS, 16, 300, torch.float32)


def check_logits(config, batch, length, dtype):
    """Errors are those of the model's own pass, or less."""
    model = random_gpt(config, 0.0, "cuda", dtype)
    assert fused.fits(model)
    idx = torch.randint(256, (batch, length + 3), device="cuda")
    exact, errors = make(config).cuda().double(), []
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        want = exact.eval()(idx)[0][:, length - 1 :]
    for fuses in (True, False):
        run, cache = pass_of(model, fuses), Cache(model, batch, 512)
        with torch.no_grad():
            got = [run(idx[:, :length], cache, None)]
            for place in range(length, length + 3):
                at = torch.tensor([place], device="cuda")
                got.append(run(idx[:, place : place + 1], cache, at))
        errors.append(((torch.cat(got, 1) - want).norm() / want.norm()).item())
    assert errors[0] <= 1.5 * errors[1] + 1e-6


@pytest.mark.gpu
def test_every_replay_gives_the_same():
    """Kernels that start early read nothing before it is there."""
    config = replace(CONFIGS["LLaMA"], n_layer=8)
    model = random_gpt(config, 0.75, "cuda", torch.bfloat16)
    prompt = torch.randint(256, (2, 300), device="cuda")
    runs = []
    for _ in range(2):
        decoder = Decoder(model, prompt, 40, temperature=0, captures_prompt=True)
        for _ in range(5):
            decoder.start()
            for _ in range(39):
                decoder.step()
            runs.append(decoder.tokens.clone())
    assert all(torch.equal(run, runs[0]) for run in runs)


class Reads8Bits(torch.nn.Module):
    """A linear that takes x times 2^3 in E4M3, and keeps its bytes."""

    _x_exponent = 3

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def _multiply_e4m3(self, x8):
        self.bytes = x8.view(torch.uint8).clone()
        return self.linear(x8.float() / 8)


@pytest.mark.gpu
@pytest.mark.parametrize("part", ["up", "down"])
@pytest.mark.parametrize("name", CONFIGS)
def test_products_in_8_bits_get_their_input_in_them(name, part):
    """Rounded as by torch, and NaN where it is too large. (The interpreter rounds otherwise.)"""
    model = random_gpt(CONFIGS[name], 0.0, "cuda", torch.float32)
    model.blocks[0].norm2.weight[3] = 1000.0
    mlp, idx, inputs = model.blocks[0].mlp, torch.randint(256, (2, 9), device="cuda"), []
    linear = getattr(mlp, part)
    hook = linear.register_forward_pre_hook(lambda _, x: inputs.append(x[0].clone()))
    fused.Fused(model)(idx, Cache(model, 2, 64))
    hook.remove()
    reader = Reads8Bits(linear)
    setattr(mlp, part, reader)
    fused.Fused(model)(idx, Cache(model, 2, 64))
    wanted, _ = e4m3.traced(inputs[0], 3)
    assert torch.equal(reader.bytes, wanted.view(torch.uint8))
    assert part == "down" or wanted[:, 3].float().isnan().any()
