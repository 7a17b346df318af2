"""A run by the command line, in seconds: the text of its config."""

_CONFIG = """
[data]
source.kind = "python-stdlib"
tokenizer = { kind = "bpe", vocab_size = 512, train_bytes = 200_000 }
context_length = 32
validation_fraction = 0.2
max_train_tokens = 8_000
max_validation_tokens = 2_000

[teacher]
model = { width = 32, layers = 2, heads = 2, mlp_width = 64 }
training = { steps = 8, batch_windows = 4, learning_rate = 3e-3, seed = SEED }

[cache]
profile = PROFILE
max_train_windows = 64

[distill]
alpha = 0.5
training = { steps = 6, batch_windows = 4, learning_rate = 3e-3 }
"""


def small_config(profile: str, teacher_seed: int = 0) -> str:
    """`profile` is what stands behind `cache.profile =`."""
    return _CONFIG.replace("PROFILE", profile).replace("SEED", str(teacher_seed))
