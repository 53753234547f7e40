"""Adapters as arrays: specs read off a base, flat vectors, digests and where an adapter fits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedoppu.common.adapters import BOTH, Adapter, AdapterSpec, Factor, Target, initial_adapter
from fedoppu.common.base import read_base
from fedoppu.common.errors import AdapterError, BaseModelError
from fedoppu.common.randomness import Randomness

SPEC = AdapterSpec("beef", (Target("a.q_proj", 6, 4), Target("b.v_proj", 3, 5)), rank=2, alpha=4.0)
SPECS = st.builds(
    lambda sizes, rank: AdapterSpec(
        "beef", tuple(Target(f"m{i}", *size) for i, size in enumerate(sizes)), rank
    ),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4),
    st.integers(1, 3),
)
FACTORS: st.SearchStrategy[tuple[Factor, ...]] = st.sampled_from([("A",), ("B",), ("A", "B")])


def fresh(spec: AdapterSpec = SPEC, seed: int = 0, parent: str | None = None) -> Adapter:
    return initial_adapter(spec, Randomness.from_seed(seed), parent=parent)


@given(SPECS, FACTORS)
def test_flatten_undoes_unflatten(spec: AdapterSpec, factors: tuple[Factor, ...]) -> None:
    vector = np.arange(spec.num_params(factors), dtype=np.float32)
    tensors = spec.unflatten(vector, factors)
    assert {name: tensor.shape for name, tensor in tensors.items()} == spec.shapes(factors)
    assert np.array_equal(spec.flatten(tensors, factors), vector)


@given(SPECS)
def test_the_factors_share_the_parameters_out(spec: AdapterSpec) -> None:
    assert spec.num_params() == spec.num_params(("A",)) + spec.num_params(("B",))
    assert spec.num_params(BOTH) == sum(
        spec.rank * (target.out_features + target.in_features) for target in spec.targets
    )


def test_a_vector_of_another_length_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"must have shape \(36,\), got \(35,\)"):
        SPEC.unflatten(np.zeros(35, np.float32))


def test_changing_an_unflattened_tensor_leaves_the_vector() -> None:
    vector = np.zeros(SPEC.num_params(), np.float32)
    SPEC.unflatten(vector)["a.q_proj.A"][:] = 1.0
    assert not vector.any()


def test_the_scale_is_alpha_over_rank() -> None:
    assert SPEC.scale == 2.0


def test_a_spec_takes_the_named_targets_or_all_linear_layers_but_the_head(tiny_base: Path) -> None:
    facts = read_base(tiny_base)
    some = AdapterSpec.from_base(facts, ("v_proj", "q_proj"), rank=8, alpha=8.0)
    assert [target.name for target in some.targets] == [
        f"model.layers.{layer}.self_attn.{name}"
        for layer in (0, 1)
        for name in ("q_proj", "v_proj")
    ]
    assert (some.targets[1].out_features, some.targets[1].in_features) == (32, 64)
    every = AdapterSpec.from_base(facts, ("all-linear",), rank=8, alpha=8.0)
    assert len(every.targets) == 14
    assert not any("lm_head" in target.name for target in every.targets)


def test_a_target_that_the_base_lacks_is_named_with_those_it_has(tiny_base: Path) -> None:
    with pytest.raises(BaseModelError, match=r"no target module out_proj; it has .*q_proj"):
        AdapterSpec.from_base(read_base(tiny_base), ("q_proj", "out_proj"), rank=8, alpha=8.0)


def test_a_fresh_adapter_is_bounded_in_a_and_zero_in_b() -> None:
    adapter = fresh()
    for target in SPEC.targets:
        a = adapter.tensors[f"{target.name}.A"]
        assert 0 < np.abs(a).max() <= 1 / np.sqrt(target.in_features)
        assert not adapter.tensors[f"{target.name}.B"].any()


def test_a_fresh_adapter_depends_on_its_root_and_key_alone() -> None:
    root = Randomness.from_seed(0)
    assert initial_adapter(SPEC, root, "u").digest() == initial_adapter(SPEC, root, "u").digest()
    assert initial_adapter(SPEC, root, "u").digest() != initial_adapter(SPEC, root, "v").digest()
    assert fresh(seed=0).digest() != fresh(seed=1).digest()
    alone = replace(SPEC, targets=SPEC.targets[1:])
    assert np.array_equal(fresh(alone).tensors["b.v_proj.A"], fresh().tensors["b.v_proj.A"])


def test_the_digest_binds_all_that_an_adapter_is() -> None:
    adapter = fresh()
    name = "b.v_proj.B"
    nudged = adapter.tensors[name].copy()
    nudged[0, 0] = 1e-30
    renamed = replace(SPEC, targets=(Target("a.k_proj", 6, 4), SPEC.targets[1]))
    others = [
        replace(adapter, parent="cafe"),
        replace(adapter, spec=replace(SPEC, base_hash="feed")),
        replace(adapter, spec=replace(SPEC, alpha=8.0)),
        replace(adapter, tensors={**adapter.tensors, name: nudged}),
        Adapter(renamed, {k.replace("q_proj", "k_proj"): v for k, v in adapter.tensors.items()}),
    ]
    digests = {other.digest() for other in others}
    assert len(digests) == len(others)
    assert adapter.digest() not in digests


def test_the_digest_does_not_depend_on_how_the_same_values_are_held() -> None:
    adapter = fresh()
    fortran = {name: np.asfortranarray(tensor) for name, tensor in adapter.tensors.items()}
    assert replace(adapter, tensors=fortran).digest() == adapter.digest()
    assert replace(adapter, spec=replace(SPEC, alpha=4)).digest() == adapter.digest()


def test_an_adapter_fits_its_own_base_and_parent_alone() -> None:
    own = fresh(parent="cafe")
    assert own.require(base_hash="beef", parent="cafe") is own
    with pytest.raises(AdapterError, match="made for base beef, not for feed"):
        own.require(base_hash="feed", parent="cafe")
    with pytest.raises(AdapterError, match="trained on shared adapter cafe, not on dead"):
        own.require(base_hash="beef", parent="dead")
    with pytest.raises(AdapterError, match="trained on shared adapter none, not on cafe"):
        fresh().require(base_hash="beef", parent="cafe")
