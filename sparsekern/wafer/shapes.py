"""Shapes of GPTs and their FLOPs, as in gpt/flops.py: full attention, dense head."""

from dataclasses import dataclass

from .figures import check_count, check_share
from .machine import FLOP_PER_FMA

PRODUCTS_PER_TRAINING_STEP = 3  # forward, input gradient, weight gradient


@dataclass(frozen=True)
class Matrix:
    """A linear layer of one block, W [n, k]: as many copies as there are experts, each with its
    share of the tokens."""

    name: str
    n: int
    k: int
    copies: int = 1
    share: float = 1.0


@dataclass(frozen=True)
class GPTShape:
    """A decoder: `layers` blocks of attention and MLP, and a head.

    Grouped queries (`kv_heads`), a gated MLP (three matrices) and experts, whose tokens are taken
    to be even, are counted as the matrices that they are. Raises ValueError, which names the field.
    """

    name: str
    layers: int
    width: int
    heads: int
    ffn: int  # of one expert
    vocabulary: int
    sequence: int
    kv_heads: int = 0  # 0: as many as heads
    head_size: int = 0  # 0: width / heads
    is_gated: bool = False
    is_qkv_one_matrix: bool = True
    experts: int = 1
    experts_per_token: int = 1
    is_tied: bool = True  # the head's weight is that of the embedding
    is_rotary: bool = False  # no table of positions

    def __post_init__(self) -> None:
        sizes = ("layers", "width", "heads", "ffn", "vocabulary", "sequence", "experts")
        for field in (*sizes, "experts_per_token"):
            check_count(field, getattr(self, field))
        if self.experts_per_token > self.experts:
            raise ValueError(
                f"experts_per_token: expected at most the {self.experts} experts, "
                f"got {self.experts_per_token}"
            )
        for field in ("head_size", "kv_heads"):
            check_count(field, getattr(self, field), least=0)
        if not self.head_size and self.width % self.heads:
            raise ValueError(
                f"heads: expected a divisor of the width of {self.width}, got {self.heads}"
            )
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads: expected a divisor of the {self.heads} heads, got {self.kv_heads}"
            )

    @property
    def q_width(self) -> int:
        return self.heads * self.head_size or self.width

    @property
    def kv_width(self) -> int:
        """Width of the keys, and again of the values."""
        return self.q_width * (self.kv_heads or self.heads) // self.heads

    @property
    def block(self) -> tuple[Matrix, ...]:
        """The linear layers of one block, those that sparsity thins."""
        d, q, kv = self.width, self.q_width, self.kv_width
        if self.is_qkv_one_matrix:
            attention = [Matrix("qkv", q + 2 * kv, d)]
        else:
            attention = [Matrix("q", q, d), Matrix("k", kv, d), Matrix("v", kv, d)]
        share = self.experts_per_token / self.experts
        sides = ("gate", "up") if self.is_gated else ("up",)
        mlp = [(name, self.ffn, d) for name in sides] + [("down", d, self.ffn)]
        return (
            *attention,
            Matrix("proj", d, q),
            *(Matrix(name, n, k, self.experts, share) for name, n, k in mlp),
        )

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(N, K) of the linear layers of one block, those that sparsity thins."""
        return {matrix.name: (matrix.n, matrix.k) for matrix in self.block}

    @property
    def linear_fma(self) -> float:
        """Multiply-adds of one token, forward, all blocks."""
        return self.layers * sum(m.n * m.k * m.copies * m.share for m in self.block)

    @property
    def linear_weights(self) -> int:
        return self.layers * sum(m.n * m.k * m.copies for m in self.block)

    @property
    def attention_fma(self) -> int:
        return self.layers * 2 * self.sequence * self.q_width

    @property
    def scores(self) -> int:
        """Scores of one token, all heads and blocks."""
        return self.layers * self.heads * self.sequence

    @property
    def elements(self) -> int:
        """Elements that norms, activations and sums go over, of one token and all blocks: two norms
        of two passes, two sums, and the MLP between its matrices."""
        mlp = self.ffn * self.experts_per_token * (2 if self.is_gated else 1)
        return self.layers * (6 * self.width + mlp)

    @property
    def head_fma(self) -> int:
        return self.width * self.vocabulary

    def forward_flop(self, density: float = 1.0) -> float:
        """Forward FLOPs of one token."""
        fma = self.linear_fma * check_share("density", density) + self.attention_fma + self.head_fma
        return FLOP_PER_FMA * fma

    def train_flop(self, density: float = 1.0) -> float:
        """Training FLOPs of one token."""
        return PRODUCTS_PER_TRAINING_STEP * self.forward_flop(density)

    def flop_ratio(self, density: float) -> float:
        """Dense FLOPs over sparse FLOPs, of training as of inference."""
        return self.forward_flop() / self.forward_flop(density)

    @property
    def flop_cap(self) -> float:
        """The FLOP ratio with no weights left in the linear layers (Amdahl)."""
        return self.forward_flop() / self.forward_flop(0.0)

    def parameters(self, density: float = 1.0) -> float:
        """Matrices and embeddings; no biases, no norms."""
        tables = self.vocabulary * (1 if self.is_tied else 2)
        tables += 0 if self.is_rotary else self.sequence
        return self.linear_weights * check_share("density", density) + tables * self.width

    def parameter_ratio(self, density: float) -> float:
        """Dense over sparse parameters."""
        return self.parameters() / self.parameters(density)


def _gpt(name: str, layers: int, width: int, heads: int, ffn: int | None = None) -> GPTShape:
    return GPTShape(name, layers, width, heads, ffn or 4 * width, 50257, 2048)


def _llama(
    name: str, layers: int, width: int, heads: int, kv_heads: int, ffn: int, vocab: int, length: int
) -> GPTShape:
    return GPTShape(
        *(name, layers, width, heads, ffn, vocab, length, kv_heads),
        is_gated=True,
        is_qkv_one_matrix=False,
        is_tied=False,
        is_rotary=True,
    )


# 125M, XL, 6.7B: Cerebras' configurations (modelzoo 2.10.0); 175B: GPT-3's published shape.
GPT_SHAPES: dict[str, GPTShape] = {
    shape.name: shape
    for shape in (
        _gpt("gpt2-small", 12, 768, 12),
        _gpt("gpt3-xl", 24, 2048, 16),
        _gpt("gpt-6.7b", 32, 4096, 32),
        _gpt("gpt3-175b", 96, 12288, 96),
    )
}

# Cerebras-GPT (arXiv 2304.03208): shape, then steps and sequences a step of its training.
CEREBRAS_GPT: dict[GPTShape, tuple[int, int]] = {
    _gpt("cerebras-gpt-111m", 10, 768, 12): (9037, 120),
    _gpt("cerebras-gpt-256m", 14, 1088, 17): (9468, 264),
    _gpt("cerebras-gpt-590m", 18, 1536, 12): (21836, 264),
    _gpt("cerebras-gpt-1.3b", 24, 2048, 16): (24334, 528),
    _gpt("cerebras-gpt-2.7b", 32, 2560, 32): (49041, 528),
    _gpt("cerebras-gpt-6.7b", 32, 4096, 32): (62522, 1040),
    _gpt("cerebras-gpt-13b", 40, 5120, 40): (174335, 720),
}
GPT_SHAPES |= {shape.name: shape for shape in CEREBRAS_GPT}

# 20B: Table III of arXiv 2409.00287, ffn and vocabulary as in Cerebras-GPT. GPT-J: modelzoo. Llama:
# from memory of the public configurations, not read.
GPT_SHAPES |= {
    shape.name: shape
    for shape in (
        _gpt("gpt-20b", 44, 6144, 64),
        _gpt("gpt-j-6b", 28, 4096, 16),
        _llama("llama-7b", 32, 4096, 32, 32, 11008, 32000, 2048),
        _llama("llama2-7b", 32, 4096, 32, 32, 11008, 32000, 4096),
        _llama("llama3-8b", 32, 4096, 32, 8, 14336, 128256, 8192),
    )
}
# 30L/4096/32h, V 50257: read; tokens of its training: not read.
FLOR_6B = _gpt("flor-6.3b", 30, 4096, 32)


def gpt_shape(name: str) -> GPTShape:
    """A shape by its name, one of GPT_SHAPES."""
    if name not in GPT_SHAPES:
        raise ValueError(f"model: expected one of {', '.join(GPT_SHAPES)}, got {name!r}")
    return GPT_SHAPES[name]
