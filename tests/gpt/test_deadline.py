"""A training run that is given a deadline."""

from dataclasses import replace

import pytest

from sparsekern.gpt import train
from sparsekern.gpt.config import TrainConfig, resumed_config


def test_a_run_stops_at_its_deadline_and_resumes(monkeypatch, tmp_path):
    (tmp_path / "text.txt").write_text("Some bottles of beer on the wall. " * 200)
    config = TrainConfig(
        data=str(tmp_path / "text.txt"), layers=1, width=32, heads=2, context=16, batch=2, steps=6
    )
    config = replace(config, out=str(tmp_path / "run"), threads=1)
    with pytest.raises(train.OutOfTime, match="stopped at step 0 of 6"):
        train.train(config, deadline=0)
    assert not (tmp_path / "run").exists()
    clock = iter([1, 1, 1, 9, 9])
    with monkeypatch.context() as patch, pytest.raises(train.OutOfTime, match="at step 3 of 6"):
        patch.setattr(train.time, "monotonic", lambda: next(clock))
        train.train(config, deadline=5)
    resumed = train.train(resumed_config({"out": config.out}))
    whole = train.train(replace(config, out=str(tmp_path / "whole")))
    assert resumed["losses"] == whole["losses"]
