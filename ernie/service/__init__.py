"""Embeddings as a service: the encoder server, its export, its clients. No Paddle is loaded here."""
