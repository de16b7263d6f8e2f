"""Pretrain: make a teacher from any timm ViT, on images without labels.

- `config`: what a pre-training run is asked for
- `run`: the whole training, which can be stopped and continued
- `autoencoder`: the masked autoencoder that is trained
"""
