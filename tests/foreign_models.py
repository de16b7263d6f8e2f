"""Hand-written ViTs for tests, each attending in another way, and small folders of transformers models."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

COLOURS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
SIZES = {"image_size": 32, "patch_size": 8}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def heads_of(x_BTC, num_heads):
    return x_BTC.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class HandSoftmax(nn.Module):
    """Forms its logits and maps by hand, in one of several ways."""

    def __init__(self, width, num_heads, style="matmul"):
        super().__init__()
        self.num_heads, self.style = num_heads, style
        self.attend = nn.Softmax(dim=-1)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.temperature = nn.Parameter(torch.linspace(0.2, 0.6, num_heads).view(-1, 1, 1))
        self.to_out = nn.Linear(width, width)

    def logits(self, q, k):
        scale = q.shape[-1] ** -0.5
        if self.style == "matmul":
            return torch.matmul(q, k.transpose(-1, -2)) * scale
        if self.style == "in place":
            logits = q @ k.mT
            logits *= scale
            return logits
        if self.style == "before":
            return (q * scale) @ k.mT
        if self.style == "einsum":
            return torch.einsum("b h i d, b h j d -> b h i j", q, k) * scale
        if self.style == "swapped einsum":
            return torch.einsum("bhjd,bhid->bhij", k, q) * scale
        if self.style == "shifted":
            logits = q @ k.mT * scale
            return logits - logits.amax(dim=-1, keepdim=True)
        assert self.style == "temperature"
        return q @ k.mT * self.temperature

    def forward(self, x):
        q, k, v = (heads_of(part, self.num_heads) for part in self.to_qkv(x).chunk(3, dim=-1))
        self.last = self.attend(self.logits(q, k))
        return self.to_out((self.last @ v).transpose(1, 2).flatten(2))


class PackedFused(nn.Module):
    """One projection for q, k and v, and torch's fused call."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        self.last = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)  # a second opinion; nobody uses it
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GroupedRotary(nn.Module):
    """Fewer heads of k and v than of q, rotated by position, with a scale of its own."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, width)

    def rotated(self, x_BHTD):
        angle = torch.outer(torch.arange(x_BHTD.shape[2]), torch.tensor([1.0, 0.1]).repeat(self.head_dim // 4))
        one, other = x_BHTD.chunk(2, dim=-1)
        return torch.cat([one * angle.cos() - other * angle.sin(), one * angle.sin() + other * angle.cos()], dim=-1)

    def forward(self, x):
        q = self.rotated(heads_of(self.q(x), self.num_heads))
        k, v = (heads_of(part, self.num_heads // 2) for part in self.kv(x).chunk(2, dim=-1))
        k = self.rotated(k)
        self.last = (q @ k.repeat_interleave(2, dim=1).mT * 0.2).softmax(dim=-1)
        return F.scaled_dot_product_attention(q, k, v, scale=0.2, enable_gqa=True).transpose(1, 2).flatten(2)


class MultiHead(nn.Module):
    """torch's own module, whose maps torch itself can return."""

    def __init__(self, width, num_heads, batch_first=True, **options):
        super().__init__()
        self.batch_first = batch_first
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=batch_first, **options)
        self.want_maps = False

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        out, maps = self.attn(x, x, x, need_weights=self.want_maps, average_attn_weights=False)
        self.last = maps
        return out if self.batch_first else out.transpose(0, 1)


class HandWrittenViT(nn.Module):
    """Patches, a class token, blocks in a Sequential of Sequentials, and a head."""

    def __init__(self, make_attention, *, depth=2, width=32, num_prefix_tokens=1):
        super().__init__()
        torch.manual_seed(1)
        self.to_patches = nn.Conv2d(3, width, 8, 8)
        self.prefix = nn.Parameter(torch.randn(1, num_prefix_tokens, width))
        self.position = nn.Parameter(torch.randn(1, num_prefix_tokens + 16, width))
        self.layers = nn.Sequential(
            *(
                nn.Sequential(
                    Residual(nn.Sequential(nn.LayerNorm(width), make_attention(width, 4))),
                    Residual(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())),
                )
                for _ in range(depth)
            )
        )
        self.head = nn.Linear(width, 5)
        with torch.no_grad():
            for name, parameter in self.layers.named_parameters():
                if parameter.ndim == 2 and "temperature" not in name:
                    parameter.normal_(std=0.4)  # so that maps are far from uniform

    def forward(self, images):
        x = self.to_patches(images).flatten(2).mT
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x], dim=1) + self.position
        return self.head(self.layers(x).mean(dim=1))

    def attentions(self):
        """The attention modules, in order."""
        return [block[0].inner[1] for block in self.layers]


FAMILIES = {
    "vit": ("ViTConfig", "ViTModel", {}),
    "deit": ("DeiTConfig", "DeiTModel", {}),
    "dinov2": ("Dinov2Config", "Dinov2Model", {}),
    "dinov2_with_registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", {"num_register_tokens": 3}),
    "dinov3_vit": ("DINOv3ViTConfig", "DINOv3ViTModel", {"num_register_tokens": 2}),
    "clip_vision_model": ("CLIPVisionConfig", "CLIPVisionModel", {}),
    "siglip_vision_model": ("SiglipVisionConfig", "SiglipVisionModel", {}),
    "beit": ("BeitConfig", "BeitModel", {"use_relative_position_bias": True}),
    "vit_mae": ("ViTMAEConfig", "ViTMAEModel", {}),
    "vit_msn": ("ViTMSNConfig", "ViTMSNModel", {}),
}
PREFIX_TOKENS = {"deit": 2, "dinov2_with_registers": 4, "dinov3_vit": 3, "siglip_vision_model": 0}
PROCESSOR = {
    "do_resize": True,
    "size": {"height": 32, "width": 32},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
}


def save_transformers(folder: Path, family: str, *, processor=PROCESSOR, seed=0, **settings) -> Path:
    """A folder as `save_pretrained` writes it: two layers, 32 pixels, random weights."""
    import transformers

    config_class, model_class, more = FAMILIES[family]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = getattr(transformers, config_class)(**{**sizes, "image_size": 32, "patch_size": 8, **more, **settings})
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def eager_maps(folder: Path, family: str, images, **inputs):
    """The maps as transformers' own eager attention returns them."""
    import transformers

    model = getattr(transformers, FAMILIES[family][1]).from_pretrained(folder, attn_implementation="eager").eval()
    model.config.mask_ratio = 0.0
    with torch.no_grad():
        return model(pixel_values=images, output_attentions=True, **inputs).attentions
