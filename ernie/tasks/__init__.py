"""Fine-tuning tasks: a `Processor` without Paddle for each, and its network in a module named `*_model`."""
