"""What the benchmarks share: models, texts, results, processes of their own."""
