"""What the benchmark measures csipipe against, and how: interleaved, in one session."""
