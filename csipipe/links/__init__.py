"""Training over emulated links: every UE rank in a network of its own, shaped by the kernel."""
