"""Sizes and speeds of a ternary student and its FP32 teacher of some 50 million weights, as they are deployed.

    python -m benchmarks.deployment [--threads 1]

The weights are random: neither sizes nor speeds depend on what they are. What `tristill evaluate --packed` prints of a
trained run is measured in the same way.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.environment import environment
from tristill.pipeline.deployment import deployment_table
from tristill.stages.data.config import TrainedTokenizer
from tristill.stages.data.tokenizer import train_tokenizer
from tristill.stages.deployment.measure import measure_deployment
from tristill.stages.models.checkpoint import save_model
from tristill.stages.models.description import ModelConfig
from tristill.stages.models.transformer import Transformer
from tristill.stages.quantize.config import QuantizeConfig

RESULT = Path(__file__).parent / "results" / "deployment.json"
SHAPE = ModelConfig(width=768, layers=8, heads=12, kv_heads=4, mlp_width=2048)
CONTEXT_LENGTH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    with TemporaryDirectory() as made:
        folder = Path(made)
        texts = (path.read_text(encoding="utf-8") for path in sorted(Path(torch.__file__).parent.glob("*.py")))
        tokenizer = train_tokenizer(TrainedTokenizer(vocab_size=4096), texts)
        tokenizer.save(str(folder / "tokenizer.json"))
        for name, quantize in (("teacher", None), ("student", QuantizeConfig())):
            model = Transformer(SHAPE, tokenizer.get_vocab_size(), quantize)
            model.initialize(torch.Generator().manual_seed(0))
            save_model(folder / name, model, folder / "tokenizer.json", CONTEXT_LENGTH, end_of_text_id=0)
        found = measure_deployment(folder / "teacher", {"student": folder / "student"}, arguments.threads)
    table = deployment_table(found)
    print(table)
    markdown = "\n".join(line for line in table.splitlines() if line.startswith("|"))
    result = {"environment": environment(), **found.model_dump(), "markdown": markdown}
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
