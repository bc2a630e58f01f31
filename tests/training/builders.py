"""Small things to train: a random Llama of two layers with a byte-level chat tokenizer."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from perennial.training.examples import Example, Kind, Origin, write_examples

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tiny_tokenizer() -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    config._attn_implementation = "sdpa"
    return transformers.LlamaForCausalLM(config).requires_grad_(False).eval()


def save_tiny(folder: Path) -> Path:
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def example(index: int, kind: Kind = "correction", **fields: Any) -> Example:
    given: dict[str, Any] = {
        "id": f"{kind}-{index}",
        "messages": (("user", f"what is item {index * 7}?"),),
        "completion": f"box {chr(97 + index % 26)}{index}",
        "kind": kind,
        "origins": (Origin(event_id=f"fb_{index}", subject=f"s{index % 3}"),),
    }
    return Example(**{**given, **fields})


def write_job(folder: Path, **fields: Any) -> Path:
    """A small job file with its rows beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_examples(folder / "new.jsonl", [example(i) for i in range(10)])
    write_examples(folder / "general.jsonl", [example(i, "general") for i in range(30, 34)])
    if not (folder / "tiny").exists():
        save_tiny(folder / "tiny")
    body = {
        "base_model": str(folder / "tiny"),
        "train_rows": "new.jsonl",
        "general_rows": "general.jsonl",
        "num_threads": 1,
        "device": "cpu",
        "config": {"rank": 4, "epochs": 6, "batch_tokens": 100, "lr": 5e-3, "checkpoint_steps": 3},
    }
    path = folder / "job.json"
    path.write_text(json.dumps({**body, **fields}))
    return path
