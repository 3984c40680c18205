"""A decoder against a loop in float64, and what may happen to its model between its starts."""

import copy
from dataclasses import replace

import pytest
import torch

from sparsekern import densify_, sparsify_
from sparsekern.gpt.fused import Fused
from sparsekern.gpt.generate import Decoder, generate
from sparsekern.gpt.held import Held
from sparsekern.gpt.llama import LlamaConfig, make
from sparsekern.gpt.model import GPT, Cache, GPTConfig
from sparsekern.gpt.presets import UniformMask, for_inference
from sparsekern.nn import PackedLinear, SparseLinear, pack_

CONFIGS = {
    "GPT": GPTConfig(1, 2, 32, 16, 96),
    "LLaMA": LlamaConfig(1, 4, 32, 16, 96, n_inner=48, n_kv_head=2),
}
EPS = {torch.float32: 2e-6, torch.bfloat16: 0.04}


def model_of(name: str) -> GPT:
    torch.manual_seed(0)
    model = make(CONFIGS[name])
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return sparsify_(model.eval(), UniformMask(0.5))


def prompt(batch: int, length: int) -> torch.Tensor:
    return torch.randint(96, (batch, length), generator=torch.Generator().manual_seed(1))


def run(decoder: Decoder) -> torch.Tensor:
    decoder.start()
    while decoder._length < decoder.tokens.shape[1]:
        decoder.step()
    return decoder.tokens.clone()


def logits_of(decoder: Decoder, monkeypatch) -> list[torch.Tensor]:
    """[B, V] of each token that is sampled."""
    found, sample = [], decoder._sample

    def keep(logits: torch.Tensor) -> torch.Tensor:
        found.append(logits)
        return sample(logits)

    monkeypatch.setattr(decoder, "_sample", keep)
    return found


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_are_those_of_a_loop_in_float64(name, dtype, is_packed, monkeypatch):
    model = model_of(name).to(dtype)
    exact = densify_(copy.deepcopy(model)).double()
    if is_packed:
        pack_(model)
    # Of one token, one less than the window, the window, and more.
    for batch, length in ((1, 1), (3, 15), (16, 16), (65, 1), (2, 40)):
        decoder = Decoder(model, prompt(batch, length), 18, temperature=1.0, top_k=1000)
        found = logits_of(decoder, monkeypatch)
        tokens = run(decoder)
        for end, logits in enumerate(found, length):
            want = exact(tokens[:, max(0, end - 16) : end])[0][:, -1]
            assert (logits - want).norm() <= EPS[dtype] * want.norm()
        assert end == length + 17


def test_positions_of_a_float64_llama_are_exact():
    model = make(replace(CONFIGS["LLaMA"], block_size=4096)).double()
    position = torch.tensor([0, 1, 4095])
    cos, sin = model.along(position)
    angles = [4095 * 10000.0 ** (-i / 4) for i in range(4)]
    want = torch.tensor(angles, dtype=torch.float64)
    torch.testing.assert_close(cos[2], want.cos(), rtol=0, atol=1e-11)
    torch.testing.assert_close(sin[2], want.sin(), rtol=0, atol=1e-11)


def test_windows_make_no_logits_but_the_last():
    model, shapes = model_of("GPT"), []
    model.lm_head.register_forward_pre_hook(lambda _, x: shapes.append(x[0].shape))
    generate(model, prompt(2, 20), 5)
    assert shapes == [(2, 1, 32)] * 5


def test_dropout_comes_back_after_a_sample():
    model = GPT(replace(CONFIGS["GPT"], dropout=0.5)).train()
    model.norm.eval()
    modes = [part.training for part in model.modules()]
    first = generate(model, prompt(1, 3), 5, temperature=0)
    assert torch.equal(first, generate(model, prompt(1, 3), 5, temperature=0))
    assert [part.training for part in model.modules()] == modes

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, prompt(1, 3), 5, advance=fail)
    assert [part.training for part in model.modules()] == modes


@pytest.mark.parametrize("temperature", [1e-30, 1e-39, 1e-320])
def test_a_low_temperature_takes_the_most_likely_token(temperature):
    model = model_of("LLaMA")
    want = generate(model, prompt(3, 4), 8, temperature=0)
    assert torch.equal(generate(model, prompt(3, 4), 8, temperature=temperature), want)
    assert generate(model, prompt(3, 4), 8, temperature=float("inf")).max() < 96


@pytest.mark.parametrize("name", CONFIGS)
def test_autocast(name):
    model = densify_(model_of(name))
    with torch.autocast("cpu", torch.bfloat16):
        cast = generate(model, prompt(2, 4), 20, temperature=0)
    assert cast.shape == (2, 24)
    assert torch.equal(cast[:, :4], prompt(2, 4))


def test_decoders_of_one_model_go_their_own_ways():
    model = pack_(model_of("LLaMA"))
    starts = prompt(1, 3), prompt(4, 9)
    decoders = [Decoder(model, start, 12, seed=5) for start in starts]
    for decoder in decoders:
        decoder.start()
    for _ in range(11):
        for decoder in decoders:
            decoder.step()
    for decoder, start in zip(decoders, starts, strict=True):
        assert torch.equal(decoder.tokens, generate(model, start, 12, seed=5))


def scaled(model: GPT) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.5)


CHANGES = {
    "written": scaled,
    "cast": lambda model: model.bfloat16(),
    "packed": pack_,
    "dense": densify_,
    "training": lambda model: model.train(),
    "another head": lambda model: setattr(model, "lm_head", torch.nn.Linear(32, 96)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_decoder_starts_with_the_model_as_it_then_is(change):
    model = model_of("GPT")
    decoder = Decoder(model, prompt(2, 3), 20, temperature=0)
    run(decoder)
    CHANGES[change](model)
    assert torch.equal(run(decoder), generate(model, prompt(2, 3), 20, temperature=0))
    assert torch.equal(run(decoder), decoder.tokens)


def test_a_weight_that_was_nan_leaves_nothing_behind():
    model = model_of("GPT")
    decoder = Decoder(model, prompt(2, 3), 10, temperature=0)
    want, weight = run(decoder), model.wpe.weight.detach().clone()
    with torch.no_grad():
        model.wpe.weight.fill_(torch.nan)
        run(decoder)
        model.wpe.weight.copy_(weight)
    assert torch.equal(run(decoder), want)


def test_what_has_changed():
    model = torch.nn.Sequential(model_of("GPT"))
    held = Held(model)
    assert not held.has_changed()
    model(torch.zeros(1, 3, dtype=torch.int64))
    assert not held.has_changed()
    for change in CHANGES.keys() - {"training"}:
        twin = copy.deepcopy(model)
        held, addresses = Held(twin), [t.data_ptr() for t in twin.parameters()]
        CHANGES[change](twin[0])
        assert held.has_changed(), change
        assert [t.data_ptr() for t in held._memory][: len(addresses)], change
    sparse = next(m for m in model.modules() if isinstance(m, SparseLinear))
    held, at = Held(model), sparse.values.data_ptr()
    model.bfloat16()  # the old memory is not given to others
    assert sparse.values.data_ptr() != at and at in [t.data_ptr() for t in held._memory]


def test_a_cache_that_several_share():
    model, start = model_of("LLaMA"), prompt(2, 3)
    cache = Cache(model, 2, 16)
    decoders = [Decoder(model, start, 30, seed=seed, cache=cache) for seed in (1, 2)]
    for seed, decoder in enumerate(decoders, 1):
        assert torch.equal(run(decoder), generate(model, start, 30, seed=seed))
    for other in (
        Cache(model, 2, 15),
        Cache(model, 1, 64),
        Cache(model_of("GPT"), 2, 64),
        Cache(copy.deepcopy(model).bfloat16(), 2, 64),
    ):
        with pytest.raises(ValueError, match="cache: expected at least .* positions"):
            Decoder(model, start, 30, cache=other)
    model.bfloat16()
    for _ in range(2):
        with pytest.raises(ValueError, match="cache: expected .* torch.bfloat16"):
            decoders[0].start()
        with pytest.raises(ValueError, match="expected start"):
            decoders[0].step()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_says_what_its_cache_has_no_room_for(name):
    model, idx, places = model_of(name), prompt(2, 5), torch.arange(5)
    for cache in (Cache(model, 2, 4), Cache(model, 1, 64)):
        with pytest.raises(ValueError, match="cache: expected at least 5 positions, .* 2 texts"):
            model(idx, cache=cache, position=places)
    with pytest.raises(ValueError, match="position: expected the places of idx"):
        model(idx, cache=Cache(model, 2, 64))


def test_another_prompt_of_the_same_length():
    model = pack_(model_of("LLaMA"))
    decoder = Decoder(model, prompt(2, 7), 20, temperature=0)
    for start in (prompt(2, 7), prompt(2, 7).flip(1)):
        decoder.tokens[:, :7] = start
        assert torch.equal(run(decoder), generate(model, start, 20, temperature=0))


def test_steps_come_after_a_start():
    decoder = Decoder(model_of("GPT"), prompt(1, 3), 4)
    with pytest.raises(ValueError, match="step: expected start"):
        decoder.step()
    run(decoder)
    decoder.start(reads_prompt=False)
    assert decoder.tokens[0, 3] == 0
    with pytest.raises(ValueError, match="idx: expected tokens on meta"):
        decoder._models[0].to("meta")
        decoder.start()


# On a GPU


def gpu_model(dtype: torch.dtype = torch.bfloat16) -> GPT:
    torch.manual_seed(0)
    model = make(LlamaConfig(2, 4, 128, 64, 96, n_inner=344, n_kv_head=2))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    model = sparsify_(model.eval(), UniformMask(0.75))
    return model.requires_grad_(False).to("cuda", dtype)


GPU_CHANGES = CHANGES | {"cast": lambda model: model.half()}
del GPU_CHANGES["another head"]


@pytest.mark.gpu
@pytest.mark.parametrize("captures_prompt", [False, True])
@pytest.mark.parametrize("change", GPU_CHANGES)
def test_graphs_follow_the_model(change, captures_prompt):
    model, start = gpu_model(), prompt(2, 3).cuda()
    settings = {"temperature": 0, "captures_prompt": captures_prompt}
    decoder = Decoder(model, start, 70, **settings)
    run(decoder)
    graph = decoder._graph
    run(decoder)
    assert decoder._graph is graph
    decoder.tokens[:, :3] = start.flip(1)
    assert torch.equal(run(decoder), generate(model, start.flip(1), 70, temperature=0))
    decoder.tokens[:, :3] = start
    GPU_CHANGES[change](model)
    assert torch.equal(run(decoder), generate(model, start, 70, temperature=0))


@pytest.mark.gpu
def test_steps_go_on_with_memory_that_is_theirs():
    model, start = gpu_model(), prompt(2, 3).cuda()
    decoder = Decoder(model, start, 20, temperature=0)
    want = run(decoder)
    decoder.start()
    model.half()
    torch.cuda.synchronize()
    junk = [torch.full((2**18,), torch.nan, device="cuda") for _ in range(200)]
    for _ in range(19):
        decoder.step()
    assert torch.equal(decoder.tokens, want) and junk


@pytest.mark.gpu
def test_autocast_on_a_gpu():
    model, start = densify_(gpu_model(torch.float32)), prompt(2, 3).cuda()
    model.requires_grad_(True)
    with torch.autocast("cuda", torch.bfloat16):
        decoder = Decoder(model, start, 60, temperature=0)
        assert not isinstance(decoder._of_token, Fused)
        want = generate(model, start, 60, temperature=0)
        assert torch.equal(run(decoder), want)
    assert run(decoder).shape == want.shape  # what autocast had kept is gone


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_that_nothing_packs(dtype):
    """Dense ones, and sparse ones in float32, generate as they are."""
    for model in (gpu_model(dtype), densify_(gpu_model(dtype))):
        is_sparse = any(isinstance(m, SparseLinear) for m in model.modules())
        served = for_inference(model, 2)
        is_left = not is_sparse or dtype == torch.float32
        assert any(isinstance(m, PackedLinear) for m in served.modules()) is not is_left
        assert generate(served, prompt(2, 3).cuda(), 5).shape == (2, 8)
    with pytest.raises(TypeError, match="float32"):
        for_inference(gpu_model(torch.float32), 2, keeps_dense=True)


@pytest.mark.gpu
def test_tokens_of_no_vocabulary_leave_the_gpu_usable():
    model = gpu_model()
    with pytest.raises(ValueError, match="idx: expected tokens from 0 to 95, got 96 to 96"):
        generate(model, torch.full((1, 3), 96, device="cuda"), 3)
    with pytest.raises(ValueError, match="idx: expected tokens on cuda:0"):
        generate(model, prompt(1, 3), 3)
    assert generate(model, prompt(1, 3).cuda(), 3).shape == (1, 6)
