"""What a call of a packed weight runs, in words."""

from torch import Tensor

from .choose import assemble, form_for
from .compressed import TwoOfFour, TwoOfFourE4m3
from .few_tokens import launch_of
from .kept import Dense
from .layout import Packed
from .times import measured, nearest_shape, share

Parts = tuple[str, int, int, int, list[int], list[Tensor]]  # as the op spmm_packed gets them


def explain_packed(m: int, parts: Parts) -> str:
    """One line: what is held, and what runs for m tokens."""
    layout, n, k, nnz, numbers, tensors = parts
    name, of_form = (form := form_for(m, *parts))[0], form[1:]
    packed = assemble(name, n, k, nnz, *of_form)
    mb, dense_mb = sum(t.nbytes for t in tensors) / 1e6, 2e-6 * n * k
    held = f"{n} x {k}, {packed.density:.0%} of it stored, held as {layout.replace(',', ' and ')}"
    if packed.row_scales is not None:
        held += ", with a scale for each row,"
    held += f" in {mb:.3g} MB ({mb / max(dense_mb, 1e-9):.2f} of dense)"
    found = share(packed.name, m, n, k, packed.density)
    took = "not measured for so many"
    if found is not None:
        shape = " x ".join(map(str, measured().shapes[nearest_shape(n, k)]))
        took = f"{found:.2f} of the time of the best dense call, as measured near {shape}"
    gpu = measured().machine.partition(",")[0]
    return f"{held}; {m} tokens -> {_how(packed, m)}; {took} ({gpu})"


def _how(packed: Packed, m: int) -> str:
    if isinstance(packed, Dense):
        return "dense: torch.mm of the copy that is kept"
    if isinstance(packed, TwoOfFour | TwoOfFourE4m3):
        return f"{packed.name}: on sparse tensor cores, through cuSPARSELt"
    device = packed.arrived.device
    if device.type != "cuda" and m <= packed.most_tokens:
        return f"{packed.name}, on a GPU"
    launch = launch_of(packed, m, device) if device.type == "cuda" else None
    if launch is None:
        return f"{packed.name}: W is written out for the call, then torch.mm"
    times = -(-m // launch.tokens)
    return f"{packed.name}: {launch.kernel}" + (f", {times} times" if times > 1 else "")
