"""The parts of the incremental CIFAR-100 experiment, one subject per file; see the README for the order to read them in."""
