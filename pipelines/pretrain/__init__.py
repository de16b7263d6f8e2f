"""Pretrain: make a teacher from any timm ViT, on images without labels.

- `config`: the options of a pre-training run
- `run`: the whole training, which can be stopped and continued
- `autoencoder`: the masked autoencoder that is trained
"""
