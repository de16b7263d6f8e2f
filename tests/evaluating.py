"""A second opinion on scores: a plain timm model and numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file

from atcache.pipelines.evaluate.config import EvaluateConfig
from atcache.store.reader import CacheReader


def config_of(*folders, **fields) -> EvaluateConfig:
    return EvaluateConfig(runs=folders, **{"device": "cpu", "precision": "fp32", **fields})


def plain_logits(folder: Path, val_cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """The weights in a plain timm model, on the stored pixels; logits and labels."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, embed_dim=32, depth=2, num_heads=2, num_classes=10
    ).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    reader = CacheReader(val_cache)
    pixels = torch.from_numpy(np.stack([reader.read_pixels(0, sample) for sample in range(48)]))
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        logits = model((pixels.permute(0, 3, 1, 2) / 255 - mean) / std)
    return logits.double().numpy(), np.asarray(reader.labels_S)


def softmax(logits_SC: np.ndarray) -> np.ndarray:
    exponent_SC = np.exp(logits_SC - logits_SC.max(axis=1, keepdims=True))
    return exponent_SC / exponent_SC.sum(axis=1, keepdims=True)


def score_by_hand(probability_SC: np.ndarray, label_S: np.ndarray) -> tuple[float, float, float, float]:
    """top-1 and top-5 in percent, loss, and the expected calibration error in percentage points."""
    samples = np.arange(len(label_S))
    rank_S = (probability_SC > probability_SC[samples, label_S][:, None]).sum(1)
    loss = -np.log(probability_SC[samples, label_S]).mean()
    confidence_S, right_S = probability_SC.max(axis=1), rank_S < 1
    ece = 0.0
    for low in range(15):
        inside_S = (confidence_S > low / 15) & (confidence_S <= (low + 1) / 15)
        if inside_S.any():
            ece += inside_S.mean() * abs(right_S[inside_S].mean() - confidence_S[inside_S].mean())
    return 100 * right_S.mean(), 100 * (rank_S < 5).mean(), loss, 100 * ece
