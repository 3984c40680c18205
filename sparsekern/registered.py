"""The three products as torch ops: schemas, implementations and fakes. ops.py has what callers use.

Each op is one opaque node for torch.compile and picks its kernel when it runs, never at trace time.
Python owns the schemas, so the package imports and traces without its libraries.
"""

import itertools
import weakref
from math import prod
from types import NoneType

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .flop_formulas import FORMULAS, register_when_imported
from .kernels import observed
from .kernels.cpu import lanes
from .kernels.cuda.choose import assemble, check_operands, form_for
from .kernels.cuda.compressed import TwoOfFourE4m3
from .kernels.cuda.compressed import multiply as multiply_compressed
from .kernels.cuda.few_tokens import prepare_packed
from .kernels.cuda.few_tokens import spmm_packed as multiply_packed
from .kernels.cuda.layout import Packed
from .kernels.cuda.ordered import recognised
from .kernels.operands import (
    check_memory,
    check_product,
    check_sddmm,
    fitting_tokens,
    native,
)
from .kernels.prepared import SDDMM, SPMM, SPMM_T
from .kernels.problem import Problem
from .kernels.steps import A, Steps
from .kernels.table import pick

# Implementations: checks, contiguous operands, one look-up, the kernel.

_new = tuple.__new__  # of a Problem: half the time of its own


def run_spmm(row_offsets, col_indices, values, n, k, x, bias=None):
    return run_product("spmm", row_offsets, col_indices, values, n, k, x, bias)


def run_spmm_t(row_offsets, col_indices, values, n, k, dy, bias=None):
    return run_product("spmm_t", row_offsets, col_indices, values, n, k, dy, bias)


def run_product(op, row_offsets, col_indices, values, n, k, x, bias):
    if native and forward_ad._current_level < 0:
        which = SPMM if op == "spmm" else SPMM_T
        y = native.call_op(which, row_offsets, col_indices, values, n, k, x, bias)
        if y is not None:
            return y
    width, outputs = (k, n) if op == "spmm" else (n, k)
    m = fitting_tokens(n, row_offsets, col_indices, values, bias, outputs, x, width)
    if m is None:  # something is wrong, or lies elsewhere than kernels read it
        row_offsets, col_indices, values, x, bias = _plain(
            row_offsets, col_indices, values, x, bias
        )
        m, _ = check_product(op, row_offsets, col_indices, values, n, k, x, bias)
        check_memory(op, row_offsets=row_offsets, col_indices=col_indices, values=values, x=x)
        values, x = values.contiguous(), x.contiguous()
        if bias is not None:
            check_memory(op, bias=bias)
            bias = bias.contiguous()
    if forward_ad._current_level >= 0:
        _refuse_tangents(op, values, x, bias)
    device, nnz = "cpu" if x.is_cpu else "cuda", col_indices.numel()
    problem = _new(Problem, (op, device, x.dtype, m, n, k, nnz, False, False))
    if device == "cuda":
        problem = recognised(problem, row_offsets, col_indices)
    run = pick(problem).run
    return run(row_offsets, col_indices, values, n, k, x, bias)


def run_sddmm(row_offsets, col_indices, n, k, dy, x):
    if native and forward_ad._current_level < 0:
        dvalues = native.call_op(SDDMM, row_offsets, col_indices, None, n, k, dy, x)
        if dvalues is not None:
            return dvalues
    m = fitting_tokens(n, row_offsets, col_indices, None, None, 0, dy, n, x, k)
    if m is None:
        row_offsets, col_indices, dy, x = _plain(row_offsets, col_indices, dy, x)
        m, _ = check_sddmm(row_offsets, col_indices, n, k, dy, x)
        check_memory("sddmm", row_offsets=row_offsets, col_indices=col_indices, dy=dy, x=x)
        dy, x = dy.contiguous(), x.contiguous()
    if forward_ad._current_level >= 0:
        _refuse_tangents("sddmm", dy, x)
    observed.note(row_offsets, dy, x)
    device, nnz = "cpu" if x.is_cpu else "cuda", col_indices.numel()
    run = pick(_new(Problem, ("sddmm", device, x.dtype, m, n, k, nnz, False, False))).run
    return run(row_offsets, col_indices, n, k, dy, x)


def _plain(*operands: Tensor | None) -> list[Tensor | None]:
    """Operands without the methods of a subclass, which could change one after it was checked."""
    with torch._C.DisableTorchFunctionSubclass():
        return [
            t if type(t) in (Tensor, Parameter, NoneType) else Tensor.as_subclass(t, Tensor)
            for t in operands
        ]


def _refuse_tangents(op: str, *tensors: Tensor | None) -> None:
    """An op that was called past ops.py (by a compiled graph, by its name) would lose them."""
    if not forward_ad._is_fwd_grad_enabled():
        return
    with _above_autograd():
        has_tangent = [t is not None and forward_ad.unpack_dual(t)[1] is not None for t in tensors]
    if any(has_tangent):
        raise NotImplementedError(
            f"{op}: an operand has a tangent, which the op alone, as a graph of torch.compile "
            "calls it, does not carry on: call torch.matmul, F.linear or the module in eager mode"
        )


def _above_autograd():
    """An op runs below autograd, and so does a compiled graph: no tangents are to be seen there."""
    return torch._C._ForceDispatchKeyGuard(
        torch._C._dispatch_tls_local_include_set(),
        torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined),
    )


# Fakes: the same checks, and the shapes, for tracing. They also run where one operand alone is on
# the meta device.


def _fake_spmm(row_offsets, col_indices, values, n, k, x, bias=None):
    m, _ = check_product("spmm", row_offsets, col_indices, values, n, k, x, bias)
    return x.new_empty(m, n)


def _fake_spmm_t(row_offsets, col_indices, values, n, k, dy, bias=None):
    m, _ = check_product("spmm_t", row_offsets, col_indices, values, n, k, dy, bias)
    return dy.new_empty(m, k)


def _fake_sddmm(row_offsets, col_indices, n, k, dy, x):
    _, nnz = check_sddmm(row_offsets, col_indices, n, k, dy, x)
    return x.new_empty(nnz)


_W = "Tensor row_offsets, Tensor col_indices, Tensor values, SymInt n, SymInt k"
_PATTERN = "Tensor row_offsets, Tensor col_indices, SymInt n, SymInt k"

_library = torch.library.Library("sparsekern", "DEF")
for _name, _arguments, _run, _fake in (
    ("spmm", f"{_W}, Tensor x, Tensor? bias=None", run_spmm, _fake_spmm),
    ("spmm_t", f"{_W}, Tensor dy, Tensor? bias=None", run_spmm_t, _fake_spmm_t),
    ("sddmm", f"{_PATTERN}, Tensor dy, Tensor x", run_sddmm, _fake_sddmm),
):
    _library.define(f"{_name}({_arguments}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _run, "CPU")
    _library.impl(_name, _run, "CUDA")
    torch.library.register_fake(f"sparsekern::{_name}", _fake, lib=_library)

# Packed weights (kernels/cuda/choose.py), for inference: no gradient, GPU alone. `layout` names one
# of LAYOUTS, or two with a comma between, `numbers` and `tensors` are what they consist of.


def run_spmm_packed(x, layout, n, k, nnz, numbers, tensors, bias=None):
    packed = _packed(len(x), layout, n, k, nnz, numbers, tensors)
    check_operands(packed, x, bias)
    if forward_ad._current_level >= 0:
        _refuse_tangents("spmm_packed", x, bias)
    return multiply_packed(x, packed, bias)


def prepare_spmm_packed(x, layout, n, k, nnz, numbers, tensors, bias=None) -> object:
    """The prepared call (kernels/steps.py) for all x of this shape [.., K]."""
    steps = Steps(x.device)
    packed = _packed(x.shape[:-1].numel(), layout, n, k, nnz, numbers, tensors)
    return steps.prepared(prepare_packed(steps, x, packed, A, bias))


def _packed(m, layout, n, k, nnz, numbers, tensors) -> Packed:
    """The weight in the layout that runs m tokens."""
    if "," in layout:
        layout, numbers, tensors = form_for(m, layout, n, k, nnz, numbers, tensors)
    return assemble(layout, n, k, nnz, numbers, tensors)


def _fake_spmm_packed(x, layout, n, k, nnz, numbers, tensors, bias=None):
    torch._check(x.shape[1] == k, lambda: f"spmm_packed: expected x [M, {k}], got {tuple(x.shape)}")
    return x.new_empty(x.shape[0], n)


_library.define(
    "spmm_packed(Tensor x, str layout, SymInt n, SymInt k, SymInt nnz, int[] numbers, "
    "Tensor[] tensors, Tensor? bias=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("spmm_packed", run_spmm_packed, "CUDA")
torch.library.register_fake("sparsekern::spmm_packed", _fake_spmm_packed, lib=_library)


# Groups of packed layers (nn/shared.py) ask while torch.compile traces whether x was written to.
# The shape of the result, (number of the trace, version of x), is known there; nobody reads more.

_traces: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # numbers by FakeTensorMode
_numbers = itertools.count()


def _fake_written(x):
    trace = _traces.get(x.fake_mode)
    if trace is None:
        trace = _traces[x.fake_mode] = next(_numbers)
    version = next(_numbers) if x.is_inference() else x._version  # another each time: none is known
    return x.new_empty(trace, version)


_library.define("written(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("written", lambda x: x.new_empty(0, 0), "CompositeExplicitAutograd")
torch.library.register_fake("sparsekern::written", _fake_written, lib=_library)


def run_spmm_e4m3(x8, operand, n, alpha, bias=None):
    TwoOfFourE4m3(n, x8.shape[1], 0, 0, 0, operand).check()
    if x8.dtype is not torch.float8_e4m3fn or x8.device != operand.device:
        raise TypeError(f"x8: expected E4M3 on {operand.device}, got {x8.dtype} on {x8.device}")
    if forward_ad._current_level >= 0:
        _refuse_tangents("spmm_e4m3", x8, bias)
    return multiply_compressed(operand, x8, n, bias, alpha)


def _fake_spmm_e4m3(x8, operand, n, alpha, bias=None):
    return x8.new_empty(x8.shape[0], n, dtype=torch.bfloat16)


# For torch.compile, which puts the cast into what made x: y = alpha x8 W^T + bias.
_library.define(
    "spmm_e4m3(Tensor x8, Tensor operand, SymInt n, float alpha, Tensor? bias=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("spmm_e4m3", run_spmm_e4m3, "CUDA")
torch.library.register_fake("sparsekern::spmm_e4m3", _fake_spmm_e4m3, lib=_library)

# Weights packed for a CPU (kernels/cpu/lanes.py).


def multiply_lanes(x: Tensor, packed: lanes.Lanes, bias: Tensor | None) -> Tensor:
    """spmm_lanes of operands that are checked here."""
    packed.check()
    n, k, dtype = packed.n, packed.k, packed.values.dtype
    for name, t, shape in (("x", x, (*x.shape[:1], k)), ("bias", bias, (n,))):
        if t is not None and not (t.shape == shape and t.dtype is dtype and t.is_cpu):
            raise ValueError(
                f"{name}: expected {dtype} {shape} on a CPU, "
                f"got {t.dtype} {tuple(t.shape)} on {t.device}"
            )
        if t is not None and not (t.is_contiguous() and t.data_ptr() and not t.storage_offset()):
            check_memory("spmm_lanes", **{name: t})
    return lanes.spmm_lanes(x.contiguous(), packed, None if bias is None else bias.contiguous())


def prepare_spmm_lanes(x: Tensor, packed: lanes.Lanes, bias: Tensor | None) -> object:
    """The prepared call (kernels/steps.py) for all x of this shape [.., K], of operands that
    multiply_lanes() took."""
    steps, tokens = Steps(x.device), tuple(x.shape[:-1])
    bias = None if bias is None else bias.contiguous()
    product = lanes.bind(prod(tokens), packed, bias)
    y = steps.call(product, steps.rows(A, tokens, packed.k))
    return steps.prepared(steps.unfolded(y, tokens, packed.n))


def run_spmm_lanes(x, n, k, part_steps, heads, cols, values, bias=None):
    if forward_ad._current_level >= 0:
        _refuse_tangents("spmm_lanes", x, bias)
    return multiply_lanes(x, lanes.Lanes(n, k, part_steps, heads, cols, values), bias)


def _fake_spmm_lanes(x, n, k, part_steps, heads, cols, values, bias=None):
    torch._check(x.shape[1] == k, lambda: f"spmm_lanes: expected x [M, {k}], got {tuple(x.shape)}")
    return x.new_empty(x.shape[0], n)


_library.define(
    "spmm_lanes(Tensor x, SymInt n, SymInt k, Tensor part_steps, Tensor heads, Tensor cols, "
    "Tensor values, Tensor? bias=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("spmm_lanes", run_spmm_lanes, "CPU")
torch.library.register_fake("sparsekern::spmm_lanes", _fake_spmm_lanes, lib=_library)

register_when_imported(FORMULAS)

spmm_lanes_op = torch.ops.sparsekern.spmm_lanes.default
spmm_e4m3 = torch.ops.sparsekern.spmm_e4m3.default
written = torch.ops.sparsekern.written.default
spmm_packed = torch.ops.sparsekern.spmm_packed.default
spmm_op = torch.ops.sparsekern.spmm.default
spmm_t_op = torch.ops.sparsekern.spmm_t.default
sddmm_op = torch.ops.sparsekern.sddmm.default
