"""Position embeddings and tables come to the model's own grid with the right values, or are refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table

from atcache.errors import TeacherError
from atcache.pipelines.running.run_files import save_weights
from atcache.teachers.load import create_student, load_teacher
from atcache.teachers.names import parse_model_name
from atcache.teachers.weight_files import Weights, read_weights
from atcache.teachers.weights import load_weights, weights_of, weights_sha256

VIT = "vit_tiny_patch16_224:patch_size=8,embed_dim=32,depth=2,num_heads=2"
BEIT = "beitv2_base_patch16_224:patch_size=8,embed_dim=32,depth=2,num_heads=2"
EVA = "eva02_tiny_patch14_224:patch_size=8,embed_dim=32,depth=2,num_heads=2"
RELPOS = "vit_relpos_small_patch16_224:rel_pos_type=bias,patch_size=8,embed_dim=32,depth=2,num_heads=2"
SQUARE, WIDE = "img_size=32", "img_size=(16,64)"  # 4 x 4 and 2 x 8 patches


def made(name: str, seed: int = 0) -> torch.nn.Module:
    """A model whose position embeddings and tables are all different numbers."""
    torch.manual_seed(seed)
    model = create_student(parse_model_name(name), 0)
    for key, tensor in model.state_dict().items():
        if "pos_embed" in key or "relative_position_bias_table" in key:
            tensor.copy_(torch.randn(tensor.shape))
    return model


def resampled(positions_1NC, old, new, num_prefix=1):
    """The second opinion: prefix kept, the rest interpolated as an image of C channels."""
    prefix, image = positions_1NC[:, :num_prefix], positions_1NC[:, num_prefix:]
    image = image.reshape(1, *old, -1).permute(0, 3, 1, 2)
    image = torch.nn.functional.interpolate(image, size=new, mode="bicubic", antialias=True)
    return torch.cat([prefix, image.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], -1)], dim=1)


@pytest.mark.parametrize("family", [VIT, EVA])
def test_square_positions_are_resampled_to_a_wide_grid_of_as_many_patches(family):
    square, wide = made(f"{family},{SQUARE}"), made(f"{family},{WIDE}", seed=1)
    load_weights(wide, weights_of(square))
    expected = resampled(square.pos_embed, (4, 4), (2, 8))
    assert square.pos_embed.shape == wide.pos_embed.shape
    torch.testing.assert_close(wide.pos_embed, expected)
    assert not torch.allclose(wide.pos_embed, square.pos_embed)


def test_rotary_positions_are_computed_from_the_models_own_grid():
    square, wide, fresh = (made(f"{EVA},{size}") for size in (SQUARE, WIDE, WIDE))
    load_weights(wide, weights_of(square))
    assert torch.equal(wide.rope.get_embed(), fresh.rope.get_embed())
    assert not torch.equal(wide.rope.get_embed(), square.rope.get_embed())


@pytest.mark.parametrize("family", [VIT, EVA])
@pytest.mark.parametrize("size", [SQUARE, WIDE, "img_size=(24,32)"])
def test_positions_of_the_models_own_grid_are_kept(family, size):
    theirs, ours = made(f"{family},{size}"), made(f"{family},{size}", seed=1)
    load_weights(ours, weights_of(theirs))
    assert torch.equal(ours.pos_embed, theirs.pos_embed)


def test_a_file_of_as_many_patches_as_both_grids_is_refused_until_its_grid_is_said(tmp_path):
    square, wide = made(f"{VIT},{SQUARE}"), made(f"{VIT},{WIDE}", seed=1)
    save_file(square.state_dict(), tmp_path / "square.safetensors")
    message = r"16 positions may be those of 4 x 4 patches or of the model's 2 x 8.* Add weights_grid=\(4,4\) or"
    with pytest.raises(TeacherError, match=message):
        load_weights(wide, read_weights(tmp_path / "square.safetensors"))
    name = f"{VIT},{WIDE},weights_grid="
    as_square = load_teacher(f"{name}(4,4)", weights=tmp_path / "square.safetensors")
    torch.testing.assert_close(as_square.model.pos_embed, resampled(square.pos_embed, (4, 4), (2, 8)))
    as_wide = load_teacher(f"{name}(2,8)", weights=tmp_path / "square.safetensors")
    assert torch.equal(as_wide.model.pos_embed, square.pos_embed)
    assert parse_model_name(str(as_wide.name)) == as_wide.name, "a later load of the cache's teacher does the same"
    student = create_student(as_square.name, 3, weights=weights_of(as_square.model))
    assert torch.equal(student.pos_embed, as_square.model.pos_embed), "resampled once, not twice"


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("(4,5)", r"weights' positions are 16, and weights_grid=\(4,5\) has 20"),
        ("14", r"weights_grid=14, expected patches down and across, such as \(14,14\)"),
        ("(4,0)", "expected at least one patch"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(grid, message, tmp_path):
    save_file(made(f"{VIT},{SQUARE}").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(TeacherError, match=message):
        load_teacher(f"{VIT},{WIDE},weights_grid={grid}", weights=tmp_path / "w.safetensors")


def test_weights_that_atcache_wrote_say_their_grid(tmp_path):
    wide, square = made(f"{VIT},{WIDE}"), made(f"{VIT},{SQUARE}", seed=1)
    save_weights(tmp_path / "model.safetensors", wide)
    assert read_weights(tmp_path / "model.safetensors").grid == (2, 8)
    teacher = load_teacher(f"{VIT},{WIDE}", weights=tmp_path / "model.safetensors")
    assert torch.equal(teacher.model.pos_embed, wide.pos_embed)
    load_weights(square, read_weights(tmp_path / "model.safetensors"))
    torch.testing.assert_close(square.pos_embed, resampled(wide.pos_embed, (2, 8), (4, 4)))


def test_a_grid_that_is_no_square_and_not_the_models_is_asked_for():
    theirs, ours = made(f"{VIT},img_size=(24,48)"), made(f"{VIT},{SQUARE}", seed=1)
    with pytest.raises(TeacherError, match=r"18 positions are of no square grid of patches, and the model's is 4 x 4"):
        load_weights(ours, theirs.state_dict())
    load_weights(ours, Weights(theirs.state_dict(), grid=(3, 6)))
    torch.testing.assert_close(ours.pos_embed, resampled(theirs.pos_embed, (3, 6), (4, 4)))


def test_positions_without_those_of_the_class_token_give_the_same_sums():
    bare, full = made(f"{VIT},{SQUARE},no_embed_class=True"), made(f"{VIT},{SQUARE}", seed=1)
    assert (bare.pos_embed.shape[1], full.pos_embed.shape[1]) == (16, 17)
    image = torch.rand(2, 3, 32, 32)
    # 16 positions may also be those of 3 x 5 patches and a class token.
    with pytest.raises(TeacherError, match=r"16 positions. If they are of 4 x 4 patches and none of a class"):
        load_weights(full, bare.state_dict())
    load_weights(full, weights_of(bare))
    torch.testing.assert_close(full.forward_features(image), bare.forward_features(image))
    other = made(f"{VIT},{SQUARE}", seed=2)
    load_weights(bare, other.state_dict())
    torch.testing.assert_close(bare.forward_features(image), other.forward_features(image))


def test_positions_of_a_class_token_that_the_model_lacks_are_refused():
    without = made(f"{VIT},{SQUARE},class_token=False,global_pool=avg")
    with pytest.raises(TeacherError, match="positions for 1 class and register tokens, expected 0"):
        load_weights(without, made(f"{VIT},{SQUARE}").state_dict())


def test_weights_with_registers_are_refused_by_a_model_without():
    small = f"patch_size=8,embed_dim=32,depth=2,num_heads=2,{SQUARE}"
    registers = made(f"vit_small_patch14_reg4_dinov2:{small}")
    plain = made(f"vit_small_patch14_dinov2:{small}", seed=1)
    message = r"have 4 register tokens \(reg_token\), the model has none.*are of: vit_small_patch14_reg4_dinov2"
    for grid in (None, (4, 4)):  # its positions have none for a class token, and the grid does not help over that
        with pytest.raises(TeacherError, match=message):
            load_weights(plain, Weights(registers.state_dict(), grid=grid))


@pytest.mark.parametrize(
    ("richer", "plainer", "token"),
    [
        (f"{VIT},reg_tokens=3", VIT, "the weights have 3 register tokens"),
        (f"{VIT},no_embed_class=True", f"{VIT},class_token=False,global_pool=avg", "cls_token"),
        (VIT, f"{VIT},pos_embed=none", "pos_embed"),
    ],
)
def test_a_tensor_that_maps_depend_on_and_the_model_lacks_is_refused(richer, plainer, token):
    model = made(f"{plainer},{SQUARE}")
    before = weights_sha256(model)
    with pytest.raises(TeacherError, match=token):
        load_weights(model, weights_of(made(f"{richer},{SQUARE}", seed=1)))
    with pytest.raises(
        TeacherError, match=r"1 tensors of the weights, .* have no place in the model.* norm_pre\.weight"
    ):
        load_weights(model, weights_of(model) | {"norm_pre.weight": torch.ones(32)})
    assert weights_sha256(model) == before


def test_dinov2s_registers_lose_no_position_to_another_grid():
    name = "vit_small_patch14_reg4_dinov2:patch_size=8,embed_dim=32,depth=2,num_heads=2"
    square, wide = made(f"{name},{SQUARE}"), made(f"{name},{WIDE}", seed=1)
    state = dict(square.state_dict())
    # As Meta's files have it: a position for the class token, none for registers, and a mask token.
    state["register_tokens"], state["mask_token"] = state.pop("reg_token"), torch.zeros(1, 32)
    of_class = torch.randn(1, 1, 32)
    state["pos_embed"] = torch.cat([of_class, state["pos_embed"]], dim=1)
    load_weights(wide, Weights(state, grid=(4, 4)))
    torch.testing.assert_close(wide.cls_token, square.cls_token + of_class)
    torch.testing.assert_close(wide.pos_embed, resampled(square.pos_embed, (4, 4), (2, 8), num_prefix=0))


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, within timm's interpolation
@pytest.mark.parametrize("family", [BEIT, RELPOS])
def test_relative_tables_of_a_square_come_to_a_wide_window_of_as_many_offsets(family):
    # 5 x 5 and 2 x 14 patches both have 81 offsets.
    square, wide = made(f"{family},img_size=40"), made(f"{family},img_size=(16,112)", seed=1)
    tables = {name: t for name, t in square.state_dict().items() if name.endswith("relative_position_bias_table")}
    assert tables
    assert all(wide.state_dict()[name].shape == table.shape for name, table in tables.items())
    with pytest.raises(TeacherError, match=r"81 offsets may be those of 5 x 5 patches or of the model's 2 x 14"):
        load_weights(wide, square.state_dict())
    load_weights(wide, weights_of(square))
    for name, table in tables.items():
        expected = resize_rel_pos_bias_table(table, (2, 14), table.shape, old_window_size=(5, 5))
        torch.testing.assert_close(wide.state_dict()[name], expected)
        assert not torch.allclose(wide.state_dict()[name], table)
        # The offset (0, 0) is in the middle of both: row 4 of 9 and 1 of 3, column 4 of 9 and 13 of 27.
        torch.testing.assert_close(wide.state_dict()[name][1 * 27 + 13], table[4 * 9 + 4])


@pytest.mark.parametrize("family", [BEIT, RELPOS])
def test_relative_tables_of_the_models_own_window_are_kept(family):
    theirs, ours = made(f"{family},img_size=(16,112)"), made(f"{family},img_size=(16,112)", seed=1)
    load_weights(ours, weights_of(theirs))
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def test_three_by_five_patches_and_a_class_token_are_not_taken_for_four_by_four():
    theirs, ours = made(f"{VIT},img_size=(24,40)"), made(f"{VIT},{SQUARE}", seed=1)
    with pytest.raises(TeacherError, match="if some are, add the grid of the others"):
        load_weights(ours, theirs.state_dict())
    load_weights(ours, weights_of(theirs))
    torch.testing.assert_close(ours.pos_embed, resampled(theirs.pos_embed, (3, 5), (4, 4)))


def test_interpolation_is_timms():
    positions_1NC = torch.randn(1, 17, 8)
    timms = resample_abs_pos_embed(positions_1NC, new_size=[2, 8], old_size=[4, 4])
    torch.testing.assert_close(resampled(positions_1NC, (4, 4), (2, 8)), timms)
