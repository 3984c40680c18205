"""accelerate_ on a GPU, with its real clock."""

import copy

import pytest
import torch
from torch import nn

from sparsekern import SparseLinear, accelerate_

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("tokens", [1, 16])
def test_a_model_on_a_gpu(tokens):
    model = nn.Sequential(nn.Linear(4096, 4096), nn.GELU(), nn.Linear(4096, 4096))
    model = model.to("cuda", torch.bfloat16)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight *= torch.rand_like(layer.weight) > 0.9
    twin, x = copy.deepcopy(model), torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
    report = accelerate_(model, x)
    print(report)
    assert len(report.layers) == 2 and report.before_s > 0 and report.after_s > 0
    assert all(
        (type(m) is SparseLinear) == row.is_sparse
        for m, row in zip(model[::2], report.layers, strict=True)
    )
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin(x), rtol=0.05, atol=0.05)
