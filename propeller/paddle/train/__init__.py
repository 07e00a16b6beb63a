"""Training: the loop and what stands around it."""

# First of all: `safetensors.paddle`, which the modules here use, imports Paddle by itself.
from propeller.paddle import runtime as runtime
