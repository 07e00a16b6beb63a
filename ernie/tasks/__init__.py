"""Fine-tuning tasks: a `Processor` without Paddle for each, and the Paddle models in modules named `*_model`."""
