"""Mistakes in a sparsity config: one clear error that names file and key, before any work."""

import json
import math

import pytest
from tiny import training  # noqa: F401

from sparsekern.cli import main
from sparsekern.sparsity import SET, configure, load_config

pytest.importorskip("yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsty": 0.5}, "'sparsty'; did you mean 'sparsity'?"),
        ({"sparsty": 0.5, "algorithm": "set"}, "'sparsty'; did you mean 'sparsity'?"),
        ({"algorithm": "set"}, "a block needs the key 'sparsity', got ['algorithm']"),
        ({"sparsity": 0.5, "algorithm": "set", "updte": {}}, "'updte'; did you mean 'update'?"),
        (
            {"sparsity": 0.5, "algoritm": "rigl"},
            "'algoritm' is no key of a block; did you mean 'algorithm'?",
        ),
        ({"sparsity": 0.5, "algorithm": "rigll"}, "'rigll'; did you mean 'rigl'?"),
        ({"sparsity": 0.5, "init_method": "rndom"}, "'rndom'; did you mean 'random'?"),
        (
            {"sparsity": 0.5, "algorithm": "set", "update": {"freqency": 3}},
            "'freqency'; did you mean 'freq'?",
        ),
        (
            {"sparsity": {"type": "cosin", "init": 1, "half_period": 2}, "algorithm": "gmp"},
            "'cosin'; did you mean 'cosine'?",
        ),
        (
            {"sparsity": {"type": "cosine", "init": 1, "halfperiod": 2}, "algorithm": "gmp"},
            "'halfperiod'; did you mean 'half_period'?",
        ),
        ({"groups": [{"params": {"sparsty": 0.5}}]}, "'sparsty'; did you mean 'sparsity'?"),
        ({"groups": [], "sparsity": 0.5}, "groups: expected no other settings beside it"),
        ([{"sparsity": 0.5}, 0.5], "expected a list of blocks, got 0.5 at 1"),
        ([{"sparsity": None}], "expected a block with one sparsity at 0"),
        ({"sparsity": 0.75, "algorithm": "gmp"}, "type: cubic, init: 0.0, final: 0.75"),
        ({"sparsity": {"init": 0, "end": 1, "steps": 9}, "algorithm": "gmp"}, "type: cubic"),
        ({"sparsity": [0.1, 0.2]}, "Static chooses its pattern once, expected a number"),
        ({"sparsity": [0.5, 75], "algorithm": "gmp"}, "expected a number in [0, 1], got 75"),
        ({"sparsity": 75}, "got 75; 75 percent is 0.75"),
        (
            {"sparsity": 1.0},
            "sparsity: expected a number below 1, got 1.0: no weight would be left",
        ),
        ({"sparsity": 1, "algorithm": "rigl"}, "sparsity: expected a number below 1, got 1"),
        ({"sparsity": 1, "algorithm": "iterative"}, "sparsity: expected a number below 1, got 1"),
        (
            {"sparsity": 0.5, "algorithm": "magnitude", "init_method": "random"},
            "init_method: Magnitude has a rule of its own for what is kept",
        ),
        ({"sparsity": 0.5, "algorithm": "wanda"}, "use `sparsekern prune --method wanda`"),
        ({"sparsity": 0.5, "algorithm": "SparseGPT"}, "use `sparsekern prune --method sparsegpt`"),
        ({"sparsity": 0.5, "seed": "x"}, "seed: expected a whole number, got 'x'"),
        ({"sparsity": 0.5, "seed": math.nan}, "seed: expected a whole number, got nan"),
        ({"sparsity": 0.5, "param_filter": 3}, "param_filter: expected a glob or a list of globs"),
        ({"sparsity": 0.5, "param_filter": [["a"]]}, "param_filter: expected a glob or a list"),
        ({"sparsity": 0.5, "param_name_patterns": "("}, "param_name_patterns: '(' is none"),
        ({"sparsity": 0.5, 3: 4}, "expected names of settings, got 3"),
        ({"sparsity": "1e-1"}, "sparsity: expected a number, a list of numbers or"),
        ({"sparsity": True}, "sparsity: expected a number, a list of numbers or"),
        (
            {"sparsity": {"type": "linear", "init": 0.0, "slope": "1e-5"}, "algorithm": "gmp"},
            "slope: expected a finite number, got '1e-5'; YAML reads an exponent",
        ),
        (
            {"sparsity": 0.5, "algorithm": "rigl", "balance_in_groups": 2, "balance_out_groups": 2},
            "balance_in_groups, balance_out_groups: expected one",
        ),
    ],
)
def test_mistakes_name_the_key_and_the_nearest(settings, message):
    with pytest.raises(ValueError) as error:
        configure(settings)
    assert message in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, 2.5, -3, 0, 10**400, "3", True, [3]])
@pytest.mark.parametrize("key", ["freq", "start", "stop", "steps"])
def test_counts_are_whole_and_finite(key, value):
    if (key, value) == ("start", 0):
        return
    value = [value] if key == "steps" else value
    if value == [0]:
        return
    with pytest.raises(ValueError, match=f"update: {key}: expected .*, got"):
        SET(0.5, update={key: value})


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"drop_fraction": {"type": "linear", "init": 0.3, "slope": -0.1}}, "drop_.* at step 4"),
        ({"drop_fraction": {"type": "exp", "init": 0.3, "gamma": 500.0}}, "finite .* at step 2"),
        (
            {"sparsity": {"type": "power", "init": 0.5, "beta": 1.0e200}},
            "sparsity: expected a finite number, got .* at step 2",
        ),
    ],
)
def test_what_can_be_known_is_said_before_the_first_step(
    training,  # noqa: F811
    tmp_path,
    capsys,
    block,
    message,
):
    path = tmp_path / "a.json"
    path.write_text(
        json.dumps({"sparsity": 0.5, "algorithm": "set", "update": {"freq": 2}} | block)
    )
    algorithm = configure(load_config(path))
    with pytest.raises(ValueError, match=message):
        algorithm.check(9)
    assert main([*training, "--steps=9", f"--sparsity-config={path}"]) == 2
    assert f"sparsekern: error: {path}: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    "text",
    [
        "sparsity: {sparsity: 0.5, param_filter: *a9}",
        "sparsity: {sparsity: *a9}",
        "sparsity: {sparsity: 0.5, algorithm: *a9}",
        "sparsity: {sparsity: 0.5, seed: *a9}",
        "sparsity: {sparsity: 0.5, init_method: *a9}",
        "sparsity: {sparsity: 0.5, algorithm: set, update: *a9}",
        "sparsity: {sparsity: 0.5, algorithm: set, update: {steps: *a9}}",
        "sparsity: {sparsity: 0.5, algorithm: set, drop_fraction: {type: *a9}}",
        "sparsity: {sparsity: 0.5, groups: *a9}",
        "sparsity: {sparsity: 0.5, param_name_patterns: *a9}",
        "sparsity: *a9",
        "trainer: {init: {sparsity: *a9}}",
    ],
)
def test_an_error_never_writes_an_unbounded_value(tmp_path, text):
    path = tmp_path / "bomb.yaml"
    path.write_text(f"{BOMB}{text}\n")
    with pytest.raises(ValueError) as error:
        configure(load_config(path))
    assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[" * 100_000, "is nested too deep"),
        ("a.yaml", b"[" * 5_000, "is nested too deep"),
        ("a.json", b"{", "is not JSON"),
        ("a.json", b'{"sparsity": 0.5, "sparsity": 0.6}', "is not JSON: the key 'sparsity' stands"),
        ("a.yaml", b"sparsity: 0.5\nsparsity: 0.6\n", "is not YAML: the key 'sparsity' stands tw"),
        ("a.yaml", b"sparsity: [", "is not YAML"),
        ("a.yaml", b"sparsity: !!int ''", "is not YAML"),
        ("a.yaml", b"sparsity: 2020-13-45", "is not YAML"),
        ("a.yaml", b"!!python/object/apply:os.system [x]", "is not YAML"),
        ("a.yaml", b"\xff\xfe\x00", "is not text in UTF-8"),
        ("a.yaml", b"", "is empty"),
        ("a.yaml", b"# nothing\n", "is empty"),
        ("a.yaml", b"pruning:\n - !GMPruningModifier {final_sparsity: 0.8}\n", "recipe.*GMPrun"),
        (
            "a.yaml",
            b"sparsity_stage:\n  sparsity_modifiers:\n    SparseGPTModifier: {sparsity: 0.5}\n",
            "recipe or config of SparseML, llm-compressor .*SparseGPTModifier.*sparsekern prune",
        ),
        ("a.json", b'{"quantization_config": {"format": "dense"}}', "quantization_config"),
        (
            "a.yaml",
            b"trainer: {init: {sparsty: {sparsity: 0.5}}}",
            "'sparsty' in trainer.init; d",
        ),
        ("a.yaml", b"sparsitty: {sparsity: 0.5}\nmodel: {}", "'sparsitty' in the file; did you"),
        ("a.yaml", b"model: {sparsty: 0.5}", "'sparsty' in model; did you mean 'sparsity'"),
        ("a.yaml", b"trainer: [1]", "expected settings in trainer, got"),
    ],
)
def test_files_that_are_none(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"sparsity config: .*{message}") as error:
        load_config(path)
    assert str(path) in str(error.value) and len(str(error.value)) < 900


def test_yaml_of_today_still_reads(tmp_path):
    """Merge keys and references, which the check for repeated keys must let through."""
    (tmp_path / "a.yaml").write_text(
        "base: &base {sparsity: 0.5, algorithm: set}\n"
        "sparsity:\n  - {<<: *base, param_filter: 'up*', seed: 1}\n  - <<: *base\n    seed: 2\n"
    )
    made = configure(load_config(tmp_path / "a.yaml"))
    assert [(type(a), a.seed) for a in made.algorithms] == [(SET, 1), (SET, 2)]
