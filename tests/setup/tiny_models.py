"""Makes the small random-weight models that the tests and the demo serve.

    python tests/setup/tiny_models.py llama deepseek_v3     # prints one folder per line

Real architectures (Llama, and DeepSeek-V3 with MLA and MoE), real loading code, weights from a fixed
seed: nothing is downloaded, and every machine gets the same bytes for the same library versions. The
folder is ``${RAYLESS_MODELS:-${XDG_CACHE_HOME:-~/.cache}/rayless/models}/<name>-<fingerprint>``; the
fingerprint covers this file and the versions of the libraries, so a change makes a new folder.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

SEED = 0
LAYERS = 4
VOCABULARY = 512
CONTEXT = 2048

# What the tokenizer learns its merges from.
CORPUS = """
Two hosts, one token, one model cut into two stages. The first stage reads the question and hands the
hidden states to the second one; the second stage says which word comes next. What is a pipeline? A
pipeline is a line of workers, each of which does its part and passes the work on. The capital of France
is Paris. The sum of two and two is four. Hello, how are you today? I am a small model with random
weights, and I do not know what I am saying. Once upon a time there was a river, and over the river a
bridge, and on the bridge two travellers who carried one long beam between them. When one of them fell,
the other one knew it at once. Which worker is alive? Which node is dead? Who holds the graphics card?
"""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
PAD, BOS, END = 0, 1, 2


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the text above; any text can be encoded with it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS.strip().split("\n"), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=SPECIAL_TOKENS[BOS],
        eos_token=SPECIAL_TOKENS[END],
        pad_token=SPECIAL_TOKENS[PAD],
        model_max_length=CONTEXT,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


# Wider than the usual 0.02: with that, a random model repeats one token, and tokens that do not vary
# would hide a broken hop.
INIT_STD = 0.08


def llama() -> PretrainedConfig:
    """2.9 million parameters; attention heads and key/value heads divide by two for TP2."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=INIT_STD,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=END,
    )


def deepseek_v3() -> PretrainedConfig:
    """About 7 million parameters: latent attention in every layer, one dense layer, three of experts."""
    from transformers import DeepseekV3Config

    return DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=LAYERS,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        norm_topk_prob=True,
        q_lora_rank=64,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        max_position_embeddings=CONTEXT,
        initializer_range=INIT_STD,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=END,
    )


# vLLM reads these from config.json, where `save_pretrained` does not write them.
EXTRA_CONFIG: dict[str, dict[str, object]] = {
    "llama": {},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "num_nextn_predict_layers": 0},
}
CONFIGS = {"llama": llama, "deepseek_v3": deepseek_v3}


def build(name: str, folder: Path) -> None:
    """Writes the model and its tokenizer to an empty folder."""
    import torch
    from transformers import AutoModelForCausalLM

    config = CONFIGS[name]()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # the same order of random numbers on every machine
    model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer().save_pretrained(folder)
    path = folder / "config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps({**written, **EXTRA_CONFIG[name]}, indent=2, sort_keys=True) + "\n")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"tiny_models: made {name}: {parameters / 1e6:.1f} M parameters, {LAYERS} layers", file=sys.stderr)


def cache() -> Path:
    """Where the models of this machine are kept."""
    chosen = os.environ.get("RAYLESS_MODELS")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rayless" / "models"


def fingerprint() -> str:
    """Changes when this file or a library that writes the models does."""
    parts = [Path(__file__).read_bytes()]
    parts += [importlib.metadata.version(lib).encode() for lib in ("torch", "transformers", "tokenizers")]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:10]


def ensure(name: str) -> Path:
    """The folder of a model, made if it is not there yet (two runs at once make it once)."""
    root = cache()
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"{name}-{fingerprint()}"
    if folder.is_dir():
        return folder
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            partial = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=root))
            try:
                partial.chmod(0o755)
                build(name, partial)
                partial.rename(folder)  # whole or not there at all
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="make the small models of the tests; prints their folders")
    parser.add_argument("names", nargs="+", choices=sorted(CONFIGS))
    for name in parser.parse_args().names:
        print(ensure(name))


if __name__ == "__main__":
    main()
