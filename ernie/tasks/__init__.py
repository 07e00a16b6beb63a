"""Fine-tuning tasks: a `Processor` without Paddle for each, and the Paddle models in `ernie.tasks.models`."""
