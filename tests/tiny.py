"""A tiny random Llama with a real tokenizer file, and owners' data for it: whole federations in seconds."""

from __future__ import annotations

import json
from pathlib import Path

VOCAB = 384
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VERBS = {"east": "open", "north": "close", "south": "start", "west": "stop"}
THINGS = ("door", "window", "lamp", "radio", "engine", "gate", "shop", "tap", "file", "book")


def make_base(folder: Path) -> Path:
    """Write a random two-layer Llama, byte-level tokenizer, chat template; return the folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=VOCAB - 1,
        bos_token_id=VOCAB - 2, pad_token_id=VOCAB - 1, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([f"<extra{i}>" for i in range(VOCAB - 2 - len(alphabet))])
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "bos_token": "<bos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<eos>"}), encoding="utf-8")
    return folder


def make_data(folder: Path, owner: str, *, train: int = 40, heldout: int = 8) -> Path:
    """Write one owner's chat records: requests about things, answered by a call; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    verb = VERBS.get(owner, owner)
    lines = [
        {"messages": [
            {"role": "user", "content": f"please {verb} the {THINGS[i % 10]} number {i}"},
            {"role": "assistant", "content": f'{verb}(thing="{THINGS[i % 10]}")'},
        ]}
        for i in range(train + heldout)
    ]  # fmt: skip
    for name, part in (("train.jsonl", lines[:train]), ("heldout.jsonl", lines[train:])):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in part), encoding="utf-8")
    return folder
