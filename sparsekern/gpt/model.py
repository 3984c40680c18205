"""GPT-2: token and position embeddings, blocks of attention and MLP with pre-LayerNorm, tied head.

One deviation: GELU itself instead of its tanh approximation, which is slower on a CPU.

Letters: B sequences, T positions, C width, V vocabulary, S positions that a cache has room for. The
model knows nothing of sparsity: `sparsify_` replaces the four linear layers of each block from
outside.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    dropout: float = 0.0
    bias: bool = True
    n_inner: int | None = None  # width of the MLP, None = 4 n_embd

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd: expected a multiple of n_head, got {self.n_embd} and {self.n_head}"
            )

    @property
    def mlp_width(self) -> int:
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_head

    @property
    def linears(self) -> list[tuple[int, int]]:
        """N, K of a block's linears."""
        C, h = self.n_embd, self.mlp_width
        return [(3 * C, C), (C, C), (h, C), (C, h)]

    @property
    def embedding_rows(self) -> int:
        """Of tokens and positions."""
        return self.vocab_size + self.block_size


# Of one block: keys and values [B, kv_heads, S, C / heads], the places of the new positions in S
# (int64 [T]), and a mask [T, S] to add to the scores, again for each head of a key.
Past = tuple[Tensor, Tensor, Tensor, Tensor]


class Attention(nn.Module):
    """Causal multi-head self-attention; query, key and value come from one linear layer."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:  # [B, T, C] -> [B, T, C]
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, C / heads]
        if past is None:
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            keys, values, position, mask = past
            keys.index_copy_(2, position, k.to(keys.dtype))  # of another one under autocast
            values.index_copy_(2, position, v.to(values.dtype))
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        y = self.proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.up = nn.Linear(config.n_embd, config.mlp_width, bias=config.bias)
        self.down = nn.Linear(config.mlp_width, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C] -> [B, T, C]
        y = self.down(F.gelu(self.up(x)))
        return F.dropout(y, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:  # [B, T, C] -> [B, T, C]
        x = x + self.attention(self.norm1(x), past)
        return x + self.mlp(self.norm2(x))


class Cache:
    """The keys and values of up to `length` positions of `batch` sequences, for each block: pairs
    [B, kv_heads, S, C / heads] in `layers`.

    No shape ever changes, as a CUDA graph needs it: a mask hides the positions still to come."""

    def __init__(self, model: "GPT", batch: int, length: int) -> None:
        c, weight = model.config, model.wte.weight
        shape = batch, c.kv_heads, length, c.n_embd // c.n_head
        self._shared = c.n_head // c.kv_heads  # heads of a key
        # Zeros, since a hidden NaN would spread.
        self.layers = [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in model.blocks]

    def check(self, model: "GPT", batch: int, length: int) -> None:
        """ValueError unless it is for `model`, as that is now, and has room for so many texts, of
        `length` positions."""
        c, weight, keys = model.config, model.wte.weight, self.layers[0][0]
        B, G, S, D = keys.shape
        head = c.n_embd // c.n_head
        wanted = len(model.blocks), batch, c.kv_heads, head, weight.dtype, weight.device
        found = len(self.layers), B, G, D, keys.dtype, keys.device
        if found != wanted or S < length:
            form = "{} positions, {} blocks, {} texts, {} heads, {} wide, {} on {}"
            raise ValueError(
                f"cache: expected {form.format(f'at least {length}', *wanted)}, "
                f"got {form.format(S, *found)}"
            )

    def past(self, position: Tensor) -> list[Past]:
        """State that each block needs to add positions [T] and to see them and all before."""
        keys = self.layers[0][0]
        is_future = torch.arange(keys.shape[2], device=keys.device) > position[:, None]
        mask = keys.new_zeros(is_future.shape).masked_fill(is_future, -math.inf)  # [T, S]
        if self._shared > 1:
            mask = mask.repeat(self._shared, 1)
        return [(keys, values, position, mask) for keys, values in self.layers]


class GPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        initialise(self, config.n_layer)
        self.lm_head.weight = self.wte.weight

    def embed(self, idx: Tensor, position: Tensor) -> Tensor:
        """[B, T, C], what the first block gets."""
        x = self.wte(idx) + self.wpe(position)
        return F.dropout(x, self.config.dropout, self.training)

    def along(self, position: Tensor) -> tuple[Tensor, ...]:
        """What each block is told of the positions."""
        return ()

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: Cache | None = None,
        position: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """idx, targets int64 [B, T], T <= block_size -> logits [B, T, V], mean loss in nats.

        With a cache idx continues what the cache holds, at the places `position` int64 [T], and the
        logits are those of the last one alone, [B, 1, V]. Without one the places are 0 to T - 1."""
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"idx has {T} positions, block_size is {self.config.block_size}")
        if cache is None:
            position, pasts = torch.arange(T, device=idx.device), [None] * len(self.blocks)
        elif position is None:
            raise ValueError("position: expected the places of idx, since there is a cache")
        else:
            cache.check(self, len(idx), T)
            pasts = cache.past(position)
        x, along = self.embed(idx, position), self.along(position)
        for block, past in zip(self.blocks, pasts, strict=True):
            x = block(x, past, *along)
        if cache is not None:
            x = x[:, -1:]
        if targets is None:
            return self.lm_head(self.norm(x)), None
        return self.score(x, targets)

    def score(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and mean loss, as forward() returns them, from x [B, T, C] of the last block."""
        logits = self.lm_head(self.norm(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def initialise(module: nn.Module, n_layer: int) -> None:
    """GPT-2's random weights for a GPT of `n_layer` blocks or for a part of one, in place."""
    for part in module.modules():
        if isinstance(part, nn.LayerNorm | nn.RMSNorm):
            part.reset_parameters()
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
    # Each block adds twice to the residual stream: GPT-2 keeps its variance at depth.
    for block in module.modules():
        if isinstance(block, Block):
            for layer in (block.attention.proj, block.mlp.down):
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * n_layer))
