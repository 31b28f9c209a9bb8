"""Two Flower apps that `benchmarks.round` runs next to fedllm: Flower's own SecAgg+, and plain FedAvg."""
