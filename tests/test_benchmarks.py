"""The benchmarks' numbers are those of an independent computation, and compressors decode from their bytes alone."""

from __future__ import annotations

import itertools
import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builds import picture, write_tar

from atcache.pipelines.train.config import TrainConfig

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SIZES = ["--samples-fit", "8", "--samples-measured", "3", "--crops", "2"]
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
        main([*common, *codecs, *SIZES, "--precision", "fp32", "--out", str(tmp_path)])
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

        maps_VLHQK = _maps(tiny_vit, tiny_weights, digits_tars)
        assert len(maps_VLHQK) == NUM_HELD_BACK
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

        rivals = [row for row in report["rows"] if row["kind"] == "factors"]
        # Three heads, all ways, the costs of those that store factors, and two codecs beside two rivals.
        assert text.count("\n| ") == 3 + len(rows) + 2 + len(rivals) + 2 * 2
        assert text.strip() == (folder / "rate_distortion.md").read_text().strip()
        assert (folder / "rate_distortion.png").read_bytes().startswith(b"\x89PNG")

    def test_costs_are_those_counted_by_hand(self, measured):
        report, text, _ = measured
        tokens, width, values = 17, 32, 2 * 2 * 2 * 16  # 2 layers, q and k, 2 heads of 16
        blocks = 2 * (12 * tokens * width**2 + 2 * tokens**2 * width)
        assert report["teacher_macs_per_view"] == 16 * 12 * width + blocks + 10 * width
        for row in report["rows"]:
            if row["kind"] == "factors":
                num_components, rest = divmod(row["decode_macs_per_view"], tokens * values)
                assert rest == 0
                assert (
                    row["state_nbytes"] == 4 * (values + num_components * values + 2 * num_components) + num_components
                )
                share = row["decode_macs_per_view"] / report["teacher_macs_per_view"]
                ratio = row["decode_ms"] / row["teacher_forward_ms"]
                assert f"| {ratio:.2g} | {share:.2g} | {row['state_nbytes'] / 1e6:.3g} | {row['fit_s']:.3g} |" in text
        assert row["kind"] == "maps"
        assert (row["decode_macs_per_view"], row["state_nbytes"], row["fit_s"]) == (None, 0, 0)

    def test_what_is_measured_was_never_fitted_on(self, tiny_vit, tiny_weights, digits_tars, tmp_path):
        from rate_distortion import _pixels, parse

        from atcache.teachers.load import load_teacher

        teacher = load_teacher(tiny_vit, weights=tiny_weights)
        where = ["--teacher", "t", "--data", str(digits_tars[0].parent), "--out", str(tmp_path)]
        where += ["--samples-fit", "43", "--samples-measured", "5"]
        calibration, held_back = _pixels(teacher, parse([*where, "--policy", "eval", "--crops", "1"]))
        fitted_on = {image.numpy().tobytes() for image in calibration}
        assert (len(calibration), len(held_back), len(fitted_on)) == (43, 5, 43)
        assert not fitted_on & {image.numpy().tobytes() for image in held_back}

        # Crops are more views of the same samples.
        for once, crops in zip(*(_pixels(teacher, parse([*where, "--crops", n])) for n in ("1", "3")), strict=True):
            assert torch.equal(crops[::3], once)
            assert len({image.numpy().tobytes() for image in crops}) > 2 * len(once)

    def test_views_that_would_all_be_alike_are_refused(self, capsys):
        from rate_distortion import parse

        with pytest.raises(SystemExit):
            parse(["--teacher", "t", "--data", "d", "--out", "o", "--policy", "eval"])
        assert (
            "--policy eval draws the same view of a sample every time: use it with --crops 1" in capsys.readouterr().err
        )

    def test_top_classes_count_only_where_the_head_came_with_the_weights(self, tiny_vit, tiny_weights, tmp_path):
        from rate_distortion import _has_trained_head

        from atcache.teachers.load import load_teacher
        from atcache.teachers.weight_files import read_weights

        headless = {name: tensor for name, tensor in read_weights(tiny_weights).items() if "head." not in name}
        torch.save(headless, tmp_path / "headless.pt")
        for weights, expected in ((tiny_weights, True), (tmp_path / "headless.pt", False)):
            assert _has_trained_head(load_teacher(tiny_vit, weights=weights), weights) is expected

    def test_rivals_at_a_codecs_kl_are_interpolated_between_settings(self):
        from equal_kl import MAPS, equal_kl_table, equal_kls, interpolated_nbytes
        from storage_ways import Measured

        names = [field.name for field in fields(Measured)]
        some = Measured(**{**dict.fromkeys(names, 1.0), "name": "codec", "family": "codec", "kind": "codec"})
        curve = [
            replace(some, kind="maps", name=name, family="log", row_kl_nats=kl, nbytes_per_view=nbytes)
            for name, kl, nbytes in (("fine", 1e-4, 1600.0), ("rough", 1e-2, 400.0))
        ]
        assert interpolated_nbytes(curve, 1e-3) == pytest.approx(800)  # half way on both logarithmic axes
        assert interpolated_nbytes(curve, 0.1) == 400
        assert interpolated_nbytes(curve, 1e-5) is None
        codec = replace(some, row_kl_nats=1e-3, nbytes_per_view=100.0)
        (equal,) = equal_kls([codec, *curve])
        assert (equal.rival, equal.family, equal.setting, equal.times_smaller) == (
            MAPS,
            "log",
            "fine",
            pytest.approx(8),
        )

        # Rivals that store factors are compared each for itself, not only the smallest of all.
        factors = [replace(row, kind="factors", family="PCA", nbytes_per_view=row.nbytes_per_view / 2) for row in curve]
        closer = replace(codec, name="closer", row_kl_nats=1e-5)
        equals = equal_kls([codec, closer, *curve, *factors])
        assert [(equal.codec, equal.rival, equal.times_smaller) for equal in equals] == [
            ("codec", MAPS, pytest.approx(8)),
            ("codec", "PCA", pytest.approx(4)),
            ("closer", MAPS, None),
            ("closer", "PCA", None),
        ]
        assert "PCA's bytes over a codec's at the same KL: codec (KL 0.001) 4.00x." in equal_kl_table(equals)


@pytest.mark.usefixtures("benchmarks")
class TestKvtc:
    @pytest.fixture
    def ways_and_layers(self, tiny_vit, tiny_weights, digits_tars):
        """KVTC at all its settings, fitted to the tiny teacher; and the teacher's factors of views held back."""
        from kvtc import kvtc_ways
        from rate_distortion import _pixels, parse

        from atcache.attention.capture import FactorCapture, check_capture
        from atcache.teachers.load import load_teacher
        from atcache.teachers.run import TeacherRun

        teacher = load_teacher(tiny_vit, weights=tiny_weights)
        run = TeacherRun(teacher=teacher, device=torch.device("cpu"), dtype=torch.float32)
        options = parse(["--teacher", "t", "--data", str(digits_tars[0].parent), "--out", "o", "--samples-fit", "30"])
        calibration, held_back = _pixels(teacher, options)
        check = check_capture(teacher.model, run.images(calibration[:2]))
        return kvtc_ways(run, check, calibration), run.factors(FactorCapture(teacher.model), held_back)

    def test_more_bits_give_smaller_errors_and_more_bytes(self, ways_and_layers):
        from kvtc import side_by_side

        from atcache.codecs.fidelity import row_kl

        ways, layers = ways_and_layers
        errors, kls, nbytes = [], [], []
        for way in ways:
            stored = way.encode(way.prepare(layers))
            decoded = way.decode(stored)
            errors.append(float((side_by_side(decoded) - side_by_side(layers)).square().sum()))
            kls.append(np.mean([row_kl(own, back).mean() for own, back in zip(layers, decoded, strict=True)]))
            nbytes.append(sum(way.chunk_nbytes(parts) for chunks in stored for parts in chunks) / len(stored))
            assert nbytes[-1] == np.mean([len(part) + 4 + 16 for ((part,),) in stored])
        assert len(ways) > 4
        assert errors == sorted(errors)
        assert kls == sorted(kls)
        assert nbytes == sorted(nbytes, reverse=True)
        assert kls[0] < 0.005
        assert kls[-1] > 0.1

    def test_bytes_of_a_view_do_not_depend_on_its_batch(self, ways_and_layers):
        (_, way, *_), layers = ways_and_layers
        together = way.encode(layers)
        alone = way.encode([layer.select(slice(2, 3)) for layer in layers])
        assert alone == together[2:3]
        np.testing.assert_allclose(way.decode(alone)[1].q_BHTD, way.decode(together)[1].q_BHTD[2:3], atol=1e-5)

    def test_factors_come_back_from_side_by_side(self, ways_and_layers):
        from kvtc import apart, side_by_side

        ways, layers = ways_and_layers
        for own, back in zip(layers, apart(side_by_side(layers), ways[0]._check), strict=True):
            assert torch.equal(own.q_BHTD, back.q_BHTD)
            assert torch.equal(own.k_BHTD, back.k_BHTD)
            assert own.scale == back.scale


@pytest.mark.usefixtures("benchmarks")
def test_bits_by_dynamic_programming_are_the_best_of_all_allocations():
    from kvtc import allocate, best_choices

    rng = np.random.default_rng(0)
    error_CW = rng.random((4, 4)) * 4.0 ** -np.arange(4) * rng.random((4, 1))  # need not fall with every bit
    choice_CR = best_choices(error_CW, 14)
    for budget in range(15):
        every = (np.array(bits) for bits in itertools.product(range(4), repeat=4) if sum(bits) <= budget)
        least = min(error_CW[range(4), bits].sum() for bits in every)
        bits_C = allocate(choice_CR, budget)
        assert bits_C.sum() <= budget
        assert error_CW[range(4), bits_C].sum() == pytest.approx(least, rel=1e-12)


@pytest.mark.usefixtures("benchmarks")
def test_packed_bits_are_the_codes_bits_and_come_back():
    from kvtc import pack, unpack

    # 1, 0, 1 in one bit each and 3, 1, 2 in two: 101 11 01 10, filled up with zeros.
    assert pack(np.array([[1, 0, 1], [3, 1, 2]], np.uint8), np.array([1, 2])) == bytes([0b10111011, 0])
    rng = np.random.default_rng(0)
    bits_C = np.array([8, 8, 5, 3, 3, 1])
    codes_CT = (rng.integers(0, 256, (6, 17)) % 2 ** bits_C[:, None]).astype(np.uint8)
    data = pack(codes_CT, bits_C)
    assert len(data) == -(-bits_C.sum() * 17 // 8)
    np.testing.assert_array_equal(unpack(data, bits_C, 17), codes_CT)


@pytest.mark.usefixtures("benchmarks")
def test_quantisers_are_nearly_the_best_uniform_ones_of_a_gaussian():
    from kvtc import fit_quantisers, from_codes, to_codes

    values_NC = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0])
    low_CW, step_CW, error_CW = fit_quantisers(values_NC)
    # J. Max, Quantizing for minimum distortion, 1960, table II: mean squared errors of 1 to 5 bits.
    best_W = torch.tensor([1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.00349], dtype=torch.float64)
    relative_CW = error_CW[:, :6] / 20_000 / torch.tensor([[1.0], [25.0]]) / best_W
    assert relative_CW.min() > 0.95
    assert relative_CW.max() < 1.08
    low_C, step_C = low_CW[:, 3], step_CW[:, 3]
    errors_NC = from_codes(to_codes(values_NC, low_C, step_C, 7), low_C, step_C) - values_NC
    torch.testing.assert_close(errors_NC.double().square().sum(0), error_CW[:, 3], rtol=1e-5, atol=0)


@pytest.mark.usefixtures("benchmarks")
def test_principal_components_are_those_of_the_covariance():
    from kvtc import principal_components

    generator = torch.Generator().manual_seed(0)
    rows_NP = (
        torch.randn(200, 6, generator=generator) * 2.0 ** -torch.arange(6) @ torch.randn(6, 6, generator=generator)
    )
    rows_NP -= rows_NP.mean(0)
    random_state = torch.get_rng_state()
    basis_CP = principal_components(rows_NP)
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.testing.assert_close(basis_CP @ basis_CP.mT, torch.eye(6), atol=1e-5, rtol=0)
    variances = np.linalg.eigvalsh(np.cov(rows_NP.numpy().T))[::-1]
    np.testing.assert_allclose((rows_NP @ basis_CP.mT).var(0), variances, rtol=1e-3)


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


def _maps(tiny_vit, tiny_weights, digits_tars):
    """Maps of the held-back views, formed by hand: shape (view, layer, head, query, key), float32."""
    from rate_distortion import _pixels, parse

    from atcache.attention.capture import FactorCapture
    from atcache.teachers.load import load_teacher

    teacher = load_teacher(tiny_vit, weights=tiny_weights)
    where = ["--teacher", "t", "--data", str(digits_tars[0].parent), "--out", "o"]
    options = parse([*where, *SIZES])
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


@pytest.mark.usefixtures("benchmarks")
class TestBuildSpeed:
    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_build_is_compared_with_both_limits(self, workers, tiny_vit, tiny_weights, digits_tars, tmp_path):
        from build_speed import SpeedOptions, measure_speed

        options = SpeedOptions(
            teacher=tiny_vit,
            data=str(digits_tars[0].parent),
            weights=tiny_weights,
            codec=["int8"],
            samples=48,
            rounds=9,
            limit_s=0,
            batch_size=8,
            samples_per_shard=20,
            workers=workers,
            device="cpu",
        )
        *ways, stages = measure_speed(options)
        row = {row["what"]: row for row in ways}
        assert set(row) == {"forward", "render", "loader", "plain", "int8"}
        build = row["int8"]
        assert build["share_of_limit"] == max(build["share_of_forward"], build["share_of_render"])
        assert 0 < build["device_busy"] < 1
        of_clock = build["views_per_s"] / row["forward"]["views_per_s"]
        assert build["share_of_forward"] == pytest.approx(of_clock, rel=0.1), "one round, as there was no time for more"
        assert {"render images", "encode", "compress"} < set(stages["ms_a_view"])

    def test_handing_over_made_images_is_measured_beside_making_them(self):
        from build_speed import measure_loader

        row = measure_loader(1, batch_size=2, num_batches=6, rounds=1)
        assert row["made_us_a_view"] > 0
        assert row["loaded_us_a_view"] > 0


@pytest.mark.usefixtures("benchmarks")
class TestTrainRun:
    def test_a_run_is_timed_beside_its_step_without_its_start(self, tiny_cache, tmp_path):
        from train_run import finished_speed, measure_run

        config = TrainConfig(
            mode="copy", cache=tiny_cache(), out=tmp_path, batch_size=8, device="cpu", precision="fp32"
        )
        found = measure_run(config, limit_s=0.01)
        assert (found.num_steps, found.busy) == (50, None)
        assert found == finished_speed(replace(config, out=tmp_path / "timed"), found.step_img_per_s)

    def test_speed_and_waiting_are_those_behind_the_start(self, tmp_path):
        from train_run import finished_speed

        # The first 20 steps of 8 took 16 s, of which 12 s were waiting; the other 40 steps took 4 s and waited 1 s.
        rows = [(20, 160 / 16, 12 / 16), (30, 240 / 17, 12.25 / 17), (60, 480 / 20, 13 / 20)]
        lines = [
            json.dumps({"kind": "train", "step": step, "img_per_s": img_per_s, "waited_for_data": waited})
            for step, img_per_s, waited in rows
        ]
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        config = TrainConfig(mode="copy", cache="c.zarr", out=tmp_path, batch_size=8)
        found = finished_speed(config, step_img_per_s=160.0)
        assert (found.num_steps, found.run_img_per_s) == (60, pytest.approx(80))
        assert (found.share, found.waiting, found.other) == (0.5, pytest.approx(0.25), pytest.approx(0.25))

    def test_images_that_take_long_to_decode_are_waited_for(self, tiny_vit, tmp_path):
        from train_run import measure_run

        tar = write_tar(tmp_path / "large.tar", [{"jpg": picture(seed, side=700), "cls": b"1"} for seed in range(4)])
        slow = {"data": str(tar), "student": tiny_vit, "num_classes": 2, "keep_mib": 0}
        config = TrainConfig(mode="scratch", out=tmp_path / "run", batch_size=4, device="cpu", precision="fp32", **slow)
        # 4 images of half a megapixel beside a step of 17 tokens: decoding takes several times as long on any machine.
        assert measure_run(config, limit_s=0.01).waiting > 0.5
