"""Names of the metrics that every training logs beside those of its objective. Imports no torch."""

LOOP_METRICS = ("learning_rate", "gradient_norm", "nonfinite_steps")
# They depend on the clock and the machine: a resumed training repeats every other metric bit by bit.
CLOCK_METRICS = ("samples_per_s", "tokens_per_s", "mfu", "memory_peak_bytes")
