"""Masked autoencoding of a timm ViT (He et al. 2022, arXiv 2111.06377).

The encoder sees a quarter of the patches, a small decoder predicts the pixels of the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from atcache.attention.blocks import find_blocks, model_label, token_layout
from atcache.errors import ConfigError
from atcache.teachers.components import components


class PatchMask(nn.Module):
    """Keeps only chosen patches. It replaces the patch dropout of a timm ViT, after the position embedding."""

    def __init__(self, num_prefix_tokens: int, *, returns_indices: bool) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.returns_indices = returns_indices
        """EVA models need the indices too, to pick rotary embeddings for the kept patches."""
        self.keep_BK: Tensor | None = None
        """Indices of the patches to keep, int64, shape (batch, kept); None keeps all."""

    def forward(self, tokens_BTC: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """The prefix tokens and the kept patches, in the order of the indices."""
        if self.keep_BK is not None:
            prefix, patches = tokens_BTC[:, : self.num_prefix_tokens], tokens_BTC[:, self.num_prefix_tokens :]
            index = self.keep_BK.unsqueeze(-1).expand(-1, -1, patches.shape[-1])
            tokens_BTC = torch.cat([prefix, patches.gather(1, index)], dim=1)
        return (tokens_BTC, self.keep_BK) if self.returns_indices else tokens_BTC


class MaskedAutoencoder(nn.Module):
    """An encoder, a decoder, and their loss. `encoder` stays a plain timm model, with timm's names of weights."""

    position_TC: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        *,
        mask_ratio: float = 0.75,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        normalise_targets: bool = True,
    ) -> None:
        """Put a mask into `encoder` and build a decoder for it.

        Args:
            encoder: a timm ViT that can drop patches.
            mask_ratio: share of the patches that are hidden; at least one must be hidden and one seen.
            decoder_dim: width of the decoder; divisible by 4 and by `decoder_heads`.
            decoder_depth: blocks of the decoder.
            decoder_heads: heads in each.
            normalise_targets: predict each patch with its own mean and deviation taken out, which gives better
                features (section 4.1 of the paper).

        Raises:
            ConfigError: the model cannot drop patches, or the numbers do not fit.
        """
        super().__init__()
        from timm.layers import pos_embed_sincos
        from timm.models.vision_transformer import Block

        find_blocks(encoder)
        self.tokens = token_layout(encoder)
        self.num_kept = num_kept_patches(self.tokens.num_patches, mask_ratio)
        self.normalise_targets = normalise_targets
        if not hasattr(encoder, "patch_drop") or components(encoder)["relative position bias"]:
            raise ConfigError(
                f"{model_label(encoder)} cannot run on a part of its patches. Choose a ViT or EVA-02 model."
            )
        if decoder_dim % 4 or decoder_dim % decoder_heads:
            raise ConfigError(f"decoder_dim {decoder_dim}: expected a multiple of 4 and of {decoder_heads} heads.")
        patch_drop: Any = encoder.patch_drop
        self.mask = PatchMask(self.tokens.num_prefix_tokens, returns_indices=patch_drop is None)  # None: EVA
        encoder.patch_drop = self.mask
        self.encoder = encoder
        patch_embed: Any = encoder.patch_embed
        self.patch_height, self.patch_width = (int(side) for side in patch_embed.patch_size)
        embed_dim: Any = encoder.embed_dim
        self.decoder_embed = nn.Linear(embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        nn.init.normal_(self.mask_token, std=0.02)
        grid = [self.tokens.grid_height, self.tokens.grid_width]
        position_TC = pos_embed_sincos.build_sincos2d_pos_embed(grid, dim=decoder_dim)
        self.register_buffer("position_TC", position_TC, persistent=False)
        self.decoder_blocks = nn.Sequential(
            *(Block(decoder_dim, decoder_heads, qkv_bias=True) for _ in range(decoder_depth))
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim)
        self.decoder_pixels = nn.Linear(decoder_dim, self.patch_height * self.patch_width * 3)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that timm's optimiser factory must not decay."""
        names: Any = getattr(self.encoder, "no_weight_decay", set)
        return {f"encoder.{name}" for name in names()} | {"mask_token"}

    def draw_order(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """A random order of the patches of each image, int64, shape (batch, patch): the first `num_kept` are seen."""
        return torch.rand(batch_size, self.tokens.num_patches, generator=generator).argsort(dim=1)

    def forward(self, images_BCHW: Tensor, order_BT: Tensor) -> Tensor:
        """The mean squared error over the hidden patches, a scalar.

        Args:
            images_BCHW: normalised images.
            order_BT: as from `draw_order`.
        """
        keep_BK, hidden_BT = order_BT[:, : self.num_kept], order_BT[:, self.num_kept :]
        predicted_BTC = self.predict(images_BCHW, keep_BK, hidden_BT)
        targets_BTC = _take(self.patches(images_BCHW), hidden_BT)
        if self.normalise_targets:
            variance, mean = torch.var_mean(targets_BTC, dim=-1, keepdim=True)
            targets_BTC = (targets_BTC - mean) / (variance + 1e-6).sqrt()
        return nn.functional.mse_loss(predicted_BTC.float(), targets_BTC)

    def predict(self, images_BCHW: Tensor, keep_BK: Tensor, hidden_BT: Tensor) -> Tensor:
        """Pixels of the hidden patches, from the kept ones alone: shape (batch, hidden, patch pixels x 3)."""
        encoder: Any = self.encoder
        self.mask.keep_BK = keep_BK
        try:
            latent_BTC = encoder.forward_features(images_BCHW)
        finally:
            self.mask.keep_BK = None
        # In models that pool their patches, fc_norm is the last norm: it ends the encoder here, as `norm` in others.
        latent_BTC = self.decoder_embed(getattr(encoder, "fc_norm", nn.Identity())(latent_BTC))
        num_prefix = self.tokens.num_prefix_tokens
        prefix_BTC, seen_BKC = latent_BTC[:, :num_prefix], latent_BTC[:, num_prefix:]
        index = keep_BK.unsqueeze(-1).expand(-1, -1, seen_BKC.shape[-1])
        all_BTC = self.mask_token.to(seen_BKC.dtype).expand(len(seen_BKC), self.tokens.num_patches, -1)
        all_BTC = all_BTC.scatter(1, index, seen_BKC) + self.position_TC
        decoded_BTC = self.decoder_blocks(torch.cat([prefix_BTC, all_BTC], dim=1))[:, num_prefix:]
        return self.decoder_pixels(self.decoder_norm(_take(decoded_BTC, hidden_BT)))

    def patches(self, images_BCHW: Tensor) -> Tensor:
        """The pixels of each patch, shape (batch, patch, patch height x patch width x 3), patches row by row."""
        num_images, num_channels = images_BCHW.shape[:2]
        grid = (self.tokens.grid_height, self.patch_height, self.tokens.grid_width, self.patch_width)
        parts = images_BCHW.reshape(num_images, num_channels, *grid).permute(0, 2, 4, 3, 5, 1)
        return parts.reshape(num_images, self.tokens.num_patches, -1)


def num_kept_patches(num_patches: int, mask_ratio: float) -> int:
    """How many patches the encoder sees.

    Raises:
        ConfigError: no patch would be seen, or none hidden.

    >>> num_kept_patches(196, 0.75)
    49
    """
    num_kept = round(num_patches * (1 - mask_ratio))
    if not 0 < num_kept < num_patches:
        raise ConfigError(
            f"mask ratio {mask_ratio} of {num_patches} patches leaves {num_kept} to see: expected at least 1 seen "
            "and 1 hidden."
        )
    return num_kept


def _take(tokens_BTC: Tensor, index_BT: Tensor) -> Tensor:
    return tokens_BTC.gather(1, index_BT.unsqueeze(-1).expand(-1, -1, tokens_BTC.shape[-1]))
