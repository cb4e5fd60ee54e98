"""Text encoders: prompts -> embeddings."""
