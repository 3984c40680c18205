"""Modules with sparse weights in the place of others than nn.Linear.

    Conv1D               of transformers: an nn.Linear whose weight is stored as [K, N]
    Conv1d, Conv2d, ...  without groups: a matrix on the channels at all places of the kernel
    MultiheadAttention   in_proj and out_proj

and in experts.py the experts of mixtures.

Each is made with `from_dense`, and `to_dense` gives back a module of the class that it was made
from. What decides whether a module fits stands in kinds.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import in_functorch
from ..tensor import SparseTensor
from .checks import cannot_be_set
from .kinds import parameter_of
from .linear import SparseLinear
from .loading import dense_refused
from .origin import Origin

COLUMNS_BYTES = 2**24  # more is new memory in each call, which takes longer than to gather
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}  # by dimensions of the kernel


class SparseConv1D(SparseLinear):
    """Conv1D of transformers: y [..., N] = x [..., K] @ weight [K, N] + bias, W = weight.T."""

    origin: Origin
    stores_transpose = True

    @classmethod
    def from_dense(cls, conv: Any, mask: Tensor | None = None) -> "SparseConv1D":
        """`mask` is a bool [K, N], as the weight is stored."""
        mask = None if mask is None else mask.t()
        weight = conv.weight.detach().t()
        layer = cls.from_weight(parameter_of(conv), conv.bias, mask, weight)
        layer.origin = Origin(conv)
        return layer.train(conv.training)

    @property
    def nf(self) -> int:
        return self.out_features

    @property
    def nx(self) -> int:
        return self.in_features

    def to_linear(self) -> Any:
        """The Conv1D of the same function."""
        weight = self.weight.detach().to_dense().t().contiguous()
        parameters = {"weight": nn.Parameter(weight, self.values.requires_grad), "bias": self.bias}
        return self.origin.with_(parameters).train(self.training)

    def as_stored(self, weight: Tensor) -> Tensor:
        return weight.t().contiguous()


class StandIn(nn.Module):
    """A module that holds SparseLinears and knows what it took the place of."""

    origin: Origin

    def to_dense(self) -> nn.Module:
        """The dense module in whose place it stands."""
        raise NotImplementedError

    @property
    def dense_names(self) -> list[str]:
        """The names of that module's Parameters."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict, prefix, *others):
        """Without this the dense weights would be unexpected keys, which are no error where a
        state_dict is not loaded strictly."""
        given = (name for name in self.dense_names if prefix + name in state_dict)
        if (name := next(given, None)) is not None:
            others[-1].append(dense_refused(prefix + name, self))
        super()._load_from_state_dict(state_dict, prefix, *others)

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(type(self), name) and isinstance(value, Tensor | SparseTensor):
            raise cannot_be_set(self, name, "densify_(model) gives back the module that has one")
        super().__setattr__(name, value)

    def __getattr__(self, name: str):
        """Sizes and settings of the module that was there, which others may read: an experts' gate,
        or who pads before a convolution."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            origin = self.__dict__.get("origin")
            if origin is None or name.startswith("_") or name not in origin.attributes:
                raise
            return origin.attributes[name]


class SparseConv(StandIn):
    """A convolution without groups: x [B, C, ...] -> y [B, N, ...].

    W is [N, places of the kernel * C]. The columns that it is multiplied by are gathered, as many
    times x as the kernel has places; on a CPU some MB at a time.
    """

    def __init__(self, linear: SparseLinear, conv: Any):
        super().__init__()
        self.linear, self.origin = linear, Origin(conv)
        self.dims = len(conv.kernel_size)
        self.windows = list(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True))
        self.pads: tuple[int, ...] = tuple(conv._reversed_padding_repeated_twice)
        self.pad_mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        self.is_channels_last = _is_channels_last(conv.weight)

    @classmethod
    def from_dense(cls, conv: Any, mask: Tensor | None = None) -> "SparseConv":
        mask = None if mask is None else _as_matrix(mask)
        weight = _as_matrix(conv.weight.detach())
        linear = SparseLinear.from_weight(conv.weight, conv.bias, mask, weight)
        return cls(linear, conv).train(conv.training)

    @property
    def dense_names(self) -> list[str]:
        return ["weight", "bias"]

    @property
    def weight(self) -> SparseTensor:
        """W [N, places of the kernel * C]: others ask for its dtype and device."""
        return self.linear.weight

    @property
    def bias(self) -> nn.Parameter | None:
        return self.linear.bias

    def to_dense(self) -> nn.Module:
        kernel, trained = self.origin.attributes["kernel_size"], self.linear.values.requires_grad
        weight = self.linear.weight.detach().to_dense().unflatten(1, (*kernel, -1))
        weight = weight.movedim(-1, 1)  # [N, C, ...]
        memory_format = self._format(weight, self.is_channels_last)
        weight = torch.empty_like(weight, memory_format=memory_format).copy_(weight)
        parameters = {"weight": nn.Parameter(weight, trained), "bias": self.linear.bias}
        return self.origin.with_(parameters).train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim not in (self.dims + 1, self.dims + 2):
            raise RuntimeError(
                f"Expected {self.dims + 1}D (unbatched) or {self.dims + 2}D (batched) input to "
                f"conv{self.dims}d, but got input of size: {list(input.shape)}"
            )
        columns = self._columns(input)
        places = columns.shape[: -1 - self.dims]
        parts = _parts(columns, len(places))
        ys = [self.linear(part.flatten(-1 - self.dims)) for part in parts]
        y = ys[0] if len(ys) == 1 else torch.cat([y.flatten(0, -2) for y in ys]).view(*places, -1)
        y = y.movedim(-1, -1 - self.dims)
        if in_functorch():  # vmap knows one format alone
            return y.contiguous()
        last = CHANNELS_LAST.get(input.ndim - 2)
        is_last = last is not None and input.is_contiguous(memory_format=last)
        return y.contiguous(memory_format=self._format(y, is_last or self.is_channels_last))

    def _format(self, t: Tensor, is_last: bool) -> torch.memory_format:
        """That of a batch or a weight, which are contiguous or have the channels last."""
        is_whole = t.ndim == self.dims + 2
        return CHANNELS_LAST[self.dims] if is_last and is_whole else torch.contiguous_format

    def _columns(self, x: Tensor) -> Tensor:
        """[B, places of y, places of the kernel, C], a view of x with its padding."""
        if any(self.pads):
            x = F.pad(x, self.pads, self.pad_mode)
        x = x.movedim(-1 - self.dims, -1)  # [B, ..., C]
        if any(size > 1 for size, _, _ in self.windows):
            x = x.contiguous()
        first = x.ndim - 1 - self.dims
        for dim, (size, stride, dilation) in enumerate(self.windows, first):
            x = x.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
        return x.movedim(first + self.dims, -1)


def _as_matrix(weight: Tensor) -> Tensor:
    """[N, C, ...] of a convolution as [N, places of the kernel * C]."""
    return weight.movedim(1, -1).flatten(1)


def _is_channels_last(weight: Tensor) -> bool:
    """By its strides, by which torch chooses: of a kernel of one place both formats are one."""
    last = CHANNELS_LAST.get(weight.ndim - 2)
    if last is None or not weight.is_contiguous(memory_format=last):
        return False
    plain = torch.empty_like(weight, device="meta", memory_format=torch.contiguous_format)
    return weight.stride() != plain.stride()


def _parts(columns: Tensor, places: int) -> list[Tensor]:
    """The columns, of which no more than COLUMNS_BYTES are to be written out at once: some images,
    or some rows of one. In so many first dimensions are the places of y."""
    size = columns.numel() * columns.itemsize
    if columns.device.type != "cpu" or size <= COLUMNS_BYTES:
        return [columns]
    each = size // len(columns)
    parts = columns.split(max(1, COLUMNS_BYTES // each))
    if each <= COLUMNS_BYTES or places == 1:
        return list(parts)
    rows = max(1, columns.shape[1] * COLUMNS_BYTES // each)
    return [some for image in parts for some in image.split(rows, 1)]


class SparseMultiheadAttention(StandIn):
    """nn.MultiheadAttention with one embedding size for query, key and value."""

    # nn.TransformerEncoder and its layers ask these three, and leave their fast paths, which read
    # dense weights.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    @property
    def in_proj_weight(self) -> SparseTensor:
        """The first of the three weights in it."""
        return self.q_proj.weight

    @property
    def dense_names(self) -> list[str]:
        return ["in_proj_weight", "in_proj_bias"]

    def __init__(self, projections: list[SparseLinear], out: SparseLinear, origin: Origin):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = projections
        self.out_proj = out
        self.origin = origin
        self.embed_dim: int = origin.attributes["embed_dim"]
        self.num_heads: int = origin.attributes["num_heads"]
        self.head_dim: int = origin.attributes["head_dim"]
        self.dropout: float = origin.attributes["dropout"]
        self.batch_first: bool = origin.attributes["batch_first"]

    @classmethod
    def from_dense(cls, attention: nn.MultiheadAttention) -> "SparseMultiheadAttention":
        parameter = attention.in_proj_weight
        weights, biases = parameter.detach().chunk(3), in_proj_biases(attention)
        projections = [
            SparseLinear.from_weight(parameter, b, None, w)
            for w, b in zip(weights, biases, strict=True)
        ]
        out = SparseLinear.from_linear(attention.out_proj)
        return cls(projections, out, Origin(attention)).train(attention.training)

    def to_dense(self) -> nn.MultiheadAttention:
        parts = [self.q_proj, self.k_proj, self.v_proj]
        weight = torch.cat([part.weight.detach().to_dense() for part in parts])
        biases = [part.bias for part in parts if part.bias is not None]
        parameters: dict[str, nn.Parameter | None] = {
            "in_proj_weight": nn.Parameter(weight, self.q_proj.values.requires_grad),
            "in_proj_bias": None,
            "bias_k": None,
            "bias_v": None,
            **dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight")),
        }
        if biases:
            bias = torch.cat([b.detach() for b in biases])
            parameters["in_proj_bias"] = nn.Parameter(bias, biases[0].requires_grad)
        dense = self.out_proj.to_linear()
        kind = nn.modules.linear.NonDynamicallyQuantizableLinear
        out = kind(self.embed_dim, self.embed_dim, bias=dense.bias is not None, device="meta")
        out.weight, out.bias = dense.weight, dense.bias
        return self.origin.with_(parameters, {"out_proj": out}).train(self.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention.forward, for dense tensors."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal: expected a causal attn_mask beside it, got None")
        is_batched = query.ndim == 3
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if not is_batched:
            q, k, v = (t.unsqueeze(0) for t in (q, k, v))
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        mask = self._mask(attn_mask, key_padding_mask, q, k.shape[-2])
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q / self.head_dim**0.5) @ k.mT
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if is_batched else weights.squeeze(0)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        is_batch_first = self.batch_first or not is_batched
        y = y.permute(0, 2, 1, 3) if is_batch_first else y.permute(2, 0, 1, 3)
        y = self.out_proj(y.flatten(2))  # contiguous: some take a view of it
        return (y if is_batched else y.squeeze(0)), weights

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, count: int
    ) -> Tensor | None:
        """What is added to the scores [B, H, T, S] of so many keys, or broadcasts to them: both
        masks, of which bool ones are True where nothing is to be seen."""
        batch, heads, tokens, _ = q.shape
        _check_mask("attn_mask", attn_mask, (tokens, count), (batch * heads, tokens, count))
        _check_mask("key_padding_mask", padding, (batch, count))
        if attn_mask is not None and attn_mask.ndim == 3:  # [B * H, T, S]
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
        parts = [attn_mask] if attn_mask is not None else []
        parts += [padding[:, None, None, :]] if padding is not None else []
        added = [
            torch.zeros_like(part, dtype=q.dtype).masked_fill_(part, -torch.inf)
            if part.dtype == torch.bool
            else part.to(q.dtype)
            for part in parts
        ]
        return sum(added[1:], added[0]) if added else None


def in_proj_biases(attention: nn.MultiheadAttention) -> list[nn.Parameter | None]:
    """A new bias for each of query, key and value, or None for each."""
    bias = attention.in_proj_bias
    if bias is None:
        return [None] * 3
    return [nn.Parameter(b.clone(), bias.requires_grad) for b in bias.detach().chunk(3)]


def _check_mask(name: str, mask: Tensor | None, *shapes: tuple[int, ...]) -> None:
    if mask is None:
        return
    if mask.shape not in shapes or not (mask.dtype == torch.bool or mask.is_floating_point()):
        expected = " or ".join(map(str, shapes))
        raise RuntimeError(
            f"{name}: expected shape {expected} and bool or floating-point values, got "
            f"{tuple(mask.shape)} of {mask.dtype}"
        )
