"""One forward pass: calibrated probabilities, prediction set, out-of-distribution score, bottleneck."""
