"""Shapes of GPTs and their FLOPs, as in gpt/flops.py: full attention, dense head."""

from dataclasses import dataclass

from .machine import FLOP_PER_FMA

PRODUCTS_PER_TRAINING_STEP = 3  # forward, input gradient, weight gradient


@dataclass(frozen=True)
class GPTShape:
    name: str
    layers: int
    width: int
    heads: int
    ffn: int
    vocabulary: int
    sequence: int

    def __post_init__(self) -> None:
        for field in ("layers", "width", "heads", "ffn", "vocabulary", "sequence"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(N, K) of the linear layers of one block, those that sparsity thins."""
        d, f = self.width, self.ffn
        return {"qkv": (3 * d, d), "proj": (d, d), "up": (f, d), "down": (d, f)}

    @property
    def linear_fma(self) -> int:
        """Multiply-adds of one token, forward, all blocks; also the number of their weights."""
        return self.layers * sum(n * k for n, k in self.matrices.values())

    @property
    def attention_fma(self) -> int:
        return self.layers * 2 * self.sequence * self.width

    @property
    def head_fma(self) -> int:
        return self.width * self.vocabulary

    def forward_flop(self, density: float = 1.0) -> float:
        """Forward FLOPs of one token."""
        fma = self.linear_fma * density + self.attention_fma + self.head_fma
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

    def parameter_ratio(self, density: float) -> float:
        """Dense over sparse parameters: matrices and embeddings; no biases, no norms."""
        embeddings = (self.vocabulary + self.sequence) * self.width
        return (self.linear_fma + embeddings) / (self.linear_fma * density + embeddings)


def _gpt(name: str, layers: int, width: int, heads: int, ffn: int | None = None) -> GPTShape:
    return GPTShape(name, layers, width, heads, ffn or 4 * width, 50257, 2048)


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

# Gated MLPs of three matrices and grouped queries as the ffn of two with as many weights. From
# memory of the public configurations, not read: for plausibility bands alone.
LLAMA2_7B = GPTShape("llama2-7b, equivalent", 32, 4096, 32, 16512, 32000, 4096)
LLAMA3_8B = GPTShape("llama3-8b, equivalent", 32, 4096, 32, 18432, 128256, 8192)
# 30L/4096/32h, V 50257: read; tokens of its training: not read.
FLOR_6B = _gpt("flor-6.3b", 30, 4096, 32)


def gpt_shape(name: str) -> GPTShape:
    if name not in GPT_SHAPES:
        raise ValueError(f"model: expected one of {', '.join(GPT_SHAPES)}, got {name!r}")
    return GPT_SHAPES[name]
