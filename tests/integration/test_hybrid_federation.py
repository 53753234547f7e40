"""Whole rounds with the hybrid key exchange: chosen in the config, carried by real messages."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedoppu.client import secagg
from fedoppu.client.dealing import Secrets, deal
from fedoppu.client.release import release
from fedoppu.common.cohort import Cohort
from fedoppu.common.config import FederationConfig, ResearchSettings
from fedoppu.common.pairwise import HYBRID
from fedoppu.common.quantization import decode_sum
from fedoppu.common.signing import Identity, bundle_bytes
from tests.fake_federation import CONFIG, federation, files, made_up
from tests.integration.test_federation import plans_of

CHOSEN: FederationConfig = replace(
    CONFIG, secagg=replace(CONFIG.secagg, key_exchange="hybrid"), rounds=1
)


def test_hybrid_rounds_give_the_exact_mean(tmp_path: Path) -> None:
    made = federation(tmp_path, CHOSEN)
    made.run()
    plan = plans_of(made, 1)
    assert plan.hybrid
    (record,) = made.records
    assert record.survivors is not None
    decoded = []
    for member in record.survivors:
        dither = made.members.randomness.child("member", member)
        words = release(made_up(member, plan), plan, dither)
        decoded.append(decode_sum(words, plan, [member]))
    total = sum(each.total_weight * each.mean_update.astype(np.float64) for each in decoded)
    expected = total / sum(each.total_weight for each in decoded)
    before = made.runtime.initial
    after = made.runtime.checkpoints.load(1).adapter
    spec = made.runtime.initial.spec
    moved = spec.flatten(after.tensors, ("B",)) - spec.flatten(before.tensors, ("B",))
    np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-6)


def test_same_seed_gives_the_same_bytes_though_the_ciphertexts_differ(tmp_path: Path) -> None:
    federation(tmp_path / "a", CHOSEN).run()
    federation(tmp_path / "b", CHOSEN).run()
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_hybrid_rounds_go_on_with_dropouts(tmp_path: Path) -> None:
    config = replace(CHOSEN, rounds=3, cohort=8)
    made = federation(tmp_path, config, members=12, research=ResearchSettings(dropout=0.25))
    made.run()
    assert [record.round for record in made.records] == [1, 2, 3]
    assert any(record.survivors != record.cohort for record in made.records)


def test_dealer_of_a_junk_offer_is_named_and_sits_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its victim drops out with an error of its own; the next attempt is without the dealer."""

    def lie(cohort: Cohort, identity: Identity, secrets: Secrets, *, entropy: Any) -> Any:
        bundle = deal(cohort, identity, secrets, entropy=entropy)
        if identity.member != 3:
            return bundle
        junk = {**bundle.offers, max(cohort.members): bytes(HYBRID.offer_bytes)}
        changed = replace(bundle, offers=junk)
        return replace(changed, signature=identity.sign(bundle_bytes(cohort.scope, changed)))

    monkeypatch.setattr(secagg, "deal", lie)
    made = federation(
        tmp_path, replace(CHOSEN, cohort=8), members=18, tolerate_failures=True, seed=1
    )
    made.run()
    (record,) = made.records
    assert record.attempt == 1
    assert record.liars is not None
    assert record.cohort is not None
    assert record.aborted is not None
    assert "ended in query.unmask: the secrets of members" in record.aborted[0]
    assert record.liars.keys() == {3}
    assert record.liars[3].endswith("another pair secret than it promised")
    assert 3 not in record.cohort
