"""The engine for plain PyTorch, DDP and FSDP2."""
