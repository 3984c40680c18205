"""One sparse product on a whole wafer: the mapping that is fastest on its mesh.

The tokens are cut over the rows of PEs and, where that leaves many to each, over several groups of
columns side by side. More groups: fewer sums to reduce, more columns of K in each PE.
"""

import math
from functools import lru_cache

from .balance import Mask
from .figures import check_count, check_density, check_kinds
from .inputs import Inputs
from .machine import ACCUMULATOR_BYTES, BYTES_PER_ELEM, Machine
from .mesh import Mesh, MeshCycles, mesh_cycles

COLUMN_GROUPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = "forward", "input gradient", "weight gradient"


def product_cycles(
    machine: Machine,
    inputs: Inputs,
    tokens: int,
    n: int,
    k: int,
    density: float | Mask,
    product: str = FORWARD,
) -> MeshCycles:
    """Cycles of a product with W [n, k]. The input gradient streams the transpose, [k, n]. The
    weight gradient makes a dot of x and dy at each kept place, where the others make an AXPY."""
    if isinstance(density, Mask) and tuple(density.shape) != (n, k):
        raise ValueError(f"density: expected a mask of shape {(n, k)}, got {tuple(density.shape)}")
    if product == INPUT_GRADIENT:
        n, k = k, n
        if isinstance(density, Mask):
            density = density.transposed()
    mask, density = (density, density.density) if isinstance(density, Mask) else (None, density)
    mapping, cycles = _fastest(machine, inputs, tokens, n, k, density, product == WEIGHT_GRADIENT)
    if mask is None:
        return cycles
    # The mapping is chosen by the density, as a compiler would; its time is that of the mask.
    mesh, k_per_col = mapping
    return mesh_cycles(mesh, n, k_per_col, mask)


Mapping = tuple[Mesh, int]  # and the inputs of each of its columns of PEs


@lru_cache(maxsize=20_000)
def _fastest(machine, inputs, tokens, n, k, density, is_gradient) -> tuple[Mapping, MeshCycles]:
    mappings = _mappings(machine, inputs, tokens, k, is_gradient)
    costs = [(mapping, mesh_cycles(mapping[0], n, mapping[1], density)) for mapping in mappings]
    return min(costs, key=lambda cost: cost[1].total)


@lru_cache(maxsize=2_000)
def _mappings(machine, inputs, tokens, k, is_gradient) -> list[Mapping]:
    """One for each number of groups: none depends on the density."""
    cols = int(machine["grid_cols"])
    if inputs.column_groups > cols:
        raise ValueError(f"column_groups: expected at most {cols}, got {inputs.column_groups}")
    given = (inputs.column_groups,) if inputs.column_groups else COLUMN_GROUPS
    return [
        _mapping(machine, inputs, tokens, k, is_gradient, groups)
        for groups in given
        if groups <= cols
    ]


def _mapping(machine, inputs, tokens, k, is_gradient, groups) -> Mapping:
    rows, cols = int(machine["grid_rows"]), int(machine["grid_cols"]) // groups
    k_per_col = math.ceil(k / cols)
    tokens_per_pe = math.ceil(tokens / (rows * groups))

    def vector_cycles(is_dot: bool) -> int:
        rate = machine.axpy_elems_per_cycle(inputs.precision, tokens_per_pe, is_dot)
        return math.ceil(tokens_per_pe / rate)

    # A weight's gradient is a dot product, and is also added to what comes from the row above.
    nonzero_cycles = inputs.axpy_overhead_cycles + vector_cycles(is_gradient) + is_gradient
    room_bytes = inputs.partial_sum_share * machine["sram_bytes_per_pe"]
    mesh = Mesh(
        rows=rows,
        cols=math.ceil(k / k_per_col),
        axpy_cycles=nonzero_cycles / inputs.utilisation,
        add_cycles=vector_cycles(False) / inputs.utilisation,
        send_cycles=math.ceil(tokens_per_pe / machine.wavelet_elems(inputs.precision)),
        window=max(1, int(room_bytes / (ACCUMULATOR_BYTES * tokens_per_pe))),
        hop_cycles=machine["hop_cycles"],
        chain_cycles=machine.chain_cycles,
    )
    return mesh, k_per_col


def stream_bytes(inputs: Inputs, n: int, k: int, density: float) -> float:
    """Bytes of W on the I/O links. index16: value and 16-bit index; bitmap: values, a bit a place;
    best: the smaller one. Never more than all places, zeros too, dropped where they enter."""
    value_bytes = BYTES_PER_ELEM[inputs.precision]
    places = n * k
    index16 = places * density * (value_bytes + 2)
    bitmap = places * (density * value_bytes + 1 / 8)
    dense = places * value_bytes
    return min(
        dense,
        {"best": min(index16, bitmap), "index16": index16, "bitmap": bitmap}[inputs.stream_format],
    )


def offloaded_s(
    machine: Machine, inputs: Inputs, tokens: int, n: int, k: int, density: float | Mask
) -> tuple[float, float]:
    """Seconds of one product that a host asks for: of the wafer, and of the transfers.

    x [tokens, k] and W [n, k] go in, y [tokens, n] comes back, all over the I/O links, and nothing
    overlaps. Raises ValueError, which names the argument."""
    check_kinds(machine=(machine, Machine, "machine(name)"), inputs=(inputs, Inputs, "Inputs()"))
    for name, value in (("tokens", tokens), ("n", n), ("k", k)):
        check_count(name, value)
    density = density if isinstance(density, Mask) else check_density(density)
    kept = density.density if isinstance(density, Mask) else density
    moved_bytes = tokens * (n + k) * BYTES_PER_ELEM[inputs.precision]
    moved_bytes += stream_bytes(inputs, n, k, kept)
    cycles = product_cycles(machine, inputs, tokens, n, k, density).total
    transfer_s = moved_bytes / machine["io_bytes_per_s"] + 2 * machine["stream_latency_s"]
    return cycles / machine["clock_hz"], transfer_s
