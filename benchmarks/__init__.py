"""Training stacks compared on one machine, each in processes of its own: `python -m benchmarks.run --help`."""
