"""Training: recipes, batches, the train step and the loop; ahead-of-time compile and benchmarks."""
