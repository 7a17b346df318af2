"""Students as other programs read them: dequantised and packed folders for transformers, GGUF files for llama.cpp."""
