"""LLaMA's block in the minimal GPT: RMSNorm, rotary positions, grouped heads, SwiGLU, no biases.

One deviation: the head is tied to the token embedding, as in the smallest LLaMAs alone. q, k and v
come from one linear, so do gate and up. Letters as in model.py; H heads, G of keys and values, D
the width of a head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import GPT, Block, GPTConfig, Past, initialise

BASE = 10000.0  # of the wavelengths of positions


@dataclass(frozen=True)
class LlamaConfig(GPTConfig):
    bias: bool = False
    n_kv_head: int = 1  # each serves n_head / n_kv_head heads

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_kv_head < 1 or self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_head: expected a multiple of n_kv_head, got {self.n_head} and {self.n_kv_head}"
            )
        if self.bias or self.dropout or self.n_embd // self.n_head % 2:
            raise ValueError(
                "expected no bias, no dropout and heads of an even width, got "
                f"bias {self.bias}, dropout {self.dropout}, width {self.n_embd // self.n_head}"
            )

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head

    @property
    def linears(self) -> list[tuple[int, int]]:
        C, h = self.n_embd, self.mlp_width
        return [(C + 2 * C // self.n_head * self.n_kv_head, C), (C, C), (2 * h, C), (C, h)]

    @property
    def embedding_rows(self) -> int:
        return self.vocab_size


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads = config.n_head, config.n_kv_head, config.n_kv_head
        width = config.n_embd // config.n_head
        self.qkv = nn.Linear(config.n_embd, sum(self.heads) * width, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, past: Past | None, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, C = x.shape
        H, G, _ = self.heads
        qkv = self.qkv(x).view(B, T, H + 2 * G, C // H).transpose(1, 2)
        q, k, v = qkv.split(self.heads, dim=1)  # each [B, heads, T, D]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            keys, values, position, mask = past
            keys.index_copy_(2, position, k.to(keys.dtype))  # of another one under autocast
            values.index_copy_(2, position, v.to(values.dtype))
            # The heads of a group are further rows of q: no key is read twice.
            q = q.reshape(B, G, H // G * T, C // H)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return self.proj(y.reshape(B, H, T, C // H).transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.n_embd, 2 * config.mlp_width, bias=False)  # gate, then up
        self.down = nn.Linear(config.mlp_width, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class LlamaBlock(Block):
    def __init__(self, config: LlamaConfig) -> None:
        nn.Module.__init__(self)
        self.norm1 = nn.RMSNorm(config.n_embd, eps=1e-5)
        self.attention = Attention(config)
        self.norm2 = nn.RMSNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, past: Past | None, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), past, cos, sin)
        return x + self.mlp(self.norm2(x))


class Llama(GPT):
    config: LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(LlamaBlock(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-5)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        initialise(self, config.n_layer)
        self.lm_head.weight = self.wte.weight

    def embed(self, idx: Tensor, position: Tensor) -> Tensor:
        return self.wte(idx)

    def along(self, position: Tensor) -> tuple[Tensor, ...]:
        """cos and sin [T, D / 2] of the angles by which positions turn pairs."""
        half = self.config.n_embd // self.config.n_head // 2
        # In float32 an angle of position 2000 is off by 1e-4.
        places = torch.arange(half, device=position.device, dtype=torch.float64)
        angles = position.double()[:, None] * BASE ** (-places / half)
        dtype = self.wte.weight.dtype
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, heads, T, D], each pair (i, i + D / 2) turned by the angle of its position."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def make(config: GPTConfig) -> GPT:
    """The model of a config, with random weights."""
    return Llama(config) if isinstance(config, LlamaConfig) else GPT(config)
