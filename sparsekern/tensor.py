"""SparseTensor: a sparsity pattern and its values, conversions to and from it. No arithmetic.

W [N, K] is held as CSR: row_offsets int32 [N+1], col_indices int32 [nnz] (strictly increasing in
each row) and values [nnz]. An entry is stored because the pattern says so and not because its value
is non-zero: explicit zeros are kept.

What torch computes on it is registered by matmul.py and surface/, which this module may not
import.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import conversions
from .conversions import Parts
from .indices import (
    check_pattern,
    check_sizes,
    check_values,
    checked_pattern,
    counted,
    expand_rows,
    sorting_order,
)

# torch function -> its implementation for a SparseTensor argument.
TORCH_FUNCTIONS: dict[Callable, Callable] = {}

# The same for Tensor.__rmatmul__, __rsub__ and their kind, by name: torch.compile (torch 2.13) does
# not find these functions in a dict.
REFLECTED: dict[str, Callable] = {}

# name of a torch function or method -> what to write in its place
ALTERNATIVES: dict[str, str] = {}


class SparseTensor:
    """A sparse matrix W [N, K], or its transpose sharing the same tensors (`W.T`).

    Args:
        row_offsets: int32 or int64 [N+1]; row i holds the entries row_offsets[i]:row_offsets[i+1].
        col_indices: int32 or int64 [nnz], different ones in each row, in [0, K).
        values: [nnz], float32, bfloat16, float16 or float64; may require grad.
        shape: (N, K).

    The arguments are checked here, once; ValueError or TypeError names the one that is wrong.
    Columns that do not increase in a row are sorted, and the values with them; a column that stands
    twice in a row is an error. In a graph of torch.compile the check runs with the graph.

    It is no torch.Tensor, but torch's functions take it where they can, and a TypeError names what
    to write where not. `values` is an attribute and holds what is trained: give it to optimizers.
    A module does not see `module.w = W`: it is in no state_dict and stays where it is on `.to()`.
    `module.register_buffer("w", W)` does for a fixed matrix: it moves, and is saved and loaded; but
    torch.compile, DDP and functional_call take tensors alone as buffers. For a weight of a layer,
    trained or not, use SparseLinear.

    Writes to the index tensors that torch counts (`W.col_indices[3] = 5`) are seen by the next
    product, which checks the pattern anew. After others call `indices_changed_()`. Matrices that
    are computed place by place (`W * 2`, `W.float()`, zeros_like(W)) share these tensors with W: a
    write there, or `copy_` of another pattern, changes all of them, and `W.clone()` is apart.
    """

    __slots__ = ("row_offsets", "col_indices", "values", "n", "k", "is_transposed", "__weakref__")

    def __init__(
        self, row_offsets: Tensor, col_indices: Tensor, values: Tensor, shape: Sequence[int]
    ):
        n, k = check_sizes(row_offsets, col_indices, values, shape)
        if torch.compiler.is_compiling():
            row_offsets, col_indices, order = checked_pattern(row_offsets, col_indices, n, k)
        else:
            order = sorting_order(row_offsets, col_indices, n, k)
            if order is not None:
                col_indices = col_indices[order]
        self.row_offsets = counted(row_offsets.int().contiguous())
        self.col_indices = counted(col_indices.int().contiguous())
        self.values = values if order is None else values[order]
        self.n = n  # rows and columns of the stored W, whatever is_transposed says
        self.k = k
        self.is_transposed = False

    @classmethod
    def _trusted(
        cls,
        row_offsets: Tensor,
        col_indices: Tensor,
        values: Tensor,
        n: int,
        k: int,
        is_transposed: bool = False,
    ) -> "SparseTensor":
        """Without checks: for tensors that were checked before."""
        tensor = cls.__new__(cls)
        tensor.row_offsets = row_offsets
        tensor.col_indices = col_indices
        tensor.values = values
        tensor.n = n
        tensor.k = k
        tensor.is_transposed = is_transposed
        return tensor

    def _with_values(self, values: Tensor, is_transposed: bool) -> "SparseTensor":
        return self._trusted(
            self.row_offsets, self.col_indices, values, self.n, self.k, is_transposed
        )

    @property
    def T(self) -> "SparseTensor":
        """The transpose; shares all tensors."""
        return self._trusted(
            self.row_offsets, self.col_indices, self.values, self.n, self.k, not self.is_transposed
        )

    # Conversions

    @classmethod
    def from_dense(cls, w: Tensor, mask: Tensor | None = None) -> "SparseTensor":
        """The entries of w [N, K] where the bool mask [N, K] is True; without one, where w != 0,
        and then a NaN in w is an error: some files mark pruned weights by it.

        Gradients flow from the values back to w.
        """
        parts = conversions.dense_parts(w, mask)
        return cls._trusted(parts.row_offsets, parts.col_indices, parts.values, *parts.shape)

    @classmethod
    def from_torch(cls, t: Tensor) -> "SparseTensor":
        """From a 2-D torch COO, CSR, CSC or BSR tensor.

        Every stored entry stays: also explicit zeros, and all entries of a BSR block. Duplicate
        entries of a COO tensor are summed.
        """
        return cls(*conversions.torch_parts(t))

    @classmethod
    def from_scipy(cls, a) -> "SparseTensor":
        """From any 2-D scipy.sparse matrix or array; duplicates are summed, zeros kept."""
        return cls(*conversions.scipy_parts(a))

    @classmethod
    def from_cupy(cls, a) -> "SparseTensor":
        """From any 2-D cupyx.scipy.sparse matrix or array.

        A CSR one shares its memory, its indices where they are int32, and all of it only where the
        columns increase in each row. Nothing is summed: duplicates are an error.
        """
        return cls(*conversions.cupy_parts(a))

    def to_dense(self) -> Tensor:
        """The dense matrix, zeros where nothing is stored. Gradients flow back to the values."""
        return self.values.new_zeros(self.shape).index_put(self._coordinates(), self.values)

    def _coordinates(self) -> tuple[Tensor, Tensor]:
        """Row and column of each stored value in this matrix, both int64 [nnz]."""
        rows, cols = expand_rows(self.row_offsets, self.nnz), self.col_indices.long()
        return (cols, rows) if self.is_transposed else (rows, cols)

    def to_torch(self) -> Tensor:
        """A torch CSR tensor; it shares memory with this one unless this is a transpose."""
        return conversions.to_torch(*self._checked(), self.shape, self.is_transposed)

    def to_scipy(self):
        """A scipy.sparse CSR array. 16-bit values become float32: scipy has no 16-bit floats.

        It shares memory with this one where it can: `indices_changed_()` after changes of its
        pattern.
        """
        return conversions.to_scipy(*self._checked(), self.n, self.k, self.is_transposed)

    def to_cupy(self):
        """A cupyx.scipy.sparse CSR matrix on the same GPU; it shares memory with this one unless
        this is a transpose. Of several GPUs cupy computes on its current one:
        `with cupy.cuda.Device(index):`."""
        return conversions.to_cupy(*self._checked(), self.n, self.k, self.is_transposed)

    def _checked(self) -> tuple[Tensor, Tensor, Tensor]:
        """CSR for others, who trust it: the indices may have been written to."""
        csr = self.row_offsets, self.col_indices, self.values
        check_sizes(*csr, (self.n, self.k))
        if not self.col_indices.is_meta:
            check_pattern(self.row_offsets, self.col_indices, self.n, self.k)
        return csr

    def to(self, *args, **kwargs) -> "SparseTensor":
        """Move or cast the values with the arguments of Tensor.to; the pattern follows."""
        return self._follow(self.values.to(*args, **kwargs))

    def _follow(self, values: Tensor) -> "SparseTensor":
        """This pattern with other values [nnz], which may be on another device."""
        check_values("dtype", values, ndim=1)
        return self._trusted(
            counted(self.row_offsets.to(values.device)),
            counted(self.col_indices.to(values.device)),
            values,
            self.n,
            self.k,
            self.is_transposed,
        )

    def detach(self) -> "SparseTensor":
        """The same tensor with values cut from the autograd graph."""
        return self._with_values(self.values.detach(), self.is_transposed)

    def indices_changed_(self) -> "SparseTensor":
        """Tell the library that row_offsets or col_indices were written in a way that torch does
        not count: through `.data`, NumPy, SciPy (`to_scipy` shares memory), another process.

        Without it, products after such a write may go on with the pattern from before. They never
        read or write out of bounds: what kernels use is made of a checked copy. The next product
        raises ValueError if the new pattern is not a valid one.
        """
        # A tensor from inference mode has no counter: kernels look at all of it on every call.
        tensors = [t for t in (self.row_offsets, self.col_indices) if not t.is_inference()]
        torch.autograd.graph.increment_version(tensors)
        return self

    # Copies and files

    def __copy__(self) -> "SparseTensor":
        return self._with_values(self.values, self.is_transposed)

    def __deepcopy__(self, memo: dict) -> "SparseTensor":
        values = copy.deepcopy(self.values, memo)
        row_offsets = counted(copy.deepcopy(self.row_offsets, memo))
        col_indices = counted(copy.deepcopy(self.col_indices, memo))
        return self._trusted(row_offsets, col_indices, values, self.n, self.k, self.is_transposed)

    def __reduce__(self):
        csr = Parts(self.row_offsets, self.col_indices, self.values, (self.n, self.k))
        return _rebuild, (*csr, self.is_transposed)

    def __setstate__(self, state: tuple) -> None:
        """Restore, also from files of an earlier version; all of it is checked, as ever."""
        slots = state[1]
        rows, cols, values = (slots[name] for name in ("row_offsets", "col_indices", "values"))
        SparseTensor.__init__(self, rows, cols, values, (slots["n"], slots["k"]))
        self.is_transposed = bool(slots["is_transposed"])

    # Properties

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.k, self.n) if self.is_transposed else (self.n, self.k))

    @property
    def ndim(self) -> int:
        return 2

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def requires_grad(self) -> bool:
        return self.values.requires_grad

    @requires_grad.setter
    def requires_grad(self, requires_grad: bool) -> None:
        self.values.requires_grad = requires_grad

    @property
    def nnz(self) -> int:
        """Number of stored values."""
        return self.col_indices.shape[0]

    @property
    def density(self) -> float:
        """nnz / (N * K); 0 for an empty matrix."""
        return self.nnz / max(1, self.n * self.k)

    @property
    def sparsity(self) -> float:
        """1 - density."""
        return 1 - self.density

    def __repr__(self) -> str:
        grad = ", requires_grad=True" if self.requires_grad else ""
        return (
            f"SparseTensor(shape={tuple(self.shape)}, nnz={self.nnz}, "
            f"sparsity={self.sparsity:.4g}, dtype={self.dtype}, device={self.device}{grad})"
        )

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, _: bool) -> None:
        """nn.Parameter(W) comes here."""
        raise TypeError(
            "nn.Parameter: a SparseTensor cannot be one: use SparseLinear, or make W.values the "
            "Parameter: SparseTensor(row_offsets, col_indices, nn.Parameter(values), shape)"
        )

    # torch's dispatch to what was registered

    __array_ufunc__ = None  # numpy_array @ W comes to __rmatmul__, which raises torch's error

    def __array__(self, *args, **kwargs):
        raise TypeError(
            "a SparseTensor is no NumPy array: use W.to_dense().numpy(), W.to_scipy() or W.values"
        )

    def __matmul__(self, other: Tensor) -> Tensor:
        return TORCH_FUNCTIONS[torch.matmul](self, other)

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return TORCH_FUNCTIONS[torch.matmul](other, self)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        implementation = TORCH_FUNCTIONS.get(func)
        if implementation is None:
            name = getattr(func, "__name__", str(func))
            implementation = REFLECTED.get(name)
            if implementation is None:
                if not set(types) <= {Tensor, SparseTensor}:  # another class may know it
                    return NotImplemented
                raise TypeError(unsupported(name))
        return implementation(*args, **kwargs) if kwargs else implementation(*args)


def unsupported(name: str) -> str:
    alternative = ALTERNATIVES.get(
        name, "W.values are its stored values, W.to_dense() is dense, W.to_torch() a torch CSR"
    )
    return f"{name}: not supported with a SparseTensor: {alternative}"


def register(name: str, implementation: Callable, method: bool = True) -> None:
    """Make `implementation` what torch.<name> and Tensor.<name> do with a SparseTensor, and its
    method of that name."""
    for owner in (torch, Tensor):
        # torch.cpu is a module, and torch.float a dtype.
        if callable(function := getattr(owner, name, None)):
            TORCH_FUNCTIONS[function] = implementation
    if method:
        setattr(SparseTensor, name, implementation)


class _Missing:
    """A name that a Tensor has and a SparseTensor lacks. A __getattr__ would do, and slow down
    every other attribute."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, instance, owner):
        raise AttributeError(unsupported(self.name))


def name_what_is_missing() -> None:
    """After all has been registered. What Python says of a wrong keyword begins with the name of
    the function, as what torch says does."""
    for function, implementation in TORCH_FUNCTIONS.items():
        if implementation.__qualname__.startswith("_") or "<" in implementation.__qualname__:
            implementation.__qualname__ = function.__name__
    for name in dir(Tensor):
        if not name.startswith("_") and name not in SparseTensor.__dict__:
            setattr(SparseTensor, name, _Missing(name))


def _rebuild(
    row_offsets: Tensor,
    col_indices: Tensor,
    values: Tensor,
    shape: tuple[int, int],
    is_transposed: bool,
) -> SparseTensor:
    """A SparseTensor from a file, which is not trusted."""
    W = SparseTensor(row_offsets, col_indices, values, shape)
    return W.T if is_transposed else W


torch.serialization.add_safe_globals([_rebuild])
