"""The Llama-compatible transformer, in full precision and ternary, and its folders on disk."""
