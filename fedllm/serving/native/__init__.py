"""The embedded engine: Llama-family models with many adapters per batch, on CPU or CUDA."""
