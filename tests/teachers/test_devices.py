"""Which of torch's attention kernels a training takes: the plain one where the fused one's backward pass is slow."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from atcache.teachers.devices import training_autocast

FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize(
    ("pixels", "dtype", "is_plain"),
    [(32, torch.bfloat16, True), (64, torch.bfloat16, False), (32, torch.float32, False)],
)
def test_short_sequences_in_bf16_train_with_plain_attention(pixels, dtype, is_plain):
    """32 x 32 pixels are 64 patches, 64 x 64 are 256."""
    torch.manual_seed(0)
    sizes = {"img_size": pixels, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    images, label_B = torch.randn(4, 3, pixels, pixels), torch.arange(4)

    def step() -> torch.Tensor:
        model.zero_grad()
        loss = F.cross_entropy(model(images).float(), label_B)
        loss.backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters()])

    with profile(activities=[ProfilerActivity.CPU]) as profiled, training_autocast(model, "cpu", dtype):
        gradient = step()
    assert any(event.key == FUSED for event in profiled.key_averages()) is not is_plain
    exact = step()
    assert (gradient - exact).norm() < 0.02 * exact.norm(), "the same gradient but for rounding"
