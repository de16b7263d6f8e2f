"""The benchmarks' numbers are those of an independent computation, and compressors decode from their bytes alone."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NUM_HELD_BACK = 6


@pytest.fixture
def benchmarks(monkeypatch):
    """The benchmarks' folder importable, as it is when one is run; their use of one thread undone behind it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def maps_LHQK():
    """Maps of random factors: rows from nearly uniform to nearly one-hot."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 3, 20, 20)) * np.array([0.3, 2.0, 8.0])[None, :, None, None]
    maps = np.exp(logits - logits.max(-1, keepdims=True))
    return (maps / maps.sum(-1, keepdims=True)).astype(np.float32)


@pytest.mark.usefixtures("benchmarks")
class TestRateDistortion:
    @pytest.fixture
    def measured(self, tmp_path, tiny_vit, tiny_weights, digits_tars, capsys):
        """The report, its printed text and its folder, from a run as typed."""
        from rate_distortion import main

        common = ["--teacher", tiny_vit, "--weights", str(tiny_weights), "--data", str(digits_tars[0].parent)]
        codecs = ["--codec", "exact:dtype=float32", "--codec", "int8"]
        sizes = ["--views", str(NUM_HELD_BACK), "--calibration-views", "16", "--precision", "fp32"]
        main([*common, *codecs, *sizes, "--out", str(tmp_path)])
        report = json.loads((tmp_path / "rate_distortion.json").read_text())
        return report, capsys.readouterr().out, tmp_path

    def test_its_numbers_are_those_of_an_independent_computation(self, measured, tiny_vit, tiny_weights, digits_tars):
        report, text, folder = measured
        rows = {row["name"]: row for row in report["rows"]}
        assert rows["exact:dtype=float32"]["row_kl_nats"] < 1e-12
        assert rows["exact:dtype=float32"]["injected_error"] < 1e-5
        assert rows["exact:dtype=float32"]["top1_agreement"] == 1
        assert 0 < rows["int8"]["row_kl_nats"] < 0.01
        assert rows["int8"]["row_kl_nats"] < rows["int8"]["row_kl_p99_nats"]

        maps_VLHQK = _maps(tiny_vit, tiny_weights, digits_tars, NUM_HELD_BACK)
        halves = maps_VLHQK.astype(np.float16)
        assert rows["float16 + zstd"]["nbytes_per_view"] == pytest.approx(_zstd_nbytes(halves), abs=1e-9)
        assert report["map_nbytes_per_view"] == halves[0].nbytes
        codes = np.rint(maps_VLHQK * 255)
        decoded = np.maximum(codes / codes.sum(-1, keepdims=True), 2.0**-24).astype(np.float64)
        decoded /= decoded.sum(-1, keepdims=True)
        kl = (maps_VLHQK * np.log(maps_VLHQK / decoded)).sum(-1)
        uint8 = rows["linear uint8 + zstd"]
        assert uint8["row_kl_nats"] == pytest.approx(kl.mean(), rel=1e-4)
        assert uint8["row_kl_p99_nats"] == pytest.approx(np.percentile(kl, 99), rel=1e-4)
        variation = np.abs(maps_VLHQK - decoded).sum(-1).mean() / 2
        assert uint8["total_variation"] == pytest.approx(variation, rel=1e-4)

        assert text.count("\n| ") == len(rows) + 2 + 2  # two heads, and the two codecs beside their rivals
        assert text.strip() == (folder / "rate_distortion.md").read_text().strip()
        assert (folder / "rate_distortion.png").read_bytes().startswith(b"\x89PNG")

    def test_what_is_measured_was_never_fitted_on(self, tiny_vit, tiny_weights, digits_tars, tmp_path):
        from rate_distortion import _parse, _pixels

        from atcache.teachers.load import load_teacher

        where = ["--teacher", "t", "--data", str(digits_tars[0].parent), "--out", str(tmp_path), "--policy", "eval"]
        options = _parse([*where, "--views", "5", "--calibration-views", "43"])
        calibration, held_back = _pixels(load_teacher(tiny_vit, weights=tiny_weights), options)
        fitted_on = {image.numpy().tobytes() for image in calibration}
        assert (len(calibration), len(held_back), len(fitted_on)) == (43, 5, 43)
        assert not fitted_on & {image.numpy().tobytes() for image in held_back}

    def test_top_classes_count_only_where_the_head_came_with_the_weights(self, tiny_vit, tiny_weights, tmp_path):
        from rate_distortion import _has_trained_head

        from atcache.teachers.load import load_teacher
        from atcache.teachers.weights import read_weights

        headless = {name: tensor for name, tensor in read_weights(tiny_weights).items() if "head." not in name}
        torch.save(headless, tmp_path / "headless.pt")
        for weights, expected in ((tiny_weights, True), (tmp_path / "headless.pt", False)):
            assert _has_trained_head(load_teacher(tiny_vit, weights=weights), weights) is expected

    def test_rivals_at_a_codecs_kl_are_interpolated_between_settings(self):
        from rate_distortion import equal_kls, interpolated_nbytes
        from storage_ways import Measured

        names = [field.name for field in fields(Measured)]
        some = Measured(**{**dict.fromkeys(names, 1.0), "name": "codec", "family": "codec", "is_codec": True})
        curve = [
            replace(some, is_codec=False, name=name, family="log", row_kl_nats=kl, nbytes_per_view=nbytes)
            for name, kl, nbytes in (("fine", 1e-4, 1600.0), ("rough", 1e-2, 400.0))
        ]
        assert interpolated_nbytes(curve, 1e-3) == pytest.approx(800)  # half way on both logarithmic axes
        assert interpolated_nbytes(curve, 0.1) == 400
        assert interpolated_nbytes(curve, 1e-5) is None
        codec = replace(some, row_kl_nats=1e-3, nbytes_per_view=100.0)
        (equal,) = equal_kls([codec, *curve])
        assert (equal.rival, equal.rival_setting, equal.times_smaller) == ("log", "fine", pytest.approx(8))


@pytest.mark.usefixtures("benchmarks")
def test_every_compressor_of_maps_gives_rows_that_sum_to_1_and_lossless_ones_the_maps(maps_LHQK):
    from map_compressors import map_compressors

    compressors, missing = map_compressors()
    assert len(compressors) > 20
    assert set(missing) <= {"pcodec", "ZFP"}
    for compressor in compressors:
        decoded = compressor.decode(compressor.encode(maps_LHQK), maps_LHQK.shape)
        assert decoded.dtype == np.float32, compressor.name
        np.testing.assert_allclose(decoded.sum(-1), 1, atol=1e-5, err_msg=compressor.name)
        if compressor.name.startswith("float16 +"):
            np.testing.assert_allclose(decoded, maps_LHQK, atol=6e-8, rtol=2e-3, err_msg=compressor.name)


@pytest.mark.usefixtures("benchmarks")
@pytest.mark.parametrize(("mantissa_bits", "worst"), [(6, 2**-7), (2, 2**-3), (0, 2**-1)])
def test_rounding_a_mantissa_is_off_by_half_of_its_last_bit(maps_LHQK, mantissa_bits, worst):
    from map_compressors import Float16

    normal = np.maximum(maps_LHQK, 2.0**-14)  # below, float16 itself has fewer bits
    (rounded,) = Float16(mantissa_bits).quantise(normal)
    error = np.abs(rounded / normal - 1).max()
    assert worst / 2 < error < worst + 2**-10


@pytest.mark.usefixtures("benchmarks")
def test_top_k_keeps_the_largest(maps_LHQK):
    from map_compressors import TopK

    arrays = TopK(5).quantise(maps_LHQK)
    kept = np.take_along_axis(maps_LHQK, arrays[1].astype(int), -1).sum(-1)
    np.testing.assert_allclose(kept, np.sort(maps_LHQK, -1)[..., -5:].sum(-1), rtol=1e-6)
    shared = TopK(5, share_rest=True).restore(arrays, maps_LHQK.shape)
    np.testing.assert_allclose(np.sort(shared, -1)[..., 15:].sum(-1), kept, atol=2e-3)
    whole = TopK(32)
    np.testing.assert_allclose(whole.restore(whole.quantise(maps_LHQK), maps_LHQK.shape), maps_LHQK, atol=1e-3)


@pytest.mark.usefixtures("benchmarks")
class TestFidelity:
    def test_a_few_steps_from_caches_to_table_and_picture(self, tmp_path, capsys):
        from fidelity import main

        main(["--out", str(tmp_path), "--seeds", "2", "--steps", "2", "--codec", "exact", "--codec", "int8"])
        exact, int8 = json.loads((tmp_path / "fidelity.json").read_text())["results"]
        assert exact["row_kl_nats"] == 0
        assert 0 < int8["row_kl_nats"] < 1e-3
        assert exact["top1"] == pytest.approx(sum(exact["top1_per_seed"]) / 2)
        gaps = [own - other for own, other in zip(int8["top1_per_seed"], exact["top1_per_seed"], strict=True)]
        assert int8["difference"] == pytest.approx(sum(gaps) / 2)
        assert int8["difference_standard_error"] == pytest.approx(abs(gaps[0] - gaps[1]) / 2)
        assert "| int8 |" in capsys.readouterr().out
        assert (tmp_path / "fidelity.png").read_bytes().startswith(b"\x89PNG")

    def test_the_largest_kl_is_below_the_first_that_is_worse(self):
        from fidelity import Accuracy, largest_kl_not_worse

        def accuracy(kl, difference):
            return Accuracy(
                codec="c",
                row_kl_nats=kl,
                nbytes_per_view=1.0,
                top1_per_seed=(80.0, 80.0),
                top1=80.0,
                standard_error=1.0,
                difference=difference,
                difference_standard_error=0.5,
            )

        exact = accuracy(0.0, 0.0)
        fine, rough, lucky = accuracy(0.01, -0.9), accuracy(0.1, -1.1), accuracy(0.2, 0.3)
        assert largest_kl_not_worse([exact, lucky, rough, fine]) == 0.01
        assert largest_kl_not_worse([exact, rough]) is None


@pytest.mark.usefixtures("benchmarks")
class TestTrainStep:
    def test_every_way_is_measured_and_ratios_are_those_of_the_table(self, capsys):
        from train_step import main

        main(["--geometry", "tiny", "--batch-size", "1", "--rounds", "1", "--precision", "fp32", "--modes", "copy"])
        cells = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line[:1] == "|"]
        ms = {(row[0], row[1]): float(row[3]) for row in cells if len(row) == 6 and row[3].isdigit()}
        ways = ["copy, cache int8", "copy, cache transform", "copy, live ours", "copy, live usual"]
        assert list(ms) == [
            *(("-", f"teacher forward {kind}") for kind in ("usual", "ours")),
            *((width, way) for width in ("64", "32") for way in ways),
        ]
        ratios = {(row[0], row[1], row[2]): float(row[3]) for row in cells if len(row) == 5 and "live " in row[2]}
        assert len(ratios) == 8
        for (width, cache, live), ratio in ratios.items():
            mode, codec = cache.split(", ")
            cached_ms, live_ms = ms[width, f"{mode}, cache {codec}"], ms[width, f"{mode}, {live}"]
            assert (live_ms - 1) / (cached_ms + 1) < ratio < (live_ms + 1) / max(0.1, cached_ms - 1)

    def test_products_are_counted_forward_and_backward(self):
        from train_step import count_products

        rows_RC, weights_CN = torch.ones(4, 8), torch.ones(8, 16, requires_grad=True)
        assert count_products(lambda: (rows_RC @ weights_CN).sum().backward()) == 2 * 2 * 4 * 8 * 16

    @pytest.mark.parametrize("mode", ["copy", "distill"])
    def test_the_usual_way_computes_what_ours_does(self, mode):
        from train_step import Bench, parse

        bench = Bench(parse(["--geometry", "tiny", "--batch-size", "2", "--precision", "fp32"]), 197)
        losses = []
        for way in bench.ways(bench.width, [mode]):
            if "live" in way.name:
                torch.manual_seed(0)
                losses.append({name: float(loss) for name, loss in way.step().items()})
        ours, usual = losses
        assert ours == pytest.approx(usual, rel=1e-4)

    def test_peak_memory_is_what_was_alive_at_once(self):
        from train_step import peak_nbytes

        def two_at_once():
            one = torch.ones(2**20)
            del one
            return torch.ones(2**20) + torch.ones(2**20).sum()

        assert peak_nbytes(two_at_once, torch.device("cpu")) == pytest.approx(2 * 2**22, rel=0.01)


@pytest.mark.usefixtures("benchmarks")
class TestTransfer:
    @pytest.fixture
    def arguments(self, tmp_path, tiny_vit, digits_tars):
        """A whole run, as typed, at the smallest size."""
        data = ["--data", str(digits_tars[0].parent), "--val-data", str(digits_tars[0]), "--out", str(tmp_path)]
        data += ["--model", tiny_vit, "--pretrain-steps", "2", "--train-samples", "32", "--val-samples", "16"]
        students = ["--epochs", "1", "--seeds", "2", "--side-seeds", "1", "--main-views", "2", "--views", "1", "2"]
        return [*data, *students, "--codecs", "exact", "--processes", "1"]

    def test_from_images_to_tables_and_picture_and_only_once(self, tmp_path, arguments, capsys):
        from transfer import main

        main(arguments)
        text = capsys.readouterr().out
        students = json.loads((tmp_path / "transfer.json").read_text())["students"]
        main_codec = "transform:target_kl=0.005"
        assert {(*student["way"].values(), len(student["top1_by_seed"])) for student in students} == {
            *((mode, 2, main_codec, False, 2) for mode in ("scratch", "finetune", "copy")),
            ("copy", 2, main_codec, True, 2),
            *(("distill", 2, main_codec, live, 1) for live in (False, True)),
            ("copy", 1, main_codec, False, 1),
            ("copy", 2, "exact", False, 1),
        }
        runs = [json.loads(file.read_text()) for file in tmp_path.glob("runs/**/summary.json")]
        assert len(runs) == 12
        for student in students:
            for seed, top1 in student["top1_by_seed"].items():
                assert any(
                    run["mode"] == student["way"]["mode"]
                    and run["out"].endswith(f"{'-live' * student['way']['live']}-{seed}")
                    and run["validation"]["top1"] == top1
                    for run in runs
                )
        live = json.loads((tmp_path / "runs" / "transform-target_kl-0.005-2" / "copy-live-0" / "run.json").read_text())
        assert live["settings"]["live_teacher"] is True
        assert (tmp_path / "transfer.png").read_bytes().startswith(b"\x89PNG")

        made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("[!t]*/**/*") if path.is_file()}
        main(arguments)
        assert capsys.readouterr().out == text
        assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("[!t]*/**/*") if path.is_file()} == made

    def test_what_is_not_finished_is_not_reported(self, tmp_path, arguments, capsys):
        from transfer import main

        main([*arguments, "--report"])
        assert "scratch" not in capsys.readouterr().out
        assert not (tmp_path / "runs").exists()

    def test_shares_and_differences_are_of_the_seeds_that_both_have(self):
        from transfer import difference, gap_closed, standard_error

        scratch, finetune = {0: 20.0, 1: 30.0, 2: 99.0}, {0: 40.0, 1: 50.0}
        assert gap_closed({0: 35.0, 2: 0.0}, scratch, finetune) == pytest.approx(0.75)
        assert gap_closed({0: 35.0}, finetune, scratch) is None
        assert gap_closed({3: 35.0}, scratch, finetune) is None
        mean, error = difference({0: 1.0, 1: 5.0, 2: 7.0}, {0: 2.0, 1: 3.0})
        assert (mean, error) == (pytest.approx(0.5), pytest.approx(1.5))
        assert difference({0: 1.0}, {0: 2.0}) == (-1.0, None)
        assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(3**-0.5)


def _maps(tiny_vit, tiny_weights, digits_tars, num_views):
    """Maps of the held-back views, formed by hand: shape (view, layer, head, query, key), float32."""
    from rate_distortion import _parse, _pixels

    from atcache.attention.capture import FactorCapture
    from atcache.teachers.load import load_teacher

    teacher = load_teacher(tiny_vit, weights=tiny_weights)
    where = ["--teacher", "t", "--data", str(digits_tars[0].parent), "--out", "o"]
    options = _parse([*where, "--views", str(num_views), "--calibration-views", "16"])
    pixels_NHWC = _pixels(teacher, options)[1].float() / 255
    mean, std = torch.tensor(teacher.input.mean), torch.tensor(teacher.input.std)
    layers = FactorCapture(teacher.model)(((pixels_NHWC - mean) / std).permute(0, 3, 1, 2))
    logits = [layer.q_BHTD @ layer.k_BHTD.mT * layer.scale for layer in layers]
    return torch.stack([torch.softmax(layer, -1) for layer in logits], dim=1).numpy()


def _zstd_nbytes(halves_VLHQK):
    """Bytes a view: both layers in one chunk, which is under 32 KiB, with a checksum and an entry in the index."""
    from numcodecs import zstd

    assert halves_VLHQK[0].nbytes < 2**15
    return np.mean([len(zstd.compress(view, 3)) + 4 + 16 for view in halves_VLHQK])
