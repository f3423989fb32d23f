"""What models are fine-tuned on and measured by: data in the benchmarks' own formats, their metrics, their outputs."""
