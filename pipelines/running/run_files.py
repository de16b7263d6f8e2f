"""The names of the files in a run's folder, and how weights are written to one."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from atcache.files.durable import replaced_whole
from atcache.store.metadata import RUN_FILE as RUN_FILE
from atcache.teachers.patch_grids import model_grid
from atcache.teachers.weight_files import GRID_KEY

WEIGHTS_FILE = "model.safetensors"


def save_weights(path: Path, model: nn.Module) -> None:
    """Write a timm model's weights. A distilled student's load into any timm model of the same name."""
    from safetensors import torch as safetensors_torch

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"format": "pt"}
    if grid := model_grid(model):
        metadata[GRID_KEY] = f"{grid[0]}x{grid[1]}"  # so that position embeddings of 2 x 8 are not taken for 4 x 4
    with replaced_whole(path) as temp:
        safetensors_torch.save_file(tensors, temp, metadata=metadata)
        # safetensors makes files that only their owner may read. Let all read the weights who may read the folder.
        temp.chmod(path.parent.stat().st_mode & 0o666)
