"""A cache is compared with its teacher, which finds codes that are wrong under right checksums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from verifying import CODES, look, messages, rewrite_task

from atcache.errors import CacheMismatchError
from atcache.store.reader import CacheReader
from atcache.teachers.load import create_student
from atcache.teachers.names import parse_model_name


def test_a_cache_is_faithful_to_its_teacher(cache, tiny_vit, tiny_weights):
    summary = look(cache, sample=0, teacher=tiny_vit, weights=tiny_weights, teacher_sample=12)
    fidelity, attributes = summary.fidelity, CacheReader(cache).attributes
    assert messages(summary) == []
    assert fidelity is not None
    assert fidelity.num_views == 12
    assert list(fidelity.layer_row_kl_nats) == [0, 1]
    assert 0 < fidelity.row_kl_nats == pytest.approx(np.mean(list(fidelity.layer_row_kl_nats.values())))
    assert fidelity.row_kl_nats <= fidelity.worst_row_kl_nats
    recorded = max(attributes["calibration"]["row_kl_nats"], attributes["complete"]["quality"]["row_kl_nats"]["mean"])
    assert fidelity.row_kl_limit_nats == pytest.approx(max(1.5 * recorded, 1e-6))
    assert 0 < fidelity.injected_error < 0.05


def test_a_lossless_cache_is_not_blamed_for_noise(tiny_cache, tiny_vit, tiny_weights):
    path = tiny_cache(codec="exact:dtype=float32")
    assert CacheReader(path).attributes["calibration"]["row_kl_nats"] < 1e-9
    summary = look(path, sample=0, teacher=tiny_vit, weights=tiny_weights, threshold=1.0)
    assert messages(summary) == []
    assert summary.fidelity is not None
    assert summary.fidelity.row_kl_limit_nats == 1e-6


@pytest.mark.parametrize("damaged", ["all of a task", "one view"])
def test_wrong_codes_under_right_checksums_are_found_by_the_teacher(cache, tiny_vit, tiny_weights, damaged):
    reader = CacheReader(cache)
    wrong = range(48) if damaged == "all of a task" else [25]

    def codes(sample):
        """Those of another sample, where they are to be wrong."""
        return reader.read_codes(1, 20 + (sample - 19) % 20 if sample in wrong else sample)

    rewrite_task(cache, codes=codes)
    assert messages(look(cache, all=True)) == [], "without the teacher nothing tells"
    summary = look(cache, sample=0, teacher=tiny_vit, weights=tiny_weights, teacher_sample=96)
    assert str(cache / CODES) in messages(summary)[0]
    assert "decoded maps are" in messages(summary)[0]
    assert summary.fidelity is not None
    if damaged == "one view":
        assert (summary.fidelity.worst_view, summary.fidelity.worst_sample_key) == (1, "digits-0001.tar/digit-00025")
    loose = look(cache, sample=0, teacher=tiny_vit, weights=tiny_weights, teacher_sample=96, threshold=1e9)
    assert messages(loose) == []


def test_another_teacher_is_refused(cache, tiny_vit, tiny_weights, tmp_path):
    torch.manual_seed(5)
    torch.save(create_student(parse_model_name(tiny_vit), num_classes=10).state_dict(), tmp_path / "other.pth")
    with pytest.raises(
        CacheMismatchError, match=r"has weights of sha256 \w+\.\.\., expected \w+\.\.\.\. Give the --weig"
    ):
        look(cache, teacher=tiny_vit, weights=tmp_path / "other.pth")
    with pytest.raises(CacheMismatchError, match=r"another teacher: num_heads is 2 there and 4 here\. Give the --t"):
        look(cache, teacher=tiny_vit.replace("num_heads=2", "num_heads=4"), weights=tiny_weights)
    with pytest.raises(CacheMismatchError, match=r"another teacher: mean is None there and \(0\.1.* here"):
        look(cache, teacher=f"{tiny_vit},mean=(0.1,0.1,0.1)", weights=tiny_weights)
