"""Every codec keeps the contract; each says how exact it is."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from made_factors import decode, make_factors, make_geometry, mean_row_kl

from atcache.attention.factors import LayerFactors, LayerMaps
from atcache.codecs.fidelity import relative_error, row_kl
from atcache.codecs.registry import codec_from_json, parse_codec
from atcache.errors import CodecError

CODEC_NAMES = ["exact", "exact:dtype=float32", "int8", "logmap", "logmap:bits=8", "transform"]
# Mean row KL a codec may lose on standard normal factors of head dim 64, in nats.
KL_BOUND = {"exact": 1e-6, "exact:dtype=float32": 1e-12, "int8": 1e-3, "logmap": 2e-3, "logmap:bits=8": 1e-4}
KL_BOUND["transform"] = 0.005

# Codecs of maps round probabilities, not factors: how far one may be off, and what one row may lose at worst, in nats.
MAP_ATOL = {"logmap": 0.05, "transform": 0.15}
MAP_KL_MAX = {"logmap": 0.005, "logmap:bits=8": 0.001}


def make_coder(name, geometry, layers, **kwargs):
    codec = parse_codec(name)
    return codec.coder(geometry, codec.fit(geometry, [layers]), **kwargs)


@pytest.mark.parametrize("name", CODEC_NAMES)
class TestContract:
    def test_json_round_trip_is_the_same_codec(self, name):
        codec = parse_codec(name)
        assert codec_from_json(codec.to_json()) == codec

    def test_codes_have_the_stated_shape_and_type(self, name):
        geometry = make_geometry()
        layers = make_factors(geometry)
        coder = make_coder(name, geometry, layers)
        codes_BLTC = coder.encode(layers)
        assert codes_BLTC.dtype == coder.codes_dtype
        assert codes_BLTC.shape == (2, coder.num_code_rows, coder.num_code_tokens, coder.num_components)

    def test_decoded_maps_are_within_the_stated_divergence(self, name):
        geometry = make_geometry(head_dim=64, grid=(6, 6))
        layers = make_factors(geometry)
        coder = make_coder(name, geometry, layers)
        codes_BLTC = coder.encode(layers)
        assert 0 <= mean_row_kl(coder, layers, codes_BLTC) + 1e-9 <= KL_BOUND[name] + 1e-9

    def test_encoding_is_deterministic_and_independent_of_the_batch(self, name):
        geometry = make_geometry()
        layers = make_factors(geometry, batch=4)
        coder = make_coder(name, geometry, layers)
        whole = coder.encode(layers)
        one = coder.encode([LayerFactors(q_BHTD=f.q_BHTD[2:3], k_BHTD=f.k_BHTD[2:3], scale=f.scale) for f in layers])
        assert torch.equal(whole, coder.encode(layers))
        assert torch.equal(whole[2:3], one)

    def test_grouped_query_keys_stay_grouped(self, name):
        geometry = make_geometry(num_heads=4, num_kv_heads=2)
        layers = make_factors(geometry)
        coder = make_coder(name, geometry, layers)
        decoded = decode(coder, 1, coder.encode(layers))
        assert isinstance(decoded, LayerMaps) or decoded.k_BHTD.shape[1] == 2
        assert torch.allclose(decoded.maps(), layers[1].maps(), atol=MAP_ATOL.get(name, 0.02))

    def test_bias_is_handed_out_with_the_factors(self, name):
        geometry = make_geometry()
        layers = make_factors(geometry)
        bias_LHQK = torch.randn(2, 3, 7, 7)
        coder = make_coder(name, geometry, layers, bias_LHQK=bias_LHQK)
        decoded = decode(coder, 1, coder.encode(layers))
        expected = torch.softmax(layers[1].q_BHTD @ layers[1].k_BHTD.mT * geometry.scale + bias_LHQK[1], dim=-1)
        assert torch.allclose(decoded.maps(), expected, atol=MAP_ATOL.get(name, 0.02))

    def test_empty_batch_gives_no_codes(self, name):
        geometry = make_geometry()
        layers = make_factors(geometry, batch=0)
        coder = make_coder(name, geometry, make_factors(geometry))
        assert coder.encode(layers).shape == (0, coder.num_code_rows, coder.num_code_tokens, coder.num_components)

    @settings(max_examples=30, deadline=None)
    @given(exponent=st.integers(-30, 12), dead_head=st.booleans(), huge_token=st.booleans())
    def test_extreme_factors_come_back_within_a_hundredth_of_their_vector(self, name, exponent, dead_head, huge_token):
        geometry = make_geometry()
        layers = make_factors(geometry, size=2.0**exponent / 4)
        for layer in layers:
            if dead_head:
                layer.k_BHTD[:, 1] = 0
            if huge_token:
                layer.q_BHTD[:, :, 0] *= 4
        coder = make_coder(name, geometry, layers)
        codes_BLTC = coder.encode(layers)
        if name == "transform":
            # What its q and k are rounded to is chosen by what the maps lose.
            assert mean_row_kl(coder, layers, codes_BLTC) <= KL_BOUND[name]
            return
        for position, layer in enumerate(layers):
            decoded = decode(coder, position, codes_BLTC)
            if isinstance(decoded, LayerMaps):
                assert float(row_kl(layer, decoded).max()) < MAP_KL_MAX[name]
                continue
            for name_BHTD in ("q_BHTD", "k_BHTD"):
                given_BHTD = getattr(layer, name_BHTD)
                error_BHT = (getattr(decoded, name_BHTD) - given_BHTD).abs().amax(-1)
                # 4e-6 is where float16 has no finer step left.
                assert bool((error_BHT <= given_BHTD.abs().amax(-1) * 0.01 + 4e-6).all())


def test_exact_float32_gives_back_every_bit():
    geometry = make_geometry()
    layers = make_factors(geometry)
    coder = make_coder("exact:dtype=float32", geometry, layers)
    decoded = decode(coder, 0, coder.encode(layers))
    assert torch.equal(decoded.q_BHTD, layers[0].q_BHTD)
    assert torch.equal(decoded.k_BHTD, layers[0].k_BHTD)


def test_exact_refuses_what_float16_cannot_hold_and_says_what_can():
    geometry = make_geometry()
    layers = make_factors(geometry, size=1e6)
    with pytest.raises(CodecError, match=r"layer 0: a factor of size .* does not fit in torch.float16.*dtype=float32"):
        make_coder("exact", geometry, layers).encode(layers)


def test_int8_refuses_infinity_by_layer():
    geometry = make_geometry()
    layers = make_factors(geometry)
    layers[1].k_BHTD[0, 0, 0, 0] = math.inf
    with pytest.raises(CodecError, match="layer 2: a factor of size inf"):
        make_coder("int8", geometry, layers).encode(layers)


def make_maps(geometry, batch=2):
    return [LayerMaps(attn_BHQK=layer.maps()) for layer in make_factors(geometry, batch, size=2.0)]


@pytest.mark.parametrize("name", ["exact", "int8"])
def test_codecs_of_q_and_k_refuse_maps_and_name_the_codec_that_takes_them(name):
    geometry = replace(make_geometry(), kind="maps", head_dim=0, scale=1.0)
    maps = make_maps(make_geometry())
    with pytest.raises(CodecError, match=f"codec {name} stores q and k, but .* Use --codec logmap"):
        make_coder(name, geometry, maps).encode(maps)


# The most a component of v may be off, as a share of its vector's largest: half a step, and float16's rounding.
V_BOUND = {"exact": 2**-11, "exact:dtype=float32": 0.0, "int8": 1 / 254 + 2**-11}


@pytest.mark.parametrize("name", V_BOUND)
class TestValues:
    def test_they_come_back_within_the_stated_error_and_in_their_own_shape(self, name):
        geometry = make_geometry(num_heads=4, num_kv_heads=2, v_head_dim=12)
        layers = make_factors(geometry)
        coder = make_coder(name, geometry, layers)
        codes_BLTC = coder.encode(layers)
        assert codes_BLTC.shape[3] == coder.num_components == {"int8": 6 * 10 + 2 * 14}.get(name, 6 * 8 + 2 * 12)
        for position, layer in enumerate(layers):
            decoded = decode(coder, position, codes_BLTC)
            assert decoded.v_BHTD.shape == layer.v_BHTD.shape
            error_BHTD = (decoded.v_BHTD - layer.v_BHTD).abs()
            assert bool((error_BHTD <= V_BOUND[name] * layer.v_BHTD.abs().amax(-1, keepdim=True)).all())
            assert relative_error(layer.v_BHTD, decoded.v_BHTD) == pytest.approx(
                float((decoded.v_BHTD - layer.v_BHTD).norm() / layer.v_BHTD.norm()), rel=1e-3
            )

    def test_they_lie_behind_q_and_k_whose_codes_they_leave_alone(self, name):
        geometry = make_geometry(v_head_dim=8)
        layers = make_factors(geometry)
        coder = make_coder(name, geometry, layers)
        alone = make_coder(name, replace(geometry, v_head_dim=0), layers)
        codes_BLTC = alone.encode([replace(layer, v_BHTD=None) for layer in layers])
        assert torch.equal(coder.encode(layers)[..., : alone.num_components], codes_BLTC)
        assert decode(alone, 0, codes_BLTC).v_BHTD is None

    def test_what_does_not_fit_is_named_by_layer(self, name):
        geometry = make_geometry(v_head_dim=8)
        layers = make_factors(geometry)
        layers[1].v_BHTD[0, 0, 0, 0] = math.inf
        with pytest.raises(CodecError, match=r"layer 2: a factor (is|of size) inf"):
            make_coder(name, geometry, layers).encode(layers)


@pytest.mark.parametrize("name", ["transform", "logmap"])
def test_codecs_of_maps_refuse_values_and_name_those_that_take_them(name):
    geometry = make_geometry(v_head_dim=8)
    with pytest.raises(CodecError, match=f"codec {name} stores only what the maps are .* Use --codec int8 or exact"):
        make_coder(name, geometry, make_factors(geometry))


@pytest.mark.parametrize("name", ["exact", "int8", "transform"])
def test_codecs_of_whole_maps_refuse_rows_and_name_the_one_that_takes_them(name):
    geometry = make_geometry()
    state = parse_codec(name).fit(geometry, [make_factors(geometry)])
    with pytest.raises(CodecError, match=f"codec {name} stores what whole maps are made from.* Use --codec logmap"):
        parse_codec(name).coder(replace(geometry, queries="cls"), state)


@pytest.mark.parametrize(("queries", "num_queries"), [("cls", 1), ("prefix", 3)])
def test_logmap_stores_rows_as_it_stores_them_in_whole_maps(queries, num_queries):
    whole = make_geometry(prefix=3)
    layers = make_factors(whole)
    codec, rows = parse_codec("logmap"), [layer.select_queries(num_queries) for layer in layers]
    coder = codec.coder(replace(whole, queries=queries), {})
    codes_BLTC = coder.encode(rows)
    assert torch.equal(codes_BLTC, codec.coder(whole, {}).encode(layers)[:, :, :num_queries])
    assert coder.num_code_tokens == num_queries
    for position, layer in enumerate(layers):
        decoded_BHQK = decode(coder, position, codes_BLTC).maps()
        assert torch.allclose(decoded_BHQK, layer.maps()[:, :, :num_queries], atol=MAP_ATOL["logmap"])


@pytest.mark.parametrize("bits", range(4, 9))
def test_logmap_gives_maps_back_as_distributions_and_nearer_with_more_bits(bits):
    geometry = make_geometry(grid=(6, 6))
    maps = make_maps(geometry)
    coder = make_coder(f"logmap:bits={bits}", geometry, maps)
    codes_BLTC = coder.encode(maps)
    assert int(codes_BLTC.max()) == 2**bits - 1
    for position, layer in enumerate(maps):
        decoded = decode(coder, position, codes_BLTC)
        assert torch.allclose(decoded.maps().sum(-1), torch.ones(()), atol=1e-5)
        assert 0 < float(row_kl(layer, decoded).mean()) < 4.0**-bits * 10


def test_logmap_keeps_masked_keys_at_zero_and_nothing_else():
    geometry = make_geometry(layers=(0,))
    (free,) = make_factors(geometry, size=30.0)
    mask = torch.zeros(1, 1, 7, 7)
    mask[..., 2:4] = -math.inf
    masked = LayerFactors(q_BHTD=free.q_BHTD, k_BHTD=free.k_BHTD, scale=free.scale, bias=mask)
    coder = make_coder("logmap", geometry, [masked])
    decoded = decode(coder, 0, coder.encode([masked]))
    zeros = decoded.maps() == 0
    assert bool(zeros[..., 2:4].all())
    assert not bool(zeros[..., [0, 1, 4, 5, 6]].any())
    assert torch.isfinite(row_kl(masked, decoded)).all()


def test_logmap_loses_little_of_rows_that_look_at_one_key_and_of_uniform_rows():
    geometry = make_geometry(grid=(8, 8), layers=(0,))
    identity = torch.full((1, 3, 65, 65), 1e-12) + torch.eye(65)
    uniform = torch.full((1, 3, 65, 65), 1 / 65)
    for attn_BHQK, most in ((identity, 0.0023), (uniform, 1e-6)):
        maps = LayerMaps(attn_BHQK=attn_BHQK)
        coder = make_coder("logmap", geometry, [maps])
        codes_BLTC = coder.encode([maps])
        assert float(row_kl(maps, decode(coder, 0, codes_BLTC)).max()) < most


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_logmap_refuses_by_layer_what_is_no_distribution(value):
    geometry = make_geometry()
    maps = make_maps(geometry)
    coder = make_coder("logmap", geometry, maps)
    maps[1].attn_BHQK[0, 0, 0, 0] = value
    with pytest.raises(CodecError, match="layer 2: a row of a map is not a distribution"):
        coder.encode(maps)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zip", "codec 'zip' is unknown.*exact, int8"),
        ("exact:dtype=float8", "dtype='float8', expected one of float16, float32"),
        ("logmap:bits=3", "codec logmap: bits=3, expected 4, 5, 6, 7 or 8"),
        ("int8:bits=3", "codec 'int8' takes no settings; leave out 'bits'"),
        ("exact:float32", "'float32' is not of the form field=value"),
    ],
)
def test_a_codec_that_cannot_be_made_says_why(text, message):
    with pytest.raises(CodecError, match=message):
        parse_codec(text)


def test_row_kl_equals_the_plain_sum():
    geometry = make_geometry(layers=(0,))
    (teacher,) = make_factors(geometry, seed=1)
    (other,) = make_factors(geometry, seed=2)
    attn, decoded = teacher.maps().double(), other.maps().double()
    expected = (attn * (attn.log() - decoded.log())).sum(-1)
    assert torch.allclose(row_kl(teacher, other).double(), expected, atol=1e-5)
    assert row_kl(teacher, teacher).abs().max() < 1e-6


def test_masked_keys_add_nothing_to_the_divergence():
    geometry = make_geometry(layers=(0,))
    (free,) = make_factors(geometry)
    mask = torch.zeros(1, 1, 7, 7)
    mask[..., -1] = -math.inf
    masked = LayerFactors(q_BHTD=free.q_BHTD, k_BHTD=free.k_BHTD, scale=free.scale, bias=mask)
    assert torch.isfinite(row_kl(masked, masked)).all()
