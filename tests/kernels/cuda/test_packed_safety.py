"""Packed weights, and what else is derived from a pattern, given what they cannot take."""

import numpy as np
import pytest
import torch
from test_packed import (
    H200,
    cover_of,
    gather_of,
    needs_library,
    pairs_of,
    random_weight,
    unpack_gather,
)

from sparsekern import SparseTensor, registered
from sparsekern.kernels import derived, table
from sparsekern.kernels.cuda import cover, csr, few_tokens
from sparsekern.kernels.cuda.choose import assemble, pack
from sparsekern.kernels.cuda.cover import CoverLayout
from sparsekern.kernels.cuda.gather import GatherLayout
from sparsekern.kernels.cuda.layout import sort_rows
from sparsekern.kernels.cuda.packs import pack_of
from sparsekern.kernels.cuda.pairs import PairsLayout
from sparsekern.kernels.problem import Problem
from sparsekern.kernels.triton import rows as triton_rows
from sparsekern.nn import PackedLinear

LAYOUTS = {"gather": GatherLayout, "cover": CoverLayout, "pairs": PairsLayout}
KINDS = {"gather": gather_of, "cover": cover_of, "pairs": pairs_of}
kinds = pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=needs_library if k == "cover" else ()) for k in KINDS]
)


@kinds
def test_values_of_another_length_or_type(kind):
    w = random_weight(70, 500, 0.3)
    W = SparseTensor.from_dense(w)
    layout = LAYOUTS[kind](W.row_offsets, W.col_indices, *W.shape)
    packed = layout.fill(W.values)
    before = packed.clone()
    for values in (W.values[:-1], W.values[:1], torch.cat([W.values, W.values[:1]])):
        with pytest.raises(ValueError, match=rf"values: expected shape \({W.nnz},\)"):
            layout.refill_(packed, values)
        with pytest.raises(ValueError, match=rf"values: expected shape \({W.nnz},\)"):
            layout.fill(values)
    for values in (W.values.half(), W.values.float(), W.values.to("meta")):
        with pytest.raises(TypeError, match="values: expected"):
            layout.refill_(packed, values)
    for name, tensor in packed.tensors().items():
        bits = tensor.view(torch.uint8) if tensor.dtype == torch.bfloat16 else tensor
        assert torch.equal(bits, before.tensors()[name].view(bits.dtype)), name


@kinds
def test_parts_that_do_not_fit(kind):
    """Each tensor cut short, of another type, elsewhere; other sizes."""
    packed = KINDS[kind](random_weight(70, 500, 0.3))
    names = list(packed.tensors())
    parts = [packed.n, packed.k, packed.nnz, packed.numbers(), list(packed.tensors().values())]
    assemble(kind, *parts)
    free = {"gather": "values", "cover": "records", "pairs": "words"}[kind]  # its length is free
    for i, name in enumerate(names):
        tensor = parts[4][i]
        bad = [tensor.to("meta"), tensor.double(), tensor[..., None], tensor[..., :-1]]
        bad += [tensor[:-1]] if name != free or kind == "gather" else []
        for part in bad:
            with pytest.raises((TypeError, ValueError), match="expected"):
                assemble(kind, *parts[:4], [*parts[4][:i], part, *parts[4][i + 1 :]])
    for sizes in ((71 + 32, 500), (70, 500 + 256), (-1, 500), (2**31, 500)):
        if kind == "gather" and sizes == (70, 756):
            continue  # nothing in it depends on K
        with pytest.raises(ValueError, match="expected"):
            assemble(kind, *sizes, *parts[2:])
    for wrong in ((1, 2), None):
        with pytest.raises(ValueError, match=f"{kind}: expected . numbers and"):
            numbers = parts[3] if wrong is None else list(wrong)
            assemble(kind, *parts[:3], numbers, parts[4][: 1 if wrong is None else None])
    with pytest.raises(ValueError, match="layout: expected some of gather, .*, got 'x'"):
        assemble("x", *parts)
    if kind == "gather":
        with pytest.raises(ValueError, match="bits: expected 4 or 8, got 5"):
            assemble(kind, *parts[:3], [5], parts[4])


@kinds
def test_the_op_checks_its_operands(kind):
    packed = KINDS[kind](random_weight(70, 500, 0.3))
    parts = [packed.n, packed.k, packed.nnz, packed.numbers(), list(packed.tensors().values())]
    x, bias = torch.randn(3, 500).bfloat16(), torch.zeros(70).bfloat16()
    for bad, name in (
        ((x[:, 1:], None), "x"),
        ((x[0], None), "x"),
        ((x.half(), None), "x"),
        ((x.to("meta"), None), "x"),
        ((x, bias[1:]), "bias"),
        ((x, bias.float()), "bias"),
        ((x, bias[None]), "bias"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
            registered.run_spmm_packed(bad[0], packed.name, *parts, bad[1])


@kinds
def test_no_cast_changes_a_packed_layer(kind):
    """Indices lie in the bits of 16-bit floats: NaNs of many kinds, and others."""
    layer = PackedLinear(KINDS[kind](random_weight(70, 500, 0.3)), torch.randn(70).bfloat16())
    before = {name: t.clone() for name, t in layer.named_buffers()}
    for cast in (layer.half, layer.float, layer.double, layer.bfloat16):
        cast()
        for name, t in layer.named_buffers():
            assert t.dtype == before[name].dtype, name
            assert torch.equal(t.view(torch.uint8), before[name].view(torch.uint8)), name
    with pytest.raises(ValueError, match=r"bias: expected shape \(70,\), got \(69,\)"):
        PackedLinear(KINDS[kind](random_weight(70, 500, 0.3)), torch.zeros(69).bfloat16())


@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_packing_looks_at_the_indices(tokens):
    def weight():
        return SparseTensor.from_dense(random_weight(70, 500, 0.3))

    for name, at, value in (
        ("col_indices", 5, -(10**8)),
        ("col_indices", 5, 10**9),
        ("col_indices", -1, 503),
        ("row_offsets", 3, 2**31 - 1),
    ):
        W = weight()
        getattr(W, name).data[at] = value  # torch does not count it
        with pytest.raises(ValueError, match=name):
            pack(W, tokens)
    W = weight()
    want = pack(W, tokens)
    W.col_indices, W.row_offsets = W.col_indices.long(), W.row_offsets.long()
    wide = torch.stack([W.row_offsets, W.row_offsets], 1)
    W.row_offsets = wide[:, 0]
    for name, part in pack(W, tokens).tensors().items():
        assert torch.equal(part.view(torch.uint8), want.tensors()[name].view(torch.uint8)), name
    with pytest.raises(ValueError, match="weight: .* got a transpose"):
        pack(weight().T, tokens)
    W = weight()
    W.values = W.values[:-1]
    with pytest.raises(ValueError, match="values"):
        pack(W, tokens)


@needs_library
def test_the_cover_of_the_library_is_safe_by_itself():
    W = SparseTensor.from_dense(random_weight(70, 500, 0.3))
    order = sort_rows(W.row_offsets, 70, 128)

    def make(row_offsets=W.row_offsets, col_indices=W.col_indices, order=order):
        parts = row_offsets.data_ptr(), col_indices.data_ptr(), 70, 500, W.nnz, order.data_ptr()
        return cover._C.Cover(*parts, 3, 2)

    def changed(t, at, value):
        t = t.clone()
        t[at] = value
        return t

    make()
    for at, value in ((5, 10**9), (5, -(10**8)), (-1, 500), (0, int(W.col_indices[1]))):
        with pytest.raises(ValueError, match="col_indices"):
            make(col_indices=changed(W.col_indices, at, value))
    for at, value in ((3, 2**31 - 1), (0, 1), (70, 5), (4, -7)):
        with pytest.raises(ValueError, match="row_offsets"):
            make(row_offsets=changed(W.row_offsets, at, value))
    for at, value in ((0, 70), (0, -2), (0, 10**9), (0, int(order[1])), (0, -1)):
        with pytest.raises(ValueError, match="row_order"):
            make(order=changed(order, at, value))
    # What it has read is its own: a change before write() changes nothing.
    own = W.col_indices.clone()
    made = make(col_indices=own)
    own.fill_(10**9)
    places = torch.full((W.nnz,), -1)
    steps, records = torch.zeros(7, dtype=torch.int32), torch.zeros(made.steps, 304).short()
    made.write(steps.data_ptr(), records.data_ptr(), places.data_ptr(), 2)
    assert torch.equal(places, CoverLayout(W.row_offsets, W.col_indices, 70, 500).places)


@pytest.mark.parametrize("layout", [GatherLayout, CoverLayout, PairsLayout])
def test_layouts_take_int32_alone(layout):
    W = SparseTensor.from_dense(random_weight(70, 500, 0.3))
    with pytest.raises(TypeError, match="col_indices: expected torch.int32"):
        layout(W.row_offsets, W.col_indices.long(), 70, 500)
    with pytest.raises(ValueError, match="row_offsets: expected shape .71., got .70."):
        layout(W.row_offsets[:-1], W.col_indices, 70, 500)


def test_packs_tell_tensors_from_addresses():
    """Values that are gone leave their address to others, of the same version."""
    w = random_weight(70, 500, 0.3)
    W = SparseTensor.from_dense(w)
    memory = np.zeros(W.nnz, np.int16)

    def packed():
        values = torch.from_numpy(memory).view(torch.bfloat16)
        pattern = W.row_offsets, W.col_indices
        return pack_of("row", 1, lambda *p: GatherLayout(*p, 70, 500), *pattern, values, 70, 500)

    memory[:] = W.values.view(torch.int16).numpy()
    assert torch.equal(unpack_gather(packed().packed), w)
    memory[:] = (-W.values).view(torch.int16).numpy()
    assert torch.equal(unpack_gather(packed().packed), -w)


def test_derived_things_tell_offsets_from_addresses():
    memory = np.array([0, 2, 2], np.int32)
    col_indices = torch.tensor([0, 3], dtype=torch.int32)

    def derived_offsets():
        offsets = torch.from_numpy(memory)
        return derived.derived("test", offsets, col_indices, 2, 5, lambda o, _: o).tolist()

    assert derived_offsets() == [0, 2, 2]
    memory[1] = 1
    assert derived_offsets() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.half])
def test_products_of_a_nearly_empty_weight(dtype):
    """The rows `csr`, on a CPU; an infinity where nothing is stored reaches nothing."""
    mask = torch.rand(60, 90) < 0.05
    mask[:, 7] = mask[11] = False
    W = SparseTensor.from_dense(torch.randn(60, 90, dtype=dtype), mask)
    w, args = W.to_dense().double(), (W.row_offsets, W.col_indices, W.values, 60, 90)
    x, dy = torch.randn(5, 90, dtype=dtype), torch.randn(5, 60, dtype=dtype)
    bias, bias_t = torch.randn(60, dtype=dtype), torch.randn(90, dtype=dtype)
    tolerance = {"rtol": 0, "atol": {torch.half: 2e-2, torch.float32: 1e-5}.get(dtype, 1e-12)}
    y = csr._spmm(*args, x, bias).double()
    torch.testing.assert_close(y, x.double() @ w.t() + bias, **tolerance)
    dx = csr._spmm_t(*args, dy, bias_t).double()
    torch.testing.assert_close(dx, dy.double() @ w + bias_t, **tolerance)
    dv = csr._sddmm(*args[:2], 60, 90, dy, x).double()
    torch.testing.assert_close(dv, (dy.double().t() @ x.double())[mask], **tolerance)
    x[2, 7] = torch.inf
    dy[3, 11] = torch.nan
    assert torch.equal(csr._spmm(*args, x, bias).double(), y)
    assert torch.equal(csr._spmm_t(*args, dy, bias_t).double(), dx)
    W.col_indices[0] = 90
    with pytest.raises(ValueError, match="col_indices"):
        csr._spmm(*args, x)


def test_offsets_whose_difference_passes_two_to_the_31():
    offsets = torch.tensor([0, 2**31 - 1, -2, 2], dtype=torch.int32)
    columns = torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match="row_offsets: expected not to decrease"):
        SparseTensor(offsets, columns, torch.ones(2), (3, 5))


@pytest.fixture
def gpu(monkeypatch, fresh_table):
    """As far as the table can tell."""
    monkeypatch.setattr(few_tokens.cuda_library, "refusal", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(few_tokens, "gpu_of", lambda device: H200)
    monkeypatch.setattr(few_tokens, "density_limit", lambda *_: None)


@pytest.mark.parametrize(
    "m, n, k, nnz, dtype, row",
    [
        (1, 4096, 4096, 10**6, torch.bfloat16, "few_tokens"),
        (16, 2**30 - 1, 64, 2**30, torch.bfloat16, "few_tokens"),
        (16, 2**30, 64, 2**30, torch.bfloat16, "expand: it takes fewer than"),
        (16, 64, 2**25, 2**22, torch.bfloat16, "expand: it takes fewer than"),
        (64, 2**17, 2**19, 2**30, torch.bfloat16, "expand: its offsets have 32 bits"),
        (64, 2**16, 2**16, 2**10, torch.bfloat16, "csr: W is too empty for pairs"),
        (4, 2**16, 2**16, 2**10, torch.float32, "csr: it takes bfloat16"),
        (1, 2**16, 2**16, 2**10, torch.float16, "few_tokens"),
        (4, 60000, 60000, 5000, torch.float64, "csr: it takes bfloat16"),
        (4, 60000, 60000, 36 * 10**6, torch.float64, "expand: it takes bfloat16"),
        (4, 6000, 6000, 5000, torch.float64, "expand: it takes bfloat16"),
    ],
)
def test_what_32_bits_do_not_count_is_refused(m, n, k, nnz, dtype, row, gpu):
    problem = Problem("spmm", "cuda", dtype, m, n, k, nnz)
    if m == 16 and row == "few_tokens" and not cover.is_built():
        pytest.skip("pairs take more")
    name, _, reason = row.partition(": ")
    assert table.pick(problem).name == name
    assert reason in dict(table.refusals(problem)).get("few_tokens", "")


@pytest.mark.parametrize("row", ["expand", "dense"])
def test_products_without_the_library(row, monkeypatch):
    """Of torch's own indexing; test_gpu_safety.py has the writes that nobody counts."""
    monkeypatch.setattr(few_tokens.cuda_library, "refusal", lambda: "none here")
    monkeypatch.setattr(triton_rows, "can_mend", lambda dtype: False)
    W = SparseTensor.from_dense(random_weight(40, 90, 0.3).half())
    x, dy = torch.randn(5, 90).half(), torch.randn(5, 40).half()
    pattern, sizes = (W.row_offsets, W.col_indices), (40, 90)
    rows = {r.op: r.run for r in table.KERNELS if r.name == row and r.device in ("cuda", None)}
    operands = {"spmm": (W.values, *sizes, x), "spmm_t": (W.values, *sizes, dy)}
    operands["sddmm"] = *sizes, dy, x

    def products():
        return [rows[op](*pattern, *operands[op]) for op in operands]

    want = products()
    w = W.to_dense().float()
    torch.testing.assert_close(want[0].float(), x.float() @ w.t(), rtol=2e-3, atol=2e-3)
    before = W.col_indices.clone()
    for value in (10**9, -3, 93):
        W.col_indices[7] = value
        for op in operands:
            with pytest.raises(ValueError, match="col_indices"):
                rows[op](*pattern, *operands[op])
        W.col_indices.copy_(before)
        assert all(map(torch.equal, products(), want))
    with pytest.raises(TypeError, match="col_indices: expected torch.int32"):
        rows["spmm"](W.row_offsets, W.col_indices.long(), W.values, *sizes, x)


def test_what_is_made_in_inference_mode_can_be_refilled():
    W = SparseTensor.from_dense(random_weight(40, 90, 0.3))

    def packed(values):
        pattern = W.row_offsets, W.col_indices
        sizes = 40, 90
        make = lambda *indices: GatherLayout(*indices, *sizes)  # noqa: E731
        return unpack_gather(pack_of("row", 1, make, *pattern, values, *sizes).packed)

    with torch.inference_mode():
        assert torch.equal(packed(W.values), W.to_dense())
    assert torch.equal(packed(2 * W.values), 2 * W.to_dense())
    with torch.inference_mode():
        assert torch.equal(packed(3 * W.values), 3 * W.to_dense())
