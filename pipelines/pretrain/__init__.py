"""Pretrain: makes a teacher of any plain timm ViT."""
