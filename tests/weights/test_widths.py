"""A checkpoint of a narrower sparse layer does not fit a wider one, though its indices would."""

import io

import pytest
import torch
from torch import nn

from sparsekern import Static
from sparsekern.weights import load_weights, set_weights_


def sparse(k: int) -> nn.Module:
    return Static(0.75).apply(nn.Sequential(nn.Linear(k, 32)))


def saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return file


@pytest.mark.parametrize("is_file", [False, True])
def test_load_state_dict_refuses_another_in_features(is_file):
    small, wide = sparse(16), sparse(64)
    before = {name: t.clone() for name, t in wide.state_dict().items()}
    state = torch.load(saved(small)) if is_file else small.state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for 0.weight: .*in_features 16"):
        wide.load_state_dict(state)
    assert all(torch.equal(t, before[name]) for name, t in wide.state_dict().items())
    assert set(state) == {"0.values", "0.bias", "0.row_offsets", "0.col_indices"}  # no key more
    other = sparse(16)
    other.load_state_dict(state)
    assert torch.equal(other[0].weight.to_dense(), small[0].weight.to_dense())
    wide.load_state_dict(dict(before))  # without what a state_dict knows of modules, as ever


def test_weights_of_a_checkpoint_are_as_wide_as_they_were(tmp_path):
    small, path = sparse(16), tmp_path / "small.pt"
    path.write_bytes(saved(small).read())
    for weights in (load_weights(path), small.state_dict()):
        with pytest.raises(ValueError, match=r"0.weight of shape \(32, 64\), got \(32, 16\)"):
            set_weights_(nn.Sequential(nn.Linear(64, 32)), weights)
        with pytest.raises(ValueError, match=r"0.weight of shape \(32, 64\), got \(32, 16\)"):
            set_weights_(sparse(64), weights)
        same = set_weights_(nn.Sequential(nn.Linear(16, 32)), weights)
        assert torch.equal(same[0].weight.to_dense(), small[0].weight.to_dense())
